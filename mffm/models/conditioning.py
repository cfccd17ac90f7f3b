"""How the fidelity enters the backbone: a scale and a shift of scalar features at the sites that the backbone names.

Kinds:

onehot      SevenNet-MF (Kim et al. 2025): a one-hot of the fidelity concatenated to the scalar input of the linear maps
            before and after each convolution and of the output block. Since a one-hot reaches only scalar outputs, that
            is a bias per fidelity on the scalars behind these maps, and is stored as such.
embedding   a learned vector per fidelity, through a linear map added into the scalars of every node update.
film        the same vector gives a scale and a shift of the scalars of every node update.

Every kind acts on the output of a linear map with a bias, so one fidelity folds into a plain backbone exactly.
"""

from collections.abc import Mapping
from math import sqrt

import torch
from torch import Tensor, nn

from mffm.config.model import ConditioningConfig

# "system": where a backbone mixes what belongs to a whole system
SITES = {
    "onehot": ("send", "receive", "system", "output"),
    "embedding": ("update", "system"),
    "film": ("update", "system"),
}


class Conditioning(nn.Module):
    """Modulations of a backbone's sites, per fidelity.

    Args:
        sites: name → width, as the backbone declares them.

    Attributes:
        sites: those of this kind, in the order of the columns.
    """

    def __init__(self, config: ConditioningConfig, n_fidelities: int, sites: Mapping[str, int]):
        super().__init__()
        self.config = config
        self.n_fidelities = n_fidelities
        places = SITES.get(config.kind, ())
        self.sites = {name: width for name, width in sites.items() if name.rpartition(".")[2] in places}
        total = sum(self.sites.values())
        self.table: nn.Parameter | None = None
        self.linear: nn.Parameter | None = None
        if config.kind == "onehot":
            # e3nn scales a one-hot's weights by the width of the whole input; of the order of the output's here.
            self.table = nn.Parameter(torch.randn(n_fidelities, total) / sqrt(max(self.sites.values())))
        elif config.kind != "none":
            outputs = total * (2 if config.kind == "film" else 1)
            self.table = nn.Parameter(torch.randn(n_fidelities, config.dim))
            self.linear = nn.Parameter(torch.randn(config.dim, outputs) / sqrt(config.dim))
        if self.table is not None and config.zero_init:
            nn.init.zeros_(self.table)

    def per_fidelity(self) -> set[str]:
        """Return the names of the parameters whose rows are fidelities."""
        return set() if self.table is None else {"table"}

    def forward(self, fidelity_idx: Tensor) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """Return site → (scale, shift), each None or [n_atoms, width], for the fidelities [n_atoms] of the atoms."""
        if self.table is None:
            return {}
        rows = self.table if self.linear is None else self.table @ self.linear
        # A product with the one-hot is a gather whose gradient needs no atomics.
        known = torch.arange(self.n_fidelities, device=fidelity_idx.device)
        values = (fidelity_idx.unsqueeze(-1) == known).to(rows.dtype) @ rows
        widths = list(self.sites.values())
        if self.config.kind == "film":
            parts = values.split(widths + widths, dim=-1)
            pairs = zip(parts[: len(widths)], parts[len(widths) :], strict=True)
            return dict(zip(self.sites, pairs, strict=True))
        return {name: (None, shift) for name, shift in zip(self.sites, values.split(widths, dim=-1), strict=True)}
