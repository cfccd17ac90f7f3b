"""Fine-tuning of a part of a potential: small trained tensors beside frozen ones, and the plain weights they stand for.

An adapter is a submodule ``adapter`` of a potential. It holds, for a frozen tensor ``target``,

down, up   a low-rank update of a matrix: target + down @ up (LoRA, Hu et al. 2021, arXiv 2106.09685)
row-<i>    the row i of a tensor whose other rows stay as they are: of a fidelity, of an element

under names from which ``merged`` finds its way back. A potential never computes with its adapter: it is given the
merged weights, which are all that a release, an evaluation or the run's ``weights/`` ever hold.
"""

from collections.abc import Iterable, Mapping
from math import sqrt

import torch
from torch import Tensor, nn

PREFIX = "adapter."


class Adapter(nn.Module):
    """Trained tensors beside the frozen ones of a potential, which predicts the same at first.

    Args:
        state: name → tensor of the potential.
        low_rank: names of the matrices [n, m] that get an update of this rank, or of their shorter side.
        rows: name → rows of the tensor that are trained.
    """

    def __init__(
        self, state: Mapping[str, Tensor], low_rank: Iterable[str] = (), rank: int = 1,
        rows: Mapping[str, Iterable[int]] | None = None,
    ):  # fmt: skip
        super().__init__()
        for name in low_rank:
            matrix = state[name]
            r = min(rank, *matrix.shape)
            # With these sizes a step of Adam moves an entry of the product about as far as one of the matrix itself.
            self.register_parameter(_own(name, "down"), nn.Parameter(torch.randn(matrix.shape[0], r) / sqrt(r)))
            self.register_parameter(_own(name, "up"), nn.Parameter(torch.zeros(r, matrix.shape[1])))
        for name, chosen in (rows or {}).items():
            for row in chosen:
                self.register_parameter(_own(name, f"row-{row}"), nn.Parameter(state[name][row].detach().clone()))


def _own(target: str, kind: str) -> str:
    return f"{target.replace('.', '/')}/{kind}"  # a parameter's name has no dots


def is_adapted(state: Mapping[str, Tensor]) -> bool:
    """Return whether named tensors have those of an adapter among them."""
    return any(name.startswith(PREFIX) for name in state)


def merged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the plain weights that named weights with an adapter's stand for; differentiable in all of them.

    Without an adapter's they are returned as they are. Nothing is changed in place.
    """
    plain = {name: tensor for name, tensor in state.items() if not name.startswith(PREFIX)}
    for name, tensor in state.items():
        if not name.startswith(PREFIX):
            continue
        place, _, kind = name.removeprefix(PREFIX).rpartition("/")
        target = place.replace("/", ".")
        if kind == "down":
            plain[target] = plain[target] + tensor @ state[f"{PREFIX}{place}/up"]
        elif kind.startswith("row-"):
            index = torch.tensor([int(kind.removeprefix("row-"))], device=tensor.device)
            plain[target] = plain[target].index_copy(0, index, tensor.unsqueeze(0))
    return plain
