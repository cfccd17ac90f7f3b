"""What is kept of each frame: a few numbers, nothing that grows with the number of atoms. Runs in any process."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ase.data import covalent_radii

from mffm.data.doctor.fingerprint import composition_key, features, pairs
from mffm.frame import Frame
from mffm.keys import N_ELEMENTS, PROPERTIES

SIGHT = 6.0  # Å: an atom without another one within it is alone to a potential of that cutoff
NEIGHBORS_WITHIN = 5.0  # Å, of the neighbor counts
N_OF_LABELS = 5
_RADII = np.where(np.isfinite(covalent_radii), covalent_radii, 1.5)
_RADII = np.concatenate([_RADII, np.full(max(0, N_ELEMENTS + 1 - len(_RADII)), 1.5)])


class Measured(NamedTuple):
    """Numbers of one frame; ``mffm.data.doctor.scan.Columns`` says what they are."""

    n_atoms: int
    key: int
    features: np.ndarray  # [N_FEATURES] float32
    closest: float
    n_alone: int
    neighbors: float
    volume: float
    elements: np.ndarray  # atomic numbers that occur
    counts: np.ndarray  # of their atoms
    labels: (
        np.ndarray
    )  # [fidelities, N_OF_LABELS]: energy, largest and net force, mean and largest stress; NaN: missing
    group: str
    split: str


def measure(frame: Frame, fidelities: Sequence[str]) -> Measured:
    """Return the numbers of a frame; its labels in the order of ``fidelities``."""
    elements, counts = np.unique(frame.atomic_numbers, return_counts=True)
    return Measured(
        frame.n_atoms,
        composition_key(frame),
        *_of_pairs(frame),
        frame.volume / frame.n_atoms if frame.pbc.all() else 0.0,
        elements,
        counts,
        np.array([_of_labels(frame, fidelity) for fidelity in fidelities]).reshape(-1, N_OF_LABELS),
        frame.group,
        frame.split,
    )


def _of_pairs(frame: Frame) -> tuple[np.ndarray, float, int, float]:
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


def _of_labels(frame: Frame, fidelity: str) -> tuple[float, float, float, float, float]:
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
