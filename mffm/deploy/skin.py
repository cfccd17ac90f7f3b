"""Neighbor lists kept between the steps of a trajectory: the list within cutoff and skin, filtered each time."""

import numpy as np

from mffm.data.neighbors import NeighborList, neighbor_list


class SkinList:
    """The neighbor list of one structure that moves; exactly the edges that a new list would have, in the same order.

    It is made anew when an atom has moved by more than half of what the skin leaves (Verlet 1967), when the cell has
    changed by more than the skin allows for, and for other atoms.

    Args:
        cutoff: Å. skin: Å; 0 makes every list anew.
    """

    def __init__(self, cutoff: float, skin: float):
        self.cutoff, self.skin = cutoff, skin
        self.n_made = 0
        self._kept: tuple[np.ndarray, np.ndarray, np.ndarray, NeighborList] | None = None

    def of(self, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> NeighborList:
        """Return the list within the cutoff; arguments and errors as those of ``neighbor_list``."""
        if self.skin == 0:
            self.n_made += 1
            return neighbor_list(positions, cell, pbc, self.cutoff)
        if not self._holds(positions, cell, pbc):
            receiver, sender, shift = neighbor_list(positions, cell, pbc, self.cutoff + self.skin)
            order = np.lexsort((shift[:, 2], shift[:, 1], shift[:, 0], sender, receiver))
            kept = receiver[order], sender[order], shift[order]
            self._kept = positions.copy(), cell.copy(), pbc.copy(), kept
            self.n_made += 1
        assert self._kept is not None
        receiver, sender, shift = self._kept[3]
        vectors = positions[sender] - positions[receiver]
        if pbc.any():
            vectors += shift @ cell
        near = np.einsum("ij,ij->i", vectors, vectors) < self.cutoff**2
        return receiver[near], sender[near], shift[near]

    def _holds(self, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> bool:
        """Tell whether every pair within the cutoff is in the kept list.

        A pair was at r0 = x_j - x_i + S C and is at r = r0 + d_j - d_i + S (C' - C). Where the cell has changed, the
        displacements are measured from the atoms moved along with it: r = r0 F + e_j - e_i with F = C⁻¹ C', so that
        |r0| ≤ (|r| + 2 max|e|) / σ_min(F).
        """
        if self._kept is None:
            return False
        old_positions, old_cell, old_pbc, _ = self._kept
        if len(positions) != len(old_positions) or not np.array_equal(pbc, old_pbc):
            return False
        shrinks = 1.0
        if pbc.any() and not np.array_equal(cell, old_cell):
            if not (pbc.all() and np.isfinite(cell).all()):  # C may be singular, and a new list says what is wrong
                return False
            strain = np.linalg.solve(old_cell, cell)
            shrinks = float(np.linalg.svd(strain, compute_uv=False).min())
            old_positions = old_positions @ strain
        moved = float(np.sqrt(np.square(positions - old_positions).sum(axis=1).max()))
        return self.cutoff + 2 * moved < shrinks * (self.cutoff + self.skin)
