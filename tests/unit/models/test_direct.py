"""Direct heads: the laws that they keep and the one that they do not; how a conservative potential starts from them."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mffm.config.model import ConditioningConfig, DirectConfig, HeadsConfig, ModelConfig
from mffm.errors import InputError
from mffm.models.potential import Potential

KINDS = [
    ("default", "none", "shared"),
    ("default", "onehot", "delta"),
    ("default", "film", "independent"),
    ("quartic", "embedding", "independent"),
    ("single", "none", "delta"),
    ("escn", "none", "shared"),
    ("escn", "onehot", "independent"),
]


def make(kit: SimpleNamespace, kind: tuple[str, str, str], forces: str = "direct", **direct: bool) -> Potential:
    config = kit.config(*kind)
    if forces == "direct":
        direct = {"stress": kind[0] != "escn", **direct}
        config = config.model_copy(update={"forces": "direct", "direct": DirectConfig(**direct)})
    torch.manual_seed(0)
    potential = Potential(config, kit.fidelities, avg_neighbors=6.0, scale=1.3).double()
    with torch.no_grad():
        for name, parameter in potential.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if "correction" in name and config.heads.base:
                parameter[kit.fidelities.index(config.heads.base)] = 0
    return potential.eval()


@pytest.fixture(params=KINDS, ids="-".join)
def direct(request: pytest.FixtureRequest, kit: SimpleNamespace) -> Potential:
    return make(kit, request.param)


def predict(potential: Potential, batch):
    return potential(batch, stress=potential.has_stress)


def mixed(kit: SimpleNamespace) -> tuple[list, list[int]]:
    return [kit.molecule(0), kit.crystal(), kit.molecule(3, 4)], [2, 0, 1]


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("determinant", [1, -1], ids=["rotation", "reflection"])
def test_they_turn_and_mirror_with_the_atoms(direct: Potential, kit: SimpleNamespace, determinant: int) -> None:
    if determinant < 0 and direct.config.backbone.kind == "escn":
        pytest.skip("eSCN-MD convolves with SO(2): it knows no reflections")
    q = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))[0]
    q *= np.linalg.det(q) * determinant
    systems, fidelities = mixed(kit)
    turned = [(n, p @ q.T, None if c is None else c @ q.T) for n, p, c in systems]
    a, b = (predict(direct, kit.batch(s, fidelities)) for s in (systems, turned))
    rotation = torch.tensor(q)
    same(a.energy, b.energy)
    same(a.forces @ rotation.T, b.forces)
    assert a.forces.abs().max() > 1e-2
    if direct.has_stress:
        same(rotation @ a.stress @ rotation.T, b.stress)
        stress = a.stress[1]
        assert (stress - torch.eye(3) * stress.trace() / 3).abs().max() > 1e-4
        assert stress.trace().abs() > 1e-4
        assert not a.stress[[0, 2]].any()


def test_translation_permutation_and_one_by_one(direct: Potential, kit: SimpleNamespace) -> None:
    systems, fidelities = mixed(kit)
    a = predict(direct, kit.batch(systems, fidelities))
    moved = predict(direct, kit.batch([(n, p + np.array([3.1, -2.2, 0.7]), c) for n, p, c in systems], fidelities))
    same(a.forces, moved.forces)
    order = np.array([3, 0, 4, 1, 2])
    numbers, positions, _ = systems[0]
    permuted = predict(direct, kit.batch([(numbers[order], positions[order], None)], [2]))
    same(a.forces[order], permuted.forces)
    alone = [predict(direct, kit.batch([s], [f])) for s, f in zip(systems, fidelities, strict=True)]
    same(a.forces, torch.cat([p.forces for p in alone]))
    if direct.has_stress:
        same(a.stress, moved.stress)
        same(a.stress, torch.cat([p.stress for p in alone]))


def test_images_and_supercells(direct: Potential, kit: SimpleNamespace) -> None:
    numbers, positions, cell = kit.crystal()
    shifted = positions + np.array([[1, 0, -2], [0, 3, 1]]) @ cell
    doubled = (np.tile(numbers, 2), np.vstack([positions, positions + cell[1]]), cell * np.array([[1], [2], [1]]))
    a, b, c = (predict(direct, kit.batch([s])) for s in ((numbers, positions, cell), (numbers, shifted, cell), doubled))
    same(a.forces, b.forces)
    same(a.forces.repeat(2, 1), c.forces)
    if direct.has_stress:
        same(a.stress, b.stress)
        same(a.stress, c.stress)


def test_the_net_force_is_taken_off_each_system(kit: SimpleNamespace) -> None:
    systems, fidelities = mixed(kit)
    batch = kit.batch(systems, fidelities)
    nets = []
    for zero in (True, False):
        forces = make(kit, KINDS[0], zero_net_force=zero)(batch).forces
        nets.append(torch.zeros(3, 3, dtype=forces.dtype).index_add(0, batch.system_idx, forces))
    same(nets[0], torch.zeros_like(nets[0]))
    assert nets[1].abs().max() > 1e-2


def test_they_are_not_derivatives_and_say_so(kit: SimpleNamespace) -> None:
    potential = make(kit, KINDS[0])
    assert not potential.is_conservative
    numbers, positions, _ = kit.molecule(0)
    h = 1e-4
    ends = [(numbers, positions + s * h * np.eye(1, positions.size).reshape(positions.shape), None) for s in (1, -1)]
    energy = potential(kit.batch(ends), forces=False).energy
    slope = float(energy[0] - energy[1]) / (2 * h)
    assert abs(float(potential(kit.batch([(numbers, positions, None)])).forces[0, 0]) + slope) > 1e-3


def test_one_backward_trains_every_parameter(direct: Potential, kit: SimpleNamespace) -> None:
    """No derivative is taken with a graph, and a loss of energy, forces and stress reaches all weights."""
    batch = kit.batch(*mixed(kit))
    calls = []
    original = torch.autograd.grad
    torch.autograd.grad = lambda *a, **k: calls.append(1) or original(*a, **k)
    try:
        direct.train()
        p = predict(direct, batch)
    finally:
        torch.autograd.grad = original
    loss = p.energy.square().sum() + p.forces.square().sum()
    if p.stress is not None:
        loss = loss + p.stress.square().sum()
    loss.backward()
    direct.eval()
    assert not calls
    lacking = [n for n, q in direct.named_parameters() if q.grad is None and "escn" not in n]
    assert not lacking
    assert direct.learned.direct_heads.forces.mlp.weights[0].grad.any()
    direct.zero_grad()


def test_activation_checkpointing_gives_the_same_gradients(kit: SimpleNamespace) -> None:
    batch = kit.batch(*mixed(kit))
    gradients = []
    for recompute in (False, True):
        potential = make(kit, KINDS[0]).train()
        potential.learned.backbone.recompute = recompute
        p = predict(potential, batch)
        (p.energy.square().sum() + p.forces.square().sum() + p.stress.square().sum()).backward()
        gradients.append({n: q.grad for n, q in potential.named_parameters()})
    for name, gradient in gradients[0].items():
        same(gradients[1][name], gradient)


def test_zbl_adds_its_forces(kit: SimpleNamespace) -> None:
    plain = make(kit, KINDS[0])
    both = Potential(plain.config.model_copy(update={"zbl": True}), kit.fidelities, 6.0, 1.3).double().eval()
    both.load_state_dict(plain.state_dict())
    systems, fidelities = mixed(kit)
    close = [(n, 0.4 * p, None if c is None else 0.7 * c) for n, p, c in systems]
    batch = kit.batch(close, fidelities)
    a, b = predict(plain, batch), predict(both, batch)
    zbl = Potential(
        ModelConfig(backbone=plain.config.backbone, heads=plain.config.heads, zbl=True), kit.fidelities, 6.0, 1.3
    )
    zbl = zbl.double().eval()
    with torch.no_grad():
        for parameter in zbl.parameters():
            parameter.zero_()
    c = zbl(batch, stress=True)
    assert c.forces.abs().max() > 0.1
    same(b.forces, a.forces + c.forces)
    same(b.stress, a.stress + c.stress)
    same(b.energy, a.energy + c.energy)


def test_folded_predicts_the_same(direct: Potential, kit: SimpleNamespace) -> None:
    systems, _ = mixed(kit)
    for i, fidelity in enumerate(direct.fidelities):
        folded = direct.folded(fidelity)
        a, b = predict(direct, kit.batch(systems, [i] * 3)), predict(folded, kit.batch(systems, [0] * 3))
        same(a.forces, b.forces)
        same(a.energy, b.energy)
        if direct.has_stress:
            same(a.stress, b.stress)
        assert not folded.is_conservative


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_a_conservative_potential_starts_from_the_shared_weights(kit: SimpleNamespace, kind: tuple) -> None:
    """Energies are those of the direct potential; what is left out is named, and is what direct heads need alone."""
    direct, conservative = make(kit, kind), make(kit, kind, "conservative")
    dropped = conservative.load_weights(direct.state_dict(), direct.fidelities)
    assert set(dropped) == set(direct.state_dict()) - set(conservative.state_dict())
    assert any(".direct_heads.forces." in name for name in dropped)
    batch = kit.batch(*mixed(kit))
    same(conservative(batch).energy, direct(batch).energy, 1e-12)
    again = make(kit, kind)
    assert again.load_weights(direct.state_dict(), direct.fidelities) == []
    same(again(batch).forces, direct(batch).forces, 1e-12)


def test_rows_of_direct_heads_are_matched_by_name(kit: SimpleNamespace) -> None:
    old = make(kit, ("default", "none", "independent"))
    new = Potential(old.config, ["scan", "ccsdt"], 6.0, 1.3).double().eval()
    new.load_weights(old.state_dict(), old.fidelities, {"scan": "gfn2"})
    for theirs, mine in ((2, 1), (0, 0)):
        a, b = old(kit.batch([kit.molecule(0)], [theirs])), new(kit.batch([kit.molecule(0)], [mine]))
        same(a.forces, b.forces)
    with pytest.raises(InputError, match="'scan' is new and its head has nothing to start from"):
        new.load_weights(old.state_dict(), old.fidelities, {})


def test_refusals(kit: SimpleNamespace) -> None:
    direct, conservative = make(kit, KINDS[0], stress=False), make(kit, KINDS[0], "conservative")
    batch = kit.batch([kit.crystal()])
    with pytest.raises(InputError, match="direct forces without a stress head"):
        direct(batch, stress=True)
    assert direct(batch).stress is None
    with pytest.raises(InputError, match=r"no direct heads.*model\.forces: conservative"):
        direct.load_weights(conservative.state_dict(), conservative.fidelities)
    name = "terms.learned.backbone.elements.weight"
    lacking = {k: v for k, v in direct.state_dict().items() if k != name}
    with pytest.raises(InputError, match=r"missing terms\.learned\.backbone\.elements\.weight; not used nothing"):
        conservative.load_weights(lacking, direct.fidelities)
    with pytest.raises(InputError, match=r"not used .*terms\.learned\.direct_heads\.stress"):
        direct.load_weights(make(kit, KINDS[0]).state_dict(), direct.fidelities)
    for change, message in (
        ({"direct": {"stress": True}}, "belongs to forces: direct"),
        ({"forces": "direct", "backbone": {"lmax": 0, "l_message": 0}}, "features of degree 1; backbone.lmax is 0"),
        ({"forces": "direct", "direct": {"stress": True}, "backbone": {"lmax": 1}}, "features of degree 2"),
        ({"forces": "direct", "direct": {"stress": True}, "backbone": {"kind": "escn"}}, "escn has direct forces only"),
    ):
        with pytest.raises(ValidationError, match=message):
            ModelConfig.model_validate(change)


def test_it_works_at_odd_systems(kit: SimpleNamespace) -> None:
    """One atom, no edges, one fidelity, float32: zero forces, and no NaN in any gradient."""
    config = ModelConfig(
        backbone=kit.config().backbone, conditioning=ConditioningConfig(), heads=HeadsConfig(hidden=[]), forces="direct"
    )
    potential = Potential(config, ["a"], 6.0, 1.0).train()
    batch = kit.batch([(np.array([1]), np.zeros((1, 3)), None)], dtype=torch.float32)
    p = potential(replace(batch, fidelity_idx=batch.fidelity_idx))
    assert not p.forces.any()
    (p.forces.sum() + p.energy.sum()).backward()
    assert all(q.grad is None or bool(q.grad.isfinite().all()) for q in potential.parameters())
