"""How features become atom energies, per fidelity.

shared       one MLP for all fidelities.
independent  an MLP for each fidelity (IDLe; Messerly et al. with ``hidden: []``). Every head runs on its own atoms on
             every rank, and on none if there are none: the autograd graph, and so the order in which gradients arrive,
             is the same everywhere (otherwise ZeRO-2 silently mixes the gradients of different heads).
delta        the base fidelity's MLP plus, for each other fidelity, a correction that starts at zero.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mffm.config.model import HeadsConfig
from mffm.errors import InputError, known
from mffm.models.density import SILU_GAIN


class Mlp(nn.Module):
    """[n, widths[0]] → [n, n_outputs]; silu between layers. ``stack``: a leading axis of so many MLPs everywhere."""

    def __init__(self, widths: Sequence[int], n_outputs: int = 1, stack: int | None = None, zero_output: bool = False):
        super().__init__()
        lead = () if stack is None else (stack,)
        sizes = [*widths, n_outputs]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, (n_in, n_out) in enumerate(pairwise(sizes)):
            last = i == len(widths) - 1
            weight = torch.randn(*lead, n_in, n_out) * ((1.0 if i == 0 else SILU_GAIN) / n_in**0.5)
            if last and zero_output:  # plain zeros: a product with 0 leaves -0.0, which a sum over ranks turns into 0.0
                weight = torch.zeros_like(weight)
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(torch.zeros(*lead, n_out)))

    def members(self) -> list[list[tuple[Tensor, Tensor]]]:
        """Return for each MLP of the stack its (weight, bias) pairs; ``unbind`` gives an unused one a zero gradient."""
        layers = [
            list(zip(w.unbind(0), b.unbind(0), strict=True)) for w, b in zip(self.weights, self.biases, strict=True)
        ]
        return [list(member) for member in zip(*layers, strict=True)]


def run_mlp(layers: Sequence[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """Return an MLP's outputs [n, n_outputs] for inputs [n, width]."""
    for i, (weight, bias) in enumerate(layers):
        x = torch.addmm(bias, F.silu(x) if i else x, weight)
    return x


