"""Terms: a potential is a sum of them. Each gives atom energies; ``potential.py`` alone differentiates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from mffm.batch import Batch
from mffm.blocks import Blocks
from mffm.config.foreign import SevennetConfig
from mffm.config.model import DensityConfig, EscnConfig, ModelConfig
from mffm.models.conditioning import Conditioning
from mffm.models.density import DensityBackbone
from mffm.models.direct import DirectHeads
from mffm.models.heads import Heads

if TYPE_CHECKING:
    from mffm.models.escn import EscnBackbone
    from mffm.models.foreign import SevennetBackbone


@dataclass(slots=True)
class TermOutput:
    """What a term gives.

    Attributes:
        atom_energies: [n_atoms], eV. Differentiable in the edge vectors unless ``forces`` is given.
        forces: [n_atoms, 3], eV/Å, of a term that brings its own.
        virial: [n_systems, 3, 3], eV, dE/dstrain; with ``forces``, if the term has a stress.
    """

    atom_energies: Tensor
    forces: Tensor | None = None
    virial: Tensor | None = None


class Term(Protocol):
    """A part of the energy. What is differentiated depends on positions through edge vectors only.

    Attributes:
        cutoff: Å.
        own_derivatives: it brings its own forces, which nothing differentiates: direct heads, a library's.
    """

    cutoff: float
    own_derivatives: bool

    def __call__(self, batch: Batch, edge_vectors: Tensor) -> TermOutput:
        """Return the term's energies for edge vectors [n_slots, 3].

        Nothing else of the geometry may be read, but by a term with derivatives of its own.
        """
        ...


def make_backbone(
    config: DensityConfig | EscnConfig | SevennetConfig, avg_neighbors: float, l_out: int = 0
) -> "DensityBackbone | EscnBackbone | SevennetBackbone":
    """Return the backbone of a configuration; fairchem and sevenn are imported only for their own."""
    if isinstance(config, DensityConfig):
        return DensityBackbone(config, avg_neighbors, l_out)
    if isinstance(config, SevennetConfig):
        from mffm.models.foreign import SevennetBackbone

        return SevennetBackbone(config, avg_neighbors, l_out)
    from mffm.models.escn import EscnBackbone

    return EscnBackbone(config, avg_neighbors, l_out)


class LearnedTerm(nn.Module):
    """Backbone, conditioning and heads."""

    def __init__(self, config: ModelConfig, fidelities: Sequence[str], avg_neighbors: float, scale: float):
        super().__init__()
        self.own_derivatives = config.forces == "direct"
        l_out = 0 if not self.own_derivatives else 2 if config.direct.stress else 1
        self.backbone = make_backbone(config.backbone, avg_neighbors, l_out)
        self.conditioning = Conditioning(config.conditioning, len(fidelities), self.backbone.sites)
        width = self.backbone.n_features
        self.heads = Heads(config.heads, fidelities, width, scale)
        self.direct_heads: DirectHeads | None = None
        if self.own_derivatives:
            self.direct_heads = DirectHeads(config.direct, config.heads, fidelities, width, scale)
        self.cutoff = self.backbone.cutoff

    def forward(self, batch: Batch, edge_vectors: Tensor) -> TermOutput:
        fidelity_idx = batch.fidelity_idx.index_select(0, batch.system_idx)
        modulations, masked = self.conditioning(fidelity_idx), isinstance(batch, Blocks)
        if self.direct_heads is None:
            return TermOutput(self.heads(self.backbone(batch, edge_vectors, modulations), fidelity_idx, masked))
        features = self.backbone.features(batch, edge_vectors, modulations)
        forces, virial = self.direct_heads(features, fidelity_idx, batch)
        return TermOutput(self.heads(features[0][0], fidelity_idx), forces, virial)

    def per_fidelity(self) -> set[str]:
        """Return the names of the parameters whose rows are fidelities."""
        names = {f"conditioning.{name}" for name in self.conditioning.per_fidelity()}
        names |= {f"heads.{name}" for name in self.heads.per_fidelity()}
        if self.direct_heads is not None:
            names |= {f"direct_heads.{name}" for name in self.direct_heads.per_fidelity()}
        return names
