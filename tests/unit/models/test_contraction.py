"""The hand-written operations against plain torch, to second order."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mffm.models.contraction import Bilinear, Square, gather_senders, sum_over_sent


@pytest.fixture
def indices(kit: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
    batch = kit.batch([kit.molecule(0), kit.crystal(), (np.array([1]), np.zeros((1, 3)), None)])
    assert not batch.neighbor_mask.all()
    return batch.neighbors, batch.reverse


def test_gather_and_its_transpose(indices: tuple[torch.Tensor, torch.Tensor]) -> None:
    neighbors, reverse = indices
    x = torch.randn(len(neighbors), 3, dtype=torch.float64)
    g = torch.randn(*neighbors.shape, 3, dtype=torch.float64)
    gathered = gather_senders(x, neighbors, reverse)
    torch.testing.assert_close(gathered, x[neighbors], rtol=0, atol=0)
    expected = torch.zeros_like(x).index_add(0, neighbors.flatten(), g.flatten(0, 1))
    torch.testing.assert_close(sum_over_sent(g, neighbors, reverse), expected)


def test_gather_gradients(indices: tuple[torch.Tensor, torch.Tensor]) -> None:
    neighbors, reverse = indices
    x = torch.randn(len(neighbors), 2, dtype=torch.float64, requires_grad=True)
    g = torch.randn(*neighbors.shape, 2, dtype=torch.float64, requires_grad=True)

    def square_of_gather(x: torch.Tensor) -> torch.Tensor:
        return gather_senders(x, neighbors, reverse) ** 2

    def square_of_sum(g: torch.Tensor) -> torch.Tensor:
        return sum_over_sent(g, neighbors, reverse) ** 2

    for function, argument in ((square_of_gather, x), (square_of_sum, g)):
        assert torch.autograd.gradcheck(function, argument)
        assert torch.autograd.gradgradcheck(function, argument)


@pytest.mark.parametrize("symmetric", [False, True])
def test_products(symmetric: bool) -> None:
    rng = np.random.default_rng(0)
    tensor = rng.normal(size=(4, 3, 3)) * (rng.random((4, 3, 3)) < 0.5)
    x, y = (torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    t = torch.tensor(tensor)
    if symmetric:
        square = Square(tensor)
        torch.testing.assert_close(square(x), torch.einsum("oab,anc,bnc->onc", t, x, x))
        assert torch.autograd.gradcheck(square, x)
        assert torch.autograd.gradgradcheck(square, x)
    else:
        product = Bilinear(tensor)
        torch.testing.assert_close(product(x, y), torch.einsum("oab,anc,bnc->onc", t, x, y))
        assert torch.autograd.gradcheck(product, (x, y))
        assert torch.autograd.gradgradcheck(product, (x, y))
