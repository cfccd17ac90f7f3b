"""A batch in blocks: what lies where, and that every potential predicts and learns the same over it."""

from types import SimpleNamespace

import pytest
import torch

from mffm.batch import Batch
from mffm.blocks import PAIR, SIGN, WIDTHS, Blocks, pair_sums, to_blocks, width_for
from mffm.models.block_density import block_density
from mffm.models.potential import Potential


def make(kit: SimpleNamespace) -> Batch:
    """Two molecules, a crystal whose atoms neighbor their own images, and an atom without neighbors."""
    alone = (kit.molecule(0, 1)[0], kit.molecule(0, 1)[1], None)
    return kit.batch([kit.molecule(0), alone, kit.crystal(), kit.molecule(1, 3)], fidelity_idx=[0, 1, 2, 1])


@pytest.mark.parametrize("width", WIDTHS)
def test_blocks_hold_every_edge_once_in_each_direction(kit: SimpleNamespace, width: int) -> None:
    batch = make(kit)
    blocks = to_blocks(batch, width, kit.cutoff)
    assert isinstance(blocks, Blocks)
    sign = blocks.slots[:, SIGN]
    receivers = blocks.atom_of_block.repeat_interleave(width)
    used = (sign != 0).nonzero().squeeze(1)
    vectors = blocks.edge_vectors[blocks.slots[used, PAIR]] * sign[used, None]
    found = torch.cat([receivers[used, None], blocks.slots[used, :1], vectors], dim=1)
    mask = batch.neighbor_mask
    expected = torch.cat([batch.receivers[mask, None], batch.neighbors[mask, None], batch.edge_vectors[mask]], dim=1)
    assert sorted(found.tolist()) == sorted(expected.tolist())
    opposite = blocks.slots[used, 2]
    assert torch.equal(blocks.slots[opposite, 2], used)
    assert torch.equal(blocks.slots[opposite, PAIR], blocks.slots[used, PAIR])
    assert not sign[-width:].any()
    assert len(blocks.slots) == width * (1 + int((-(-torch.bincount(batch.receivers[mask]) // width)).sum()))


def test_sums_and_their_derivatives(kit: SimpleNamespace) -> None:
    batch = make(kit)
    blocks = to_blocks(batch, 4, kit.cutoff)
    x = torch.randn(len(batch.atomic_numbers), 2, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(blocks.system_sums(x), batch.system_sums(x))
    y = torch.randn(batch.n_systems, dtype=torch.float64, requires_grad=True)
    assert torch.equal(blocks.of_systems(y), batch.of_systems(y))
    torch.testing.assert_close(blocks.fidelity_sums(y, 4), batch.fidelity_sums(y, 4))
    pairs = torch.randn(len(blocks.receivers), 2, dtype=torch.float64, requires_grad=True)
    for sign in (1, -1):
        assert torch.autograd.gradgradcheck(lambda p, sign=sign: pair_sums(p, blocks, sign).square(), pairs)
    assert torch.autograd.gradgradcheck(lambda x: blocks.system_sums(x).square(), x)
    assert torch.autograd.gradgradcheck(lambda y: blocks.of_systems(y).square(), y)


def test_derivatives_of_the_density(kit: SimpleNamespace) -> None:
    blocks = to_blocks(kit.batch([kit.molecule(0, 3), kit.molecule(1, 2)]), 4, kit.cutoff)
    n_pairs, n_atoms = len(blocks.receivers), len(blocks.atomic_numbers)
    real = (torch.arange(n_pairs) > 0).double()
    h, radial, harmonics = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((n_atoms, 2), (n_pairs, 2, 1), (n_pairs, 4))
    )

    def density(h: torch.Tensor, radial: torch.Tensor, harmonics: torch.Tensor) -> torch.Tensor:
        # pair 0 has no radial function and no derivative of one: the envelope's
        return block_density(h, radial * real[:, None, None], harmonics * real[:, None], blocks)

    assert torch.autograd.gradcheck(density, (h, radial, harmonics))
    assert torch.autograd.gradgradcheck(density, (h, radial, harmonics))


def gradients(potential: Potential, batch: Batch) -> list[torch.Tensor]:
    potential.train()
    prediction = potential(batch, stress=True)
    loss = prediction.energy.square().sum() + prediction.forces.square().sum() + prediction.stress.square().sum()
    found = torch.autograd.grad(loss, list(potential.parameters()), allow_unused=True, materialize_grads=True)
    potential.eval()
    return [prediction.energy.detach(), prediction.forces.detach(), prediction.stress.detach(), *found]


def test_every_potential_learns_the_same_over_blocks(kit: SimpleNamespace, potential: Potential) -> None:
    if potential.config.backbone.kind != "density":
        pytest.skip("the density backbone alone is compiled")
    batch = make(kit)
    expected = gradients(potential, batch)
    for found, value in zip(gradients(potential, to_blocks(batch, 4, kit.cutoff)), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-10)


def test_width_follows_the_number_of_neighbors() -> None:
    assert [width_for(n) for n in (3.0, 6.0, 57.0)] == [4, 8, 16]