class Heads(nn.Module):
    """Numbers of atoms from invariant features: energies, or the coefficients of a direct head.

    Args:
        scale: outputs are multiplied by it, for all fidelities; eV for energies.
        n_outputs: numbers of an atom; None: one, without an axis of its own.

    Raises:
        InputError: the configuration names a fidelity that is not in ``fidelities``.
    """

    def __init__(
        self,
        config: HeadsConfig,
        fidelities: Sequence[str],
        n_features: int,
        scale: float,
        n_outputs: int | None = None,
    ):
        super().__init__()
        self.config = config
        self.n_outputs = n_outputs
        self.fidelities = tuple(fidelities)
        self.scale = float(scale)
        named = {*config.init_from, *config.init_from.values(), *([config.base] if config.base else [])}
        for name in sorted(named - set(fidelities)):
            raise InputError(f"model.heads names fidelity {name!r}; fidelities of this potential: {known(fidelities)}")
        widths = [n_features, *config.hidden]
        n = n_outputs or 1
        self.mlp = Mlp(widths, n, stack=len(fidelities) if config.kind == "independent" else None)
        self.correction: Mlp | None = None
        if config.kind == "delta":
            # The base has a row too, which stays unused: every per-fidelity tensor has one row for each fidelity.
            self.correction = Mlp(widths, n, stack=len(fidelities), zero_output=True)
        with torch.no_grad():
            for name, source in config.init_from.items():
                for tensor in self.mlp.parameters():
                    tensor[self.fidelities.index(name)] = tensor[self.fidelities.index(source)]

    def per_fidelity(self) -> set[str]:
        """Return the names of the parameters whose rows are fidelities."""
        stacked = {"independent": "mlp", "delta": "correction"}.get(self.config.kind)
        return {name for name, _ in self.named_parameters() if stacked and name.startswith(f"{stacked}.")}

    def forward(self, features: Tensor, fidelity_idx: Tensor, masked: bool = False) -> Tensor:
        """Return the numbers [n_atoms] or [n_atoms, n_outputs] for the fidelities [n_atoms] of the atoms.

        Args:
            masked: run every fidelity's MLP on all atoms and choose, so that no shape depends on the fidelities.
        """
        own = self._chosen if masked else self._own_rows
        if self.config.kind == "independent":
            values = own(self.mlp, features, fidelity_idx)
        else:
            values = run_mlp(list(zip(self.mlp.weights, self.mlp.biases, strict=True)), features)
        if self.correction is not None:
            assert self.config.base is not None
            skip = self.fidelities.index(self.config.base)
            values = values + own(self.correction, features, fidelity_idx, skip)
        return (values.squeeze(-1) if self.n_outputs is None else values) * self.scale

    def last_inputs(self, features: Tensor) -> Tensor:
        """Return what the last linear map of a shared head takes, for features [n_atoms, n]: [n_atoms, width]."""
        assert self.config.kind == "shared", "fold the potential to one fidelity first"
        x = features
        for weight, bias in list(zip(self.mlp.weights, self.mlp.biases, strict=True))[:-1]:
            x = F.silu(torch.addmm(bias, x, weight))
        return x

    def _own_rows(self, mlp: Mlp, features: Tensor, fidelity_idx: Tensor, skip: int | None = None) -> Tensor:
        """Return each atom's outputs of its fidelity's MLP, 0 for the fidelity ``skip``."""
        order = torch.argsort(fidelity_idx, stable=True)
        sizes = torch.bincount(fidelity_idx, minlength=len(self.fidelities)).tolist()
        outputs = [
            rows.new_zeros(len(rows), self.n_outputs or 1) if i == skip else run_mlp(layers, rows)
            for i, (layers, rows) in enumerate(
                zip(mlp.members(), features.index_select(0, order).split(sizes), strict=True)
            )
        ]
        return torch.cat(outputs).index_select(0, torch.argsort(order))

    def _chosen(self, mlp: Mlp, features: Tensor, fidelity_idx: Tensor, skip: int | None = None) -> Tensor:
        """Return what ``_own_rows`` returns."""
        own = (fidelity_idx.unsqueeze(1) == i for i in range(len(self.fidelities)))
        values = features.new_zeros(features.shape[0], self.n_outputs or 1)
        for i, (mine, layers) in enumerate(zip(own, mlp.members(), strict=True)):
            if i != skip:
                values = torch.where(mine, run_mlp(layers, features), values)
        return values

    @torch.no_grad()
    def folded(self, fidelity: str, shift: Tensor | None) -> "Heads":
        """Return a shared head with the predictions of one fidelity for features + shift [n_features].

        A correction and its base become one MLP with twice the hidden widths.
        """
        row = self.fidelities.index(fidelity)
        layers = [list(zip(self.mlp.weights, self.mlp.biases, strict=True))]
        if self.config.kind == "independent":
            layers = [self.mlp.members()[row]]
        elif self.correction is not None and fidelity != self.config.base:
            layers.append(self.correction.members()[row])
        hidden = [n * len(layers) for n in self.config.hidden]
        config = HeadsConfig(kind="shared", hidden=hidden)
        folded = Heads(config, [fidelity], layers[0][0][0].shape[0], self.scale, self.n_outputs).to(layers[0][0][0])
        n_layers = len(layers[0])
        for i, (weight, bias) in enumerate(zip(folded.mlp.weights, folded.mlp.biases, strict=True)):
            weights, biases = [mlp[i][0] for mlp in layers], [mlp[i][1] for mlp in layers]
            if n_layers == 1:
                weight.copy_(sum(weights))
                bias.copy_(sum(biases))
            elif i == 0:
                weight.copy_(torch.cat(weights, dim=1))
                bias.copy_(torch.cat(biases))
            elif i == n_layers - 1:
                weight.copy_(torch.cat(weights, dim=0))
                bias.copy_(sum(biases))
            else:
                weight.copy_(torch.block_diag(*weights))
                bias.copy_(torch.cat(biases))
            if i == 0 and shift is not None:
                bias.add_(shift.to(weight) @ weight)
        return folded
