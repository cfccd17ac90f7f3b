"""One pass over all frames: a few numbers of each, kept in columns; nothing that grows with the number of atoms."""

import sys
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase.data import covalent_radii

from mffm.data.doctor.fingerprint import N_FEATURES, composition_key, features, pairs
from mffm.data.doctor.inputs import Frames
from mffm.frame import Frame
from mffm.keys import N_ELEMENTS, PROPERTIES

_RADII = np.where(np.isfinite(covalent_radii), covalent_radii, 1.5)
_RADII = np.concatenate([_RADII, np.full(max(0, N_ELEMENTS + 1 - len(_RADII)), 1.5)])
SIGHT = 6.0  # Å: an atom without another one within it is alone to a potential of that cutoff
NEIGHBORS_WITHIN = 5.0  # Å, of the neighbor counts


@dataclass
class Columns:
    """Numbers of each frame. Those of labels are NaN where the label is missing.

    Attributes:
        source, split, group: index into the names; -1 where there is none. [n]
        key: what structures must share to be the same. [n] int64
        features: [n, N_FEATURES] float32, Å.
        closest: least distance of two atoms over the sum of their covalent radii; inf where no pair is within 6 Å. [n]
        n_alone: atoms without another one within 6 Å, 0 for frames of one atom. [n]
        neighbors: mean number of neighbors within 5 Å. [n]
        volume: Å³ an atom, 0 where not fully periodic. [n]
        energy: eV. [n_fidelities, n]
        largest_force, net_force: eV/Å; the latter is the norm of the sum, an atom. [n_fidelities, n]
        mean_stress, largest_stress: eV/Å³; a third of the trace, and the largest component. [n_fidelities, n]
    """

    source_names: list[str]
    split_names: list[str]
    group_names: list[str]
    fidelities: list[str]
    n_atoms: np.ndarray
    source: np.ndarray
    split: np.ndarray
    group: np.ndarray
    key: np.ndarray
    features: np.ndarray
    closest: np.ndarray
    n_alone: np.ndarray
    neighbors: np.ndarray
    volume: np.ndarray
    energy: np.ndarray
    largest_force: np.ndarray
    net_force: np.ndarray
    mean_stress: np.ndarray
    largest_stress: np.ndarray
    element_start: np.ndarray
    element: np.ndarray
    element_count: np.ndarray

    @property
    def n(self) -> int:
        return len(self.n_atoms)

    @property
    def isolated(self) -> np.ndarray:
        """[n] bool: which frames are a single atom without an image within 6 Å."""
        return (self.n_atoms == 1) & np.isinf(self.closest)

    def composition(self, rows: np.ndarray) -> np.ndarray:
        """Return element counts, float64 [len(rows), N_ELEMENTS + 1], column = atomic number."""
        counts = np.zeros((len(rows), N_ELEMENTS + 1))
        for i, row in enumerate(rows.tolist()):
            part = slice(self.element_start[row], self.element_start[row + 1])
            counts[i, self.element[part]] = self.element_count[part]
        return counts


