"""Couplings as one operation against plain torch, to second order."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mffm.models.couple import Couplings, Parts, SquareCouplings, places

OUT, FIRST, SECOND = [(1, 2), (2, 1)], [(1, 1), (2, 1)], [(2, 2)]
N, CHANNELS = 2, 2


def features(parts: Parts) -> list[Tensor]:
    return [torch.randn(m, N, p * CHANNELS, dtype=torch.float64, requires_grad=True) for m, p in parts]


def packed(tensors: list[Tensor], parts: Parts) -> Tensor:
    """The rows, [rows, N, CHANNELS]."""
    return torch.stack([tensors[i][m].unflatten(-1, (-1, CHANNELS))[:, p] for i, m, p in places(parts)])


def sparse(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=shape) * (rng.random(shape) < 0.5)


@pytest.mark.parametrize("kind", ["product", "square", "map"])
def test_couplings_and_their_derivatives(kind: str) -> None:
    x, y = features(FIRST), features(SECOND)
    tensor = sparse(4, 3, {"product": 4, "square": 3, "map": 1}[kind])
    tensor[2] = 0
    t = torch.tensor(tensor)
    if kind == "product":
        couplings, arguments = Couplings(tensor, OUT, FIRST, SECOND), [*x, *y]
        expected = torch.einsum("oab,anc,bnc->onc", t, packed(x, FIRST), packed(y, SECOND))
    elif kind == "square":
        couplings, arguments = SquareCouplings(tensor, OUT, FIRST), x
        expected = torch.einsum("oab,anc,bnc->onc", t, packed(x, FIRST), packed(x, FIRST))
    else:
        couplings, arguments = Couplings(tensor, OUT, FIRST), x
        expected = torch.einsum("oab,anc->onc", t, packed(x, FIRST))

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(couplings(tensors[: len(FIRST)], tensors[len(FIRST) :]))

    z = list(function(*arguments))
    assert [tuple(part.shape) for part in z] == [(m, N, p * CHANNELS) for m, p in OUT]
    torch.testing.assert_close(packed(z, OUT), expected)
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)
