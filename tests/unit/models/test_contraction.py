"""The hand-written operations against plain torch, to second order."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mffm.batch import Batch
from mffm.models.contraction import Bilinear, Square, sum_over_received, sum_over_sent


@pytest.fixture
def batch(kit: SimpleNamespace) -> Batch:
    batch = kit.batch([kit.molecule(0), kit.crystal(), (np.array([1]), np.zeros((1, 3)), None)])
    assert not batch.neighbor_mask.all()
    assert len(batch.groups) > 1
    return batch


@pytest.mark.parametrize("end", ["sent", "received"])
def test_sums_over_slots(batch: Batch, end: str) -> None:
    function = {"sent": sum_over_sent, "received": sum_over_received}[end]
    atoms = {"sent": batch.neighbors, "received": batch.receivers}[end]
    g = torch.randn(len(atoms), 2, dtype=torch.float64, requires_grad=True)
    expected = torch.zeros(len(batch.row_of_atom), 2, dtype=torch.float64).index_add(0, atoms, g)
    torch.testing.assert_close(function(g, batch), expected)

    def square(g: torch.Tensor) -> torch.Tensor:
        return function(g, batch) ** 2

    assert torch.autograd.gradcheck(square, g)
    assert torch.autograd.gradgradcheck(square, g)


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
