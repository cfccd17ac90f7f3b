"""One pass over all frames: a few numbers of each, kept in columns; nothing that grows with the number of atoms."""

import sys
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mffm.data.doctor.fingerprint import N_FEATURES
from mffm.data.doctor.inputs import Frames
from mffm.data.doctor.measure import N_OF_LABELS, Measured
from mffm.keys import N_ELEMENTS


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


def scan(frames: Frames, workers: int = 1, progress: bool = False, what: str = "doctor") -> Columns:
    """Read every frame once.

    Args:
        workers: processes that read; the result does not depend on it.
        progress: tell now and then how far it is.

    Raises:
        InputError: a file that cannot be read.
    """
    sources, splits, groups = _Names(), _Names(), _Names()
    n_fidelities = len(frames.fidelities)
    numbers = {name: array("q") for name in ("n_atoms", "source", "split", "group", "key", "n_alone", "n_elements")}
    values = {name: array("d") for name in ("closest", "neighbors", "volume", "labels")}
    vectors, element, element_count = array("f"), array("B"), array("l")
    for row, found, source, places in _told(frames, workers, progress, what):
        del row
        vectors.frombytes(found.features.tobytes())
        element.extend(found.elements.tolist())
        element_count.extend(found.counts.tolist())
        for name, number in (
            ("n_atoms", found.n_atoms), ("source", sources.number(source)), ("split", splits.number(found.split)),
            ("group", groups.number(found.group)), ("key", found.key), ("n_alone", found.n_alone),
            ("n_elements", len(found.elements)),
        ):  # fmt: skip
            numbers[name].append(number)
        values["closest"].append(found.closest)
        values["neighbors"].append(found.neighbors)
        values["volume"].append(found.volume)
        labels = np.full((n_fidelities, N_OF_LABELS), np.nan)
        labels[places] = found.labels
        values["labels"].frombytes(labels.tobytes())
    plain = {name: np.array(column, np.int64) for name, column in numbers.items()}
    columns = np.array(values["labels"]).reshape(-1, n_fidelities, N_OF_LABELS).transpose(2, 1, 0)
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
        energy=columns[0],
        largest_force=columns[1],
        net_force=columns[2],
        mean_stress=columns[3],
        largest_stress=columns[4],
        element_start=np.concatenate([[0], np.cumsum(plain["n_elements"])]),
        element=np.array(element, np.uint8),
        element_count=np.array(element_count, np.int64),
    )


def _told(
    frames: Frames, workers: int, progress: bool, what: str
) -> Iterator[tuple[int, Measured, str, list[int]]]:  # fmt: skip
    """Yield what the frames are measured to be; say now and then on stderr how many there were."""
    found = frames.measured(workers)
    if not progress:
        yield from found
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if console.is_terminal:
        with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as bar:
            task: Any = bar.add_task(what)
            for item in found:
                if item[0] % 100 == 99:
                    bar.update(task, description=f"{what}: {item[0] + 1:,} frames")
                yield item
        return
    next_line = time.monotonic() + 10
    for item in found:
        if time.monotonic() > next_line:
            print(f"{what}: {item[0]:,} frames", file=sys.stderr, flush=True)
            next_line = time.monotonic() + 10
        yield item
