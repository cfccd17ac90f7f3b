"""Neighbor lists: one structure's full list by vesin, and a batch's list in padded rows (see ``mffm.batch``)."""

import threading
from typing import Any, NamedTuple

import numpy as np

from mffm.errors import InputError

NeighborList = tuple[np.ndarray, np.ndarray, np.ndarray]  # receiver, sender [n_edges], shift [n_edges, 3]

_local = threading.local()  # vesin's object keeps its buffers between calls, so a thread needs one of its own


def neighbor_list(positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float) -> NeighborList:
    """Return every directed pair closer than ``cutoff``, images of an atom with itself included, sorted by receiver.

    Args:
        positions: [n_atoms, 3], Å; atoms may lie outside the cell.
        cell: [3, 3], rows, Å; rows of directions that are not periodic are not used and may be zero.
        pbc: [3] bool, any subset of the three directions.
        cutoff: Å; a pair at exactly the cutoff is left out.

    Returns:
        receiver [n_edges] int64, sender [n_edges] int64, shift [n_edges, 3] int64;
        ``r_ij = x_j - x_i + shift @ cell``.

    Raises:
        InputError: the vectors of the periodic directions do not span a cell.
    """
    pbc = np.ascontiguousarray(pbc, dtype=bool)
    cell = np.ascontiguousarray(cell, dtype=np.float64)
    if pbc.any():
        check_cell(cell, pbc)
    receiver, sender, shift = _calculator(cutoff).compute(
        np.ascontiguousarray(positions, dtype=np.float64), cell, pbc, "ijS"
    )
    return receiver.astype(np.int64), sender.astype(np.int64), shift.astype(np.int64)


def count(positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float) -> int:
    """Return the number of directed edges of the full list, as ``neighbor_list`` would give it."""
    pbc = np.ascontiguousarray(pbc, dtype=bool)
    cell = np.ascontiguousarray(cell, dtype=np.float64)
    if pbc.any():
        check_cell(cell, pbc)
    (sender,) = _calculator(cutoff).compute(
        np.ascontiguousarray(positions, dtype=np.float64), cell, pbc, "j", copy=False
    )
    return len(sender)


def _calculator(cutoff: float) -> Any:
    """Return this thread's vesin calculator. vesin imports torch where it finds it, hence only on first use."""
    calculator = getattr(_local, "calculator", None)
    if calculator is None or calculator.cutoff != float(cutoff):
        import vesin

        calculator = vesin.NeighborList(cutoff=float(cutoff), full_list=True, sorted=True, n_threads=1)
        _local.calculator = calculator
    return calculator


def check_cell(cell: np.ndarray, pbc: np.ndarray) -> None:
    """Raise InputError where the vectors of the periodic directions (at least one) do not span a cell."""
    vectors = cell[pbc]
    gram = vectors @ vectors.T
    lengths = np.sqrt(np.diagonal(gram))
    # Volume (area, length) relative to that of a right-angled cell; below 1e-6 the images needed are without bound.
    if not np.isfinite(cell).all() or lengths.min() < 1e-6 or np.linalg.det(gram) < (1e-6 * lengths.prod()) ** 2:
        raise InputError(
            f"cell {cell.tolist()} does not span the periodic directions {pbc.tolist()}; "
            "give the cell vectors of every periodic direction, or set pbc to false there"
        )


