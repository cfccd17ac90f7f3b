"""Terms: a potential is a sum of them. Each gives atom energies; ``potential.py`` alone differentiates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from mffm.batch import Batch
from mffm.blocks import Blocks
from mffm.config.model import DensityConfig, EscnConfig, ModelConfig
from mffm.models.conditioning import Conditioning
from mffm.models.density import DensityBackbone
from mffm.models.heads import Heads

if TYPE_CHECKING:
    from mffm.models.escn import EscnBackbone


@dataclass(slots=True)
class TermOutput:
    """What a term gives.

    Attributes:
        atom_energies: [n_atoms], eV. Differentiable in the edge vectors unless ``forces`` is given.
        forces: [n_atoms, 3], eV/Å, of a term that brings its own derivatives (D3 from a library); with ``virial``.
        virial: [n_systems, 3, 3], eV, dE/dstrain.
    """

    atom_energies: Tensor
    forces: Tensor | None = None
    virial: Tensor | None = None


class Term(Protocol):
    """A part of the energy that depends on positions through edge vectors only."""

    cutoff: float

    def __call__(self, batch: Batch, edge_vectors: Tensor) -> TermOutput:
        """Return the term's energies for edge vectors [n_slots, 3]; nothing else of the geometry may be read."""
        ...


def make_backbone(config: DensityConfig | EscnConfig, avg_neighbors: float) -> "DensityBackbone | EscnBackbone":
    """Return the backbone of a configuration; fairchem is imported only for its own."""
    if isinstance(config, DensityConfig):
        return DensityBackbone(config, avg_neighbors)
    from mffm.models.escn import EscnBackbone

    return EscnBackbone(config, avg_neighbors)


class LearnedTerm(nn.Module):
    """Backbone, conditioning and heads."""

    def __init__(self, config: ModelConfig, fidelities: Sequence[str], avg_neighbors: float, scale: float):
        super().__init__()
        self.backbone = make_backbone(config.backbone, avg_neighbors)
        self.conditioning = Conditioning(config.conditioning, len(fidelities), self.backbone.sites)
        self.heads = Heads(config.heads, fidelities, self.backbone.n_features, scale)
        self.cutoff = self.backbone.cutoff

    def forward(self, batch: Batch, edge_vectors: Tensor) -> TermOutput:
        fidelity_idx = batch.fidelity_idx.index_select(0, batch.system_idx)
        features = self.backbone(batch, edge_vectors, self.conditioning(fidelity_idx))
        return TermOutput(self.heads(features, fidelity_idx, masked=isinstance(batch, Blocks)))
