"""When two structures are the same up to the order of their atoms, translation, rotation and reflection.

What is compared are distances. Of every atom the distances to its nearest atoms, by element, are sorted; the k-th ones
of all atoms of an element are sorted again. Two structures whose tables agree to a tolerance have every interatomic
distance that counts within it (sorting never makes a difference larger). A periodic structure may be given in any cell:
tables of 4 and of 8 atoms are compared with each one's rows repeated. The opposite is not proved: structures that
differ and have equal tables exist (homometric ones), but are not known among the sets that potentials are trained on.

A planar or linear structure feels a displacement out of its plane in second order: 5e-4 Å in a distance of 1.4 Å may be
0.04 Å out of plane.

``features`` are 24 numbers to find candidates by. Where no distance of two structures differs by more than d, neither
do their features nor their tables.
"""

import hashlib
from math import gcd, lcm
from typing import NamedTuple

import numpy as np

from mffm.data.neighbors import neighbor_list
from mffm.frame import Frame

SAME = 5e-4  # Å, in distances: the same structure, printed with four digits or more
NEAR = 0.02  # Å: nearly the same; thermal motion at 300 K changes the most changed distance by 0.1 Å and more
CUTOFF = 6.0  # Å, of the distances of periodic and of large structures
NEAREST = 16  # distances an atom and element of the neighbor
_ALL_PAIRS = 300  # atoms up to which a molecule's distances are all taken
_FEATURE_RANKS = (0, 1, 3, 7)
_FEATURE_CAP = 5.0  # Å
N_FEATURES = 6 * len(_FEATURE_RANKS)


class Pairs(NamedTuple):
    """Directed pairs of atoms: receiver and sender [n_pairs] int64, distance [n_pairs] in Å; sorted by receiver."""

    receiver: np.ndarray
    sender: np.ndarray
    distance: np.ndarray


def pairs(frame: Frame) -> Pairs:
    """Return every pair of a molecule, the pairs within ``CUTOFF`` of a periodic or large structure."""
    n = frame.n_atoms
    if not frame.pbc.any() and n <= _ALL_PAIRS:
        i, j = np.nonzero(~np.eye(n, dtype=bool))
        return Pairs(i, j, np.linalg.norm(frame.positions[j] - frame.positions[i], axis=1))
    i, j, shift = neighbor_list(frame.positions, frame.cell, frame.pbc, CUTOFF)
    vectors = frame.positions[j] - frame.positions[i] + shift @ frame.cell
    return Pairs(i, j, np.linalg.norm(vectors, axis=1))


def _table(receiver: np.ndarray, distance: np.ndarray, n: int, width: int, cap: float) -> np.ndarray:
    """Return the ``width`` smallest distances of each receiver [n, width], ascending, at most ``cap`` and padded by
    it.
    """
    order = np.lexsort((distance, receiver))
    receiver, distance = receiver[order], distance[order]
    start = np.searchsorted(receiver, np.arange(n))
    rank = np.arange(len(receiver)) - start[receiver]
    table = np.full((n, width), cap)
    keep = rank < width
    table[receiver[keep], rank[keep]] = np.minimum(distance[keep], cap)
    return table


def features(frame: Frame, found: Pairs) -> np.ndarray:
    """Return [N_FEATURES] float32, Å: mean and quantiles over the atoms of the distance to the 1st, 2nd, 4th and 8th
    nearest atom, at most 5 Å. A cell of twice the size has the same.
    """
    n, near = frame.n_atoms, found.distance < _FEATURE_CAP
    table = _table(found.receiver[near], found.distance[near], n, _FEATURE_RANKS[-1] + 1, _FEATURE_CAP)
    columns = np.sort(table[:, list(_FEATURE_RANKS)], axis=0)
    # Quantiles of the distribution, not between its points: those of every atom twice are the same.
    places = [0, -(-n // 4) - 1, -(-n // 2) - 1, -(-3 * n // 4) - 1, n - 1]
    return np.concatenate([columns.mean(0), columns[places].ravel()]).astype(np.float32)


def reduced(numbers: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Return the reduced composition: (atomic number, count), counts without a common divisor."""
    kinds, counts = np.unique(numbers, return_counts=True)
    divisor = gcd(*counts.tolist())
    return tuple((int(z), int(n) // divisor) for z, n in zip(kinds, counts, strict=True))


def composition_key(frame: Frame) -> int:
    """Return an int64 that structures must share to be the same: composition (reduced where fully periodic),
    periodicity, charge and spin.
    """
    kind = reduced(frame.atomic_numbers) if frame.pbc.all() else tuple(np.bincount(frame.atomic_numbers).tolist())
    content = (kind, int(frame.pbc.sum()), frame.charge or 0, frame.spin_multiplicity or 0)
    return int.from_bytes(hashlib.blake2b(repr(content).encode(), digest_size=8).digest(), "little", signed=True)


class Tables(NamedTuple):
    """What is compared of a structure: a table of sorted distances for each pair of elements, atoms and Å³ an atom."""

    tables: dict[tuple[int, int], np.ndarray]  # (center, neighbor) → [atoms of the center, ranks], columns ascending
    counts: dict[int, int]
    volume: float  # Å³ an atom; 0 where not fully periodic


def tables(frame: Frame) -> Tables:
    """Return the tables of a structure."""
    found = pairs(frame)
    z, n = frame.atomic_numbers, frame.n_atoms
    kinds, counts = np.unique(z, return_counts=True)
    whole = not frame.pbc.any() and n <= _ALL_PAIRS
    result = {}
    for b, n_b in zip(kinds.tolist(), counts.tolist(), strict=True):
        to_b = z[found.sender] == b
        width = n_b if whole else NEAREST
        cap = np.inf if whole else CUTOFF
        table = _table(found.receiver[to_b], found.distance[to_b], n, width, cap)
        table[~np.isfinite(table)] = 0.0  # an atom of b has one neighbor of b less than others
        for a in kinds.tolist():
            result[a, b] = np.sort(table[z == a], axis=0)
    sizes = dict(zip(kinds.tolist(), counts.tolist(), strict=True))
    return Tables(result, sizes, frame.volume / n if frame.pbc.all() else 0.0)


def difference(a: Tables, b: Tables) -> float:
    """Return the largest difference in Å of two structures' sorted distances; inf where their elements differ."""
    if a.tables.keys() != b.tables.keys():
        return np.inf
    worst = abs(a.volume ** (1 / 3) - b.volume ** (1 / 3))
    for key, left in a.tables.items():
        right = b.tables[key]
        if len(left) != len(right):
            if not a.volume or not b.volume:
                return np.inf
            rows = lcm(len(left), len(right))
            left, right = np.repeat(left, rows // len(left), 0), np.repeat(right, rows // len(right), 0)
        worst = max(worst, float(np.abs(left - right).max(initial=0.0)))
    return worst