class _Names:
    """Names in the order of their first appearance, and their numbers."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, name: str) -> int:
        return self.numbers.setdefault(name, len(self.numbers)) if name else -1


def _about_pairs(frame: Frame) -> tuple[np.ndarray, float, int, float]:
    """Return features, closest pair over its covalent radii, atoms that are alone, mean number of neighbors."""
    found = pairs(frame)
    n = frame.n_atoms
    if not len(found.distance):
        return features(frame, found), np.inf, n if n > 1 else 0, 0.0
    z = frame.atomic_numbers
    ratio = found.distance / (_RADII[z[found.receiver]] + _RADII[z[found.sender]])
    seen = np.zeros(n, bool)
    seen[found.receiver[found.distance < SIGHT]] = True
    near = int((found.distance < NEIGHBORS_WITHIN).sum())
    return features(frame, found), float(ratio.min()), int(n - seen.sum()) if n > 1 else 0, near / n


def _about_labels(frame: Frame, fidelity: str) -> tuple[float, float, float, float, float]:
    """Return energy, largest force, net force an atom, mean and largest stress; NaN where there is no label."""
    energy, forces, stress = (frame.labels.get((fidelity, p)) for p in PROPERTIES)
    nan = float("nan")
    largest = net = mean = component = nan
    if forces is not None:
        f = forces.astype(np.float64)
        largest = float(np.sqrt((f * f).sum(1).max(initial=0.0)))
        net = float(np.linalg.norm(f.sum(0))) / frame.n_atoms
    if stress is not None:
        mean, component = float(np.trace(stress)) / 3, float(np.abs(stress).max())
    return nan if energy is None else float(energy), largest, net, mean, component


def scan(frames: Frames, progress: bool = False, what: str = "doctor") -> Columns:
    """Read every frame once.

    Args:
        progress: tell now and then how far it is.

    Raises:
        InputError: a file that cannot be read.
    """
    sources, splits, groups = _Names(), _Names(), _Names()
    n_fidelities = len(frames.fidelities)
    numbers = {name: array("q") for name in ("n_atoms", "source", "split", "group", "key", "n_alone", "n_elements")}
    values = {name: array("d") for name in ("closest", "neighbors", "volume", "labels")}
    vectors, element, element_count = array("f"), array("B"), array("l")
    for row, frame, source in _told(frames, progress, what):
        del row
        vector, closest, n_alone, neighbors = _about_pairs(frame)
        vectors.extend(vector.tolist())
        kinds, counts = np.unique(frame.atomic_numbers, return_counts=True)
        element.extend(kinds.tolist())
        element_count.extend(counts.tolist())
        for name, number in (
            ("n_atoms", frame.n_atoms), ("source", sources.number(source)), ("split", splits.number(frame.split)),
            ("group", groups.number(frame.group)), ("key", composition_key(frame)), ("n_alone", n_alone),
            ("n_elements", len(kinds)),
        ):  # fmt: skip
            numbers[name].append(number)
        values["closest"].append(closest)
        values["neighbors"].append(neighbors)
        values["volume"].append(frame.volume / frame.n_atoms if frame.pbc.all() else 0.0)
        for fidelity in frames.fidelities:
            values["labels"].extend(_about_labels(frame, fidelity))
    plain = {name: np.array(column, np.int64) for name, column in numbers.items()}
    labels = np.array(values["labels"]).reshape(-1, n_fidelities, 5).transpose(2, 1, 0)
    return Columns(
        source_names=list(sources.numbers),
        split_names=list(splits.numbers),
        group_names=list(groups.numbers),
        fidelities=list(frames.fidelities),
        n_atoms=plain["n_atoms"],
        source=plain["source"],
        split=plain["split"],
        group=plain["group"],
        key=plain["key"],
        features=np.array(vectors, np.float32).reshape(-1, N_FEATURES),
        closest=np.array(values["closest"]),
        n_alone=plain["n_alone"],
        neighbors=np.array(values["neighbors"]),
        volume=np.array(values["volume"]),
        energy=labels[0],
        largest_force=labels[1],
        net_force=labels[2],
        mean_stress=labels[3],
        largest_stress=labels[4],
        element_start=np.concatenate([[0], np.cumsum(plain["n_elements"])]),
        element=np.array(element, np.uint8),
        element_count=np.array(element_count, np.int64),
    )


def _told(frames: Frames, progress: bool, what: str) -> Iterator[tuple[int, Frame, str]]:
    """Yield the frames; every ten seconds a line on stderr says how many there were, a bar on a terminal."""
    if not progress:
        yield from frames
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if console.is_terminal:
        with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as bar:
            task: Any = bar.add_task(what)
            for item in frames:
                if item[0] % 100 == 99:
                    bar.update(task, description=f"{what}: {item[0] + 1:,} frames")
                yield item
        return
    next_line = time.monotonic() + 10
    for item in frames:
        if time.monotonic() > next_line:
            print(f"{what}: {item[0]:,} frames", file=sys.stderr, flush=True)
            next_line = time.monotonic() + 10
        yield item
