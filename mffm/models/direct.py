"""Direct heads: forces, and stress, straight from features. They are no gradient of the energy: not conservative.

An atom's force is Σ_c a_c V_c: its degree-1 features V, weighted by coefficients a that an MLP makes of its invariant
features, per fidelity as the energy heads are. Its share of the virial is made alike: a number, and a traceless
symmetric matrix from degree 2. Both turn and mirror with the atoms.
"""

from collections.abc import Sequence
from math import sqrt

import numpy as np
import torch
from torch import Tensor, nn

from mffm.batch import Batch
from mffm.config.model import DirectConfig, HeadsConfig
from mffm.models.angular import Constant, coupling
from mffm.models.heads import Heads


class DirectHeads(nn.Module):
    """Forces and virials from features by degree.

    Args:
        heads: kind and widths of the energy heads, which these have too.
        scale: eV/Å, and eV of a virial; the root mean square force, say.
    """

    def __init__(
        self, config: DirectConfig, heads: HeadsConfig, fidelities: Sequence[str], n_features: int, scale: float
    ):
        super().__init__()
        self._zero_net_force = config.zero_net_force
        per_channel = scale / sqrt(n_features)
        self.forces = Heads(heads, fidelities, n_features, per_channel, n_features)
        self.stress: Heads | None = None
        if config.stress:
            self.stress = Heads(heads, fidelities, n_features, per_channel, n_features + 1)
            self._matrices = Constant(np.ascontiguousarray(coupling(1, 1, 2).reshape(9, 5).T))

    def per_fidelity(self) -> set[str]:
        """Return the names of the parameters whose rows are fidelities."""
        return {
            f"{part}.{name}"
            for part, heads in self.named_children()
            if isinstance(heads, Heads)
            for name in heads.per_fidelity()
        }

    def forward(self, features: list[Tensor], fidelity_idx: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return forces [n_atoms, 3], eV/Å, and the virial dE/dstrain [n_systems, 3, 3], eV, if there is a head for it.

        Args:
            features: of degrees 0 to 1, or 2 with a stress head.
            fidelity_idx: [n_atoms].
        """
        invariant = features[0][0]
        forces = (features[1] * self.forces(invariant, fidelity_idx)).sum(-1).t()
        if self._zero_net_force:
            net = batch.system_sums(forces)
            forces = forces - batch.of_systems(net / batch.n_atoms.unsqueeze(1).to(net))
        if self.stress is None:
            return forces, None
        coefficients = self.stress(invariant, fidelity_idx)
        traceless = (features[2] * coefficients[:, :-1]).sum(-1).t() @ self._matrices.like(invariant)
        unit = torch.eye(3, dtype=invariant.dtype, device=invariant.device).flatten()
        shares = traceless + coefficients[:, -1:] * unit
        return forces, batch.system_sums(shares).view(-1, 3, 3)

    def load_folded(self, other: "DirectHeads", fidelity: str, shift: Tensor | None) -> None:
        """Take the weights of one fidelity of other heads, for features + shift [n_features]."""
        for mine, theirs in ((self.forces, other.forces), (self.stress, other.stress)):
            if mine is not None and theirs is not None:
                mine.load_state_dict(theirs.folded(fidelity, shift).state_dict())
