"""When two structures are the same: same elements in the same order, same periodicity, every atom within 1e-3 Å.

Rounding coordinates cannot decide that: two copies that differ by 1e-8 Å may round apart. So a structure is looked up
by random projections of its coordinates, in the bin they fall into and in the neighbouring bins that they come close
to, and the few candidates found there are compared atom by atom. Periodic coordinates enter through sine and cosine,
so that an atom wrapped into the cell by one code and left outside by another is the same atom.
"""

import hashlib
from itertools import product

import numpy as np

from mffm.data.records import Geometry

SAME_WITHIN = 1e-3  # Å
_N_PROJECTIONS = 6
_BIN = 0.02  # Å; thermal motion of 0.1 Å makes 5^6 bins a composition
# A projection's noise is at most the rms displacement (times a normal number): 3 sigma of the largest that counts as
# the same.
_MARGIN = 3 * SAME_WITHIN
_coefficients = np.zeros((_N_PROJECTIONS, 0))


def digest16(text: str) -> bytes:
    """Return what an index has instead of a name: 16 bytes."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def complete_cell(cell: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """Return a cell [3, 3] that can be inverted: directions that are not periodic become unit vectors normal to the
    rest.
    """
    if not pbc.any():
        return np.eye(3)
    if pbc.all():
        return np.asarray(cell)
    rows = cell[pbc]
    _, _, basis = np.linalg.svd(rows)
    full = np.array(cell, np.float64)
    full[~pbc] = basis[len(rows) :]
    return full


def _features(positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """Return numbers in Å that change smoothly with every coordinate and not with wrapping."""
    if not pbc.any():
        return positions.ravel()
    full = complete_cell(cell, pbc)
    length = np.sqrt((full * full).sum(1))
    fractional = positions @ np.linalg.inv(full)
    angle = 2 * np.pi * fractional[:, pbc]
    scale = length[pbc] / (2 * np.pi)
    return np.concatenate(
        [
            (np.cos(angle) * scale).ravel(),
            (np.sin(angle) * scale).ravel(),
            (fractional * length)[:, ~pbc].ravel(),
            full[pbc].ravel(),
        ]
    )


def _projections(n: int) -> np.ndarray:
    global _coefficients
    if _coefficients.shape[1] < n:
        # Columns are drawn one by one, so that a longer table begins with the shorter one.
        size = max(256, 1 << (n - 1).bit_length())
        _coefficients = np.random.default_rng(20_261_121).standard_normal((size, _N_PROJECTIONS)).T.copy()
    return _coefficients[:, :n]


def lookup_keys(numbers: np.ndarray, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> list[bytes]:
    """Return the 16-byte keys under which a structure may be found; the first is the one it is filed under."""
    features = _features(positions, cell, pbc)
    scaled = _projections(len(features)) @ features / (np.sqrt(len(features)) * _BIN)
    own = np.floor(scaled).astype(np.int64)
    inside = scaled - own
    margin = _MARGIN / _BIN
    options = [
        (q, q - 1) if low else (q, q + 1) if high else (q,)
        for q, low, high in zip(own.tolist(), (inside < margin).tolist(), (inside > 1 - margin).tolist(), strict=True)
    ]
    head = hashlib.blake2b(np.ascontiguousarray(numbers, np.uint8).tobytes() + bytes(pbc), digest_size=16)
    keys = []
    for bins in product(*options):
        digest = head.copy()
        digest.update(repr(bins).encode())
        keys.append(digest.digest())
    return keys


def geometry_hash(
    numbers: np.ndarray, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, charge: int | None = None
) -> bytes:
    """Return 16 bytes that name a structure (coordinates rounded to 1e-3 Å); splits are drawn by it."""
    digest = hashlib.blake2b(np.ascontiguousarray(numbers, np.uint8).tobytes(), digest_size=16)
    digest.update(np.rint(positions / SAME_WITHIN).astype("<i8").tobytes())
    if pbc.any():
        digest.update(bytes(np.asarray(pbc, np.uint8)) + np.rint(cell / SAME_WITHIN).astype("<i8").tobytes())
    if charge:
        digest.update(str(charge).encode())
    return digest.digest()


def same_geometry(a: Geometry, b: Geometry) -> bool:
    """Return whether two structures are the same within ``SAME_WITHIN``, periodic images included."""
    numbers, positions, cell, pbc = a
    if len(numbers) != len(b[0]) or not np.array_equal(numbers, b[0]) or not np.array_equal(pbc, b[3]):
        return False
    if np.abs(cell[pbc] - b[2][pbc]).max(initial=0.0) > SAME_WITHIN:
        return False
    delta = b[1] - positions
    if pbc.any():
        full = complete_cell(cell, pbc)
        fractional = delta @ np.linalg.inv(full)
        fractional[:, pbc] -= np.rint(fractional[:, pbc])
        delta = fractional @ full
    return bool((delta * delta).sum(1).max(initial=0.0) <= SAME_WITHIN**2)
