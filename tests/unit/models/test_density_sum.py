"""The density against a plain sum, and its hand-written derivatives against finite differences."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mffm.batch import Batch
from mffm.models import density_sum as module
from mffm.models.density_sum import density_sum


def arguments(batch: Batch, lmax: int, width: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    n_atoms, n_slots = len(batch.row_of_atom), len(batch.neighbors)
    shapes = (n_atoms, width), (n_slots, lmax + 1, channels), (n_slots, (lmax + 1) ** 2)
    return tuple(torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


@pytest.mark.parametrize("chunk_bytes", [1, 200, 1 << 20])
def test_density(kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    batch = kit.batch([kit.molecule(0), kit.crystal()])
    h, radial, harmonics = arguments(batch, 2, 8, 2)
    degree = torch.tensor([0, 1, 1, 1, 2, 2, 2, 2, 2])
    messages = torch.einsum("sm,smc,sac->smac", harmonics, radial[:, degree], h[batch.neighbors].view(-1, 4, 2))
    expected = torch.zeros(len(h), 9, 4, 2, dtype=torch.float64).index_add(0, batch.receivers, messages)
    torch.testing.assert_close(density_sum(h, radial, harmonics, batch), expected.flatten(2))


@pytest.mark.parametrize("chunk_bytes", [200, 1 << 20])
def test_derivatives(kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    batch = kit.batch([kit.molecule(0, 3), kit.molecule(1, 2)])
    assert len(batch.groups) == 2

    def density(*tensors: Tensor) -> Tensor:
        return density_sum(*tensors, batch)

    inputs = arguments(batch, 1, 2, 1)
    assert torch.autograd.gradcheck(density, inputs)
    assert torch.autograd.gradgradcheck(density, inputs)
