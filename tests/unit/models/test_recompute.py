"""Activation checkpointing: the same energies, forces and parameter gradients, with far less memory; bf16 products."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mffm.models.potential import Potential

Gradients = dict[str, Tensor | None]


def trained(
    kit: SimpleNamespace, potential: Potential, batch, stress: bool = True
) -> tuple[Tensor, Tensor, Gradients, int]:
    """Return energy, forces, gradients of a loss of energy, forces and stress, and the bytes that the graph keeps."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    potential.train()
    potential.zero_grad(set_to_none=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        p = potential(batch, forces=True, stress=stress)
        loss = p.energy.square().sum() + (p.forces - 0.3).square().sum()
        if stress:
            loss = loss + 100 * (p.stress + 0.01).square().sum()
    loss.backward()
    gradients = {n: None if w.grad is None else w.grad.clone() for n, w in potential.named_parameters()}
    potential.eval()
    return p.energy.detach(), p.forces.detach(), gradients, sum(kept.values())


@pytest.mark.parametrize("backbone", ["default", "invariant", "quartic", "single"])
@pytest.mark.parametrize(("conditioning", "heads"), [("none", "shared"), ("onehot", "independent"), ("film", "delta")])
def test_recomputing_changes_no_number(kit: SimpleNamespace, backbone: str, conditioning: str, heads: str) -> None:
    potential = kit.potential(backbone, conditioning, heads)
    batch = kit.batch([kit.molecule(0), kit.crystal(), kit.molecule(1)], [0, 1, 2])
    energy, forces, plain, _ = trained(kit, potential, batch)
    potential.learned.backbone.recompute = True
    try:
        again_energy, again_forces, recomputed, _ = trained(kit, potential, batch)
    finally:
        potential.learned.backbone.recompute = False
    assert torch.equal(energy, again_energy)
    torch.testing.assert_close(forces, again_forces, rtol=1e-12, atol=1e-12)
    scale = max(float(g.abs().max()) for g in plain.values() if g is not None)
    for name, gradient in plain.items():
        if gradient is None:  # reached by no label, with and without
            assert recomputed[name] is None or not recomputed[name].any(), name
        else:
            assert float((recomputed[name] - gradient).abs().max()) < 1e-12 * scale, name


def test_recomputing_keeps_a_fraction_of_the_memory(kit: SimpleNamespace) -> None:
    batch = kit.batch([kit.molecule(i, 12) for i in range(4)])
    config = kit.config("default")
    config = config.model_copy(update={"backbone": config.backbone.model_copy(update={"layers": 4, "channels": 16})})
    potential = Potential(config, kit.fidelities, avg_neighbors=6.0, scale=1.0).double()
    *_, plain = trained(kit, potential, batch)
    potential.learned.backbone.recompute = True
    *_, recomputed = trained(kit, potential, batch)
    assert recomputed < 0.25 * plain


def test_an_energy_loss_alone(kit: SimpleNamespace) -> None:
    potential = kit.potential("default", "onehot", "independent")
    batch = kit.batch([kit.molecule(0), kit.molecule(1)], [0, 1])
    found = []
    for recompute in (False, True):
        potential.learned.backbone.recompute = recompute
        potential.train().zero_grad(set_to_none=True)
        potential(batch, forces=False).energy.square().sum().backward()
        found.append({n: w.grad.clone() for n, w in potential.named_parameters() if w.grad is not None})
    potential.learned.backbone.recompute = False
    potential.eval()
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-11, atol=1e-12)


def test_bfloat16_products_are_close_and_end_with_the_training(kit: SimpleNamespace) -> None:
    torch.manual_seed(0)  # cubes of random weights: forces move by 1 to 5 %
    potential = Potential(kit.config("quartic", "film", "delta"), kit.fidelities, avg_neighbors=6.0, scale=1.0)
    batch = kit.batch([kit.molecule(i, 12) for i in range(4)], [0, 1, 2, 0], dtype=torch.float32)
    energy, forces, plain, _ = trained(kit, potential, batch)
    inference = potential(batch).energy
    potential.learned.backbone.multiply_in(torch.bfloat16)
    for recompute in (False, True):
        potential.learned.backbone.recompute = recompute
        low_energy, low_forces, low, _ = trained(kit, potential, batch)
        assert torch.equal(potential(batch).energy, inference)  # the products of inference stay in float32
        assert 0 < float((low_energy - energy).abs().max()) < 0.03 * float(energy.abs().max())
        assert float((low_forces - forces).norm()) < 0.03 * float(forces.norm())
        flat = [torch.cat([g.flatten() for g in gs.values() if g is not None]) for gs in (low, plain)]
        assert float((flat[0] - flat[1]).norm()) < 0.05 * float(flat[1].norm())
