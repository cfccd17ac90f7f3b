"""The edge form as a module without checks and without branches on values: what is traced."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mffm.edges import Edges
from mffm.models.potential import Potential


class EdgeValues(NamedTuple):
    """What the edge form gives.

    Attributes:
        energy: [] float64, eV, the sum of ``energies`` over the atoms of the mask, with element references.
        energies: [n_atoms] float64, eV, of every atom of the list; those whose edges are not all there mean nothing.
        gradient: [n_edges, 3], eV/Å, d energy / d rij.
    """

    energy: Tensor
    energies: Tensor
    gradient: Tensor


class EdgeForm(nn.Module):
    """A potential of one fidelity in edge form.

    Args:
        potential: folded, in eval mode.
        references: [N_ELEMENTS + 1] float64, eV; NaN where there is none.
        charge, spin_multiplicity: of the system, 0 where not given.
    """

    def __init__(self, potential: Potential, references: Tensor, charge: int = 0, spin_multiplicity: int = 0):
        super().__init__()
        self.potential = potential
        self.register_buffer("references", references)
        self.charge, self.spin_multiplicity = charge, spin_multiplicity

    def forward(
        self,
        rij: Tensor,
        z: Tensor,
        edge_index: Tensor,
        mask: Tensor,
        exchange: Callable[[Tensor], Tensor] | None = None,
    ) -> EdgeValues:
        """Return energies and derivatives.

        Args:
            rij: [n_edges, 3] in the potential's dtype, Å, x_j - x_i.
            z: [n_atoms] int64, atomic numbers.
            edge_index: [2, n_edges] int64: i, whose neighbor j is, then j.
            mask: [n_atoms] bool: whose energies count.
            exchange: see ``Edges``.
        """
        batch = Edges.make(rij, z, edge_index, self.charge, self.spin_multiplicity)
        batch.exchange = exchange
        interaction, gradient = self.potential.edge_gradient(batch, mask)
        assert isinstance(self.references, Tensor)
        energies = interaction.to(torch.float64) + self.references.index_select(0, z)
        return EdgeValues(torch.where(mask, energies, 0.0).sum(), energies, gradient)