def opposite_edges(receiver: np.ndarray, sender: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Return for each edge (i, j, S) the index of its opposite (j, i, -S) in the same full list.

    Args:
        receiver, sender: [n_edges] int64, indices may run over a whole batch.
        shift: [n_edges, 3] int.

    Returns:
        [n_edges] int64.
    """
    n_edges = len(receiver)
    opposite = np.empty(n_edges, np.int64)
    if n_edges == 0:
        return opposite
    # An edge and its opposite get the same key, so that after one sort the two lie side by side.
    reach = int(np.abs(shift).max())
    base = 2 * reach + 1
    n_codes = base**3
    n_nodes = int(max(receiver.max(), sender.max())) + 1
    code = ((shift[:, 0] + reach) * base + (shift[:, 1] + reach)) * base + (shift[:, 2] + reach)
    negative = (n_codes - 1) - code  # the code of -S
    code = np.where(receiver < sender, code, np.where(receiver > sender, negative, np.maximum(code, negative)))
    low, high = np.minimum(receiver, sender), np.maximum(receiver, sender)
    if n_nodes**2 * n_codes < 2**63:
        order = np.argsort((low * n_nodes + high) * n_codes + code)
    else:
        order = np.lexsort((code, high, low))
    first, second = order[0::2], order[1::2]
    assert n_edges % 2 == 0
    assert np.array_equal(receiver[first], sender[second])
    assert np.array_equal(shift[first], -shift[second])
    opposite[first], opposite[second] = second, first
    return opposite


class Slots(NamedTuple):
    """A full neighbor list in padded rows; the fields are those of ``mffm.batch.Batch``."""

    neighbors: np.ndarray
    receivers: np.ndarray
    neighbor_mask: np.ndarray
    edge_vectors: np.ndarray
    reverse: np.ndarray
    groups: tuple[tuple[int, int], ...]
    row_of_atom: np.ndarray
    atom_of_row: np.ndarray


MAX_GROUPS = 4
WORTH = 0.95  # a further group must bring the slots below this share: each is a further, smaller matrix product


def row_groups(n_neighbors: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Return the split of rows, sorted by falling length, into groups (n_rows, K) that needs the fewest slots.

    Exact for each number of groups (dynamic programming over the distinct lengths).

    Args:
        n_neighbors: [n_atoms] int, in any order.
    """
    lengths, n_rows = np.unique(np.maximum(n_neighbors, 1), return_counts=True)
    lengths, n_rows = lengths[::-1], n_rows[::-1]
    ends = np.concatenate([[0], np.cumsum(n_rows)])
    n = len(lengths)
    # slots of a group of the lengths first:last; what is not a group costs more than anything
    single = np.where(
        np.arange(n)[:, None] <= np.arange(n),
        lengths[:, None] * (ends[1:] - ends[:-1, None]),
        ends[-1] * lengths[0] + 1,
    )
    best, cuts = [single[0]], []
    for _ in range(min(MAX_GROUPS, n) - 1):
        total = best[-1][:-1, None] + single[1:]  # the last group begins after the length of the row
        cuts.append(total.argmin(0))
        best.append(total.min(0))
    chosen = 0
    for i in range(1, len(best)):
        if best[i][-1] < WORTH * best[chosen][-1]:
            chosen = i
    last, groups = n - 1, []
    for i in range(chosen, 0, -1):
        first = int(cuts[i - 1][last]) + 1
        groups.append((int(ends[last + 1] - ends[first]), int(lengths[first])))
        last = first - 1
    groups.append((int(ends[last + 1]), int(lengths[0])))
    return tuple(reversed(groups))


def pad(
    receiver: np.ndarray, sender: np.ndarray, shift: np.ndarray, vectors: np.ndarray, n_atoms: int, cutoff: float
) -> Slots:
    """Return a full neighbor list in padded rows; an atom without neighbors has a row of one unused slot.

    Args:
        receiver, sender: [n_edges] int64, sorted by receiver; indices run over the batch.
        shift: [n_edges, 3] int, lattice shift of the sender; tells the images of one pair apart.
        vectors: [n_edges, 3] float, Å.
        n_atoms: atoms of the batch.
        cutoff: Å; unused slots hold the vector (2 * cutoff, 0, 0).
    """
    n_edges = len(receiver)
    n_neighbors = np.bincount(receiver, minlength=n_atoms)
    groups = row_groups(n_neighbors)
    atom_of_row = np.arange(n_atoms)
    if len(groups) > 1:
        atom_of_row = np.argsort(-n_neighbors, kind="stable")
    row_of_atom = np.empty(n_atoms, np.int64)
    row_of_atom[atom_of_row] = np.arange(n_atoms)
    widths = np.repeat([k for _, k in groups], [n for n, _ in groups])
    n_slots = int(widths.sum())
    first_slot = (np.cumsum(widths) - widths)[row_of_atom]
    first_edge = np.cumsum(n_neighbors) - n_neighbors
    slot = first_slot[receiver] + (np.arange(n_edges) - first_edge[receiver])

    receivers = np.repeat(atom_of_row, widths)
    neighbors = receivers.copy()
    mask = np.zeros(n_slots, bool)
    edge_vectors = np.zeros((n_slots, 3), vectors.dtype)
    reverse = np.arange(n_slots)
    edge_vectors[:, 0] = 2 * cutoff
    neighbors[slot] = sender
    mask[slot] = True
    edge_vectors[slot] = vectors
    reverse[slot] = slot[opposite_edges(receiver, sender, shift)]
    return Slots(neighbors, receivers, mask, edge_vectors, reverse, groups, row_of_atom, atom_of_row)
