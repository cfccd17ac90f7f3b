"""A batch: systems packed end to end, with labels and label masks. Where data, models, loss and optim meet."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from mffm.keys import Property


@dataclass(slots=True)
class Batch:
    """Packed systems. A system is one (frame, fidelity), whatever the method.

    Edges lie in slots, an atom's side by side: a row. Rows of like length are a group and padded to the longest of it,
    so that a sum over neighbors is a dense sum over ``K`` and needs no atomics: the slots of a group are an array
    [n_rows, K]. The edge in slot ``s`` points from receiver ``i = receivers[s]`` to sender ``j = neighbors[s]``, with
    ``r_ij = x_j - x_i + shift @ cell``. Unused slots have ``neighbor_mask`` False and ``i`` itself as neighbor.
    Neighbor lists are full: the edge (j → i) has a partner (i → j) in slot ``reverse[s]``; unused slots are their own.

    Attributes:
        atomic_numbers: [n_atoms] int64.
        positions: [n_atoms, 3] in the model's dtype, Å.
        cell: [n_systems, 3, 3], rows, Å; zeros where there is no cell.
        neighbors: [n_slots] int64, sender of each edge.
        receivers: [n_slots] int64.
        neighbor_mask: [n_slots] bool.
        edge_vectors: [n_slots, 3], Å, r_ij from receiver to sender; unused slots hold (2 * cutoff, 0, 0).
        reverse: [n_slots] int64, slot of the opposite edge.
        groups: (n_rows, K) of each group; slots are groups after groups, rows after rows.
        row_of_atom: [n_atoms] int64; atoms themselves stay in the order of their systems.
        atom_of_row: [n_atoms] int64.
        system_idx: [n_atoms] int64, atom → system.
        fidelity_idx: [n_systems] int64, system → fidelity.
        n_atoms: [n_systems] int64.
        pbc: [n_systems, 3] bool.
        volume: [n_systems], Å³; 0 where the system is not periodic in three directions.
        charge: [n_systems] int64, 0 where none was given.
        spin_multiplicity: [n_systems] int64, 0 where none was given.
        labels: property → label, as in ``mffm.keys``; energy in float64, the rest in the model's dtype. Masked ones
            are 0.
        masks: property → [n_systems] bool: the label exists and the recipe uses it.
        weights: property → [n_systems], weight of this system's label in the loss.
        rows: [n_systems] int64, row in the store, for messages; -1 for a dummy system.
    """

    atomic_numbers: Tensor
    positions: Tensor
    cell: Tensor
    neighbors: Tensor
    receivers: Tensor
    neighbor_mask: Tensor
    edge_vectors: Tensor
    reverse: Tensor
    groups: tuple[tuple[int, int], ...]
    row_of_atom: Tensor
    atom_of_row: Tensor
    system_idx: Tensor
    fidelity_idx: Tensor
    n_atoms: Tensor
    pbc: Tensor
    volume: Tensor
    charge: Tensor
    spin_multiplicity: Tensor
    labels: dict[Property, Tensor]
    masks: dict[Property, Tensor]
    weights: dict[Property, Tensor]
    rows: Tensor

    @property
    def n_systems(self) -> int:
        return self.fidelity_idx.shape[0]

    @property
    def n_edges(self) -> int:
        return int(self.neighbor_mask.sum())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Return the batch on another device; dtypes stay."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pinned(self) -> Self:
        """Return the batch in page-locked memory, from which a copy to a GPU does not hold up the caller."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, function: Callable[[Tensor], Tensor]) -> Self:
        def apply(value: Any) -> Any:
            if isinstance(value, tuple | int | float):
                return value
            if isinstance(value, dict):
                return {k: function(v) for k, v in value.items()}
            return function(value)

        return type(self)(**{f.name: apply(getattr(self, f.name)) for f in fields(self)})

    def system_sums(self, x: Tensor) -> Tensor:
        """Return sums over the atoms of each system: [n_atoms, ...] → [n_systems, ...]."""
        return x.new_zeros(self.n_systems, *x.shape[1:]).index_add(0, self.system_idx, x)

    def of_systems(self, x: Tensor) -> Tensor:
        """Return what the system of each atom has: [n_systems, ...] → [n_atoms, ...]."""
        return x[self.system_idx]

    def fidelity_sums(self, x: Tensor, n_fidelities: int) -> Tensor:
        """Return sums over the systems of each fidelity: [n_systems] → [n_fidelities]."""
        return x.new_zeros(n_fidelities).index_add(0, self.fidelity_idx, x)

    def with_fidelity(self, fidelity_idx: Tensor) -> "Batch":
        """Return the same systems asked at other fidelities."""
        return replace(self, fidelity_idx=fidelity_idx)


def reference_energy(batch: Batch, table: Tensor) -> Tensor:
    """Return the energy of the element references of each system. [n_systems] float64, eV

    Args:
        table: [n_fidelities, N_ELEMENTS + 1] float64, eV. Kept in float64 and added outside of the model: all-electron
            energies are about 1e4 eV, of which float32 resolves 1 meV.
    """
    per_atom = table[batch.fidelity_idx[batch.system_idx], batch.atomic_numbers]
    return batch.system_sums(per_atom)
