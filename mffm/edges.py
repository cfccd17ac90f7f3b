"""A batch of one system whose edges are a plain list: any list, in any order, with no partner for an edge.

Foreign codes give such lists: atoms at the rim of a domain have no edges of their own there. Nothing of it depends on
the numbers of atoms and edges, so that a tracer may leave both open.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from mffm.batch import Batch


@dataclass(slots=True)
class Edges(Batch):
    """One system. ``edge_vectors`` [n_edges, 3], ``receivers`` and ``neighbors`` [n_edges] are the list.

    The fields of the padded rows, and those that only labels need, are empty.

    Attributes:
        exchange: [n_atoms, width] → the same with the rows of ghost atoms taken from their owners, differentiable;
            between the layers of a backbone, where the edges of ghost atoms are not all there. None: they are.
    """

    exchange: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def make(
        cls,
        edge_vectors: Tensor,
        atomic_numbers: Tensor,
        edge_index: Tensor,
        charge: int = 0,
        spin_multiplicity: int = 0,
    ) -> Self:
        """Return the batch of a list.

        Args:
            edge_vectors: [n_edges, 3], Å, r_ij = x_j - x_i.
            atomic_numbers: [n_atoms] int64.
            edge_index: [2, n_edges] int64, receivers i, then senders j.
        """
        one = torch.zeros_like(atomic_numbers[:1])
        empty = atomic_numbers[:0]
        receivers, neighbors = edge_index.unbind(0)
        return cls(
            atomic_numbers=atomic_numbers, positions=edge_vectors[:0], cell=edge_vectors.new_zeros(1, 3, 3),
            neighbors=neighbors, receivers=receivers, neighbor_mask=empty, edge_vectors=edge_vectors, reverse=empty,
            groups=(), row_of_atom=empty, atom_of_row=empty, system_idx=torch.zeros_like(atomic_numbers),
            fidelity_idx=one, n_atoms=one + atomic_numbers.shape[0], pbc=empty, volume=edge_vectors.new_zeros(1),
            charge=one + charge, spin_multiplicity=one + spin_multiplicity, labels={}, masks={}, weights={}, rows=one,
        )  # fmt: skip

    def with_ghosts(self, h: list[Tensor]) -> list[Tensor]:
        """Return features by degree, [2l + 1, n_atoms, C], with those of ghost atoms from their owners."""
        if self.exchange is None:
            return h
        rows = torch.cat(h).transpose(0, 1)
        found = self.exchange(rows.flatten(1).contiguous()).view_as(rows).transpose(0, 1)
        return list(found.split([len(x) for x in h]))

    def atom_sums(self, x: Tensor, ends: Tensor) -> Tensor:
        """Return for each atom the sum over the edges of which it is the end: [n_edges, C] → [n_atoms, C].

        Args:
            ends: ``receivers`` or ``neighbors``.
        """
        return x.new_zeros(self.atomic_numbers.shape[0], *x.shape[1:]).index_add(0, ends, x)
