"""Starting from other weights, other fidelities, and what is refused."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mffm.config.model import ConditioningConfig, HeadsConfig, ModelConfig
from mffm.errors import InputError
from mffm.models.potential import Potential

CONDITIONINGS = ("none", "onehot", "embedding", "film")
HEADS = ("shared", "independent", "delta")


def energies(potential: Potential, kit: SimpleNamespace, fidelity: str) -> torch.Tensor:
    index = potential.fidelities.index(fidelity)
    return potential(kit.batch([kit.molecule(0), kit.molecule(3)], [index] * 2), forces=False).energy


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_every_fidelity_starts_at_the_common_model(kit: SimpleNamespace, conditioning: str) -> None:
    for zero_init in (True, False):
        config = kit.config("default", conditioning, zero_init=zero_init)
        potential = Potential(config, kit.fidelities, 6.0, 1.0).double()
        a, b = (energies(potential, kit, f) for f in ("gfn2", "ccsdt"))
        assert torch.equal(a, b) == (zero_init or conditioning == "none")
        plain = Potential(kit.config("default"), kit.fidelities, 6.0, 1.0).double()
        common = {k: v for k, v in potential.state_dict().items() if "conditioning" not in k}
        plain.load_state_dict(common)
        assert torch.equal(a, energies(plain, kit, "gfn2")) == (zero_init or conditioning == "none")
        if zero_init and conditioning != "none":  # and it can leave it
            energies(potential, kit, "gfn2").sum().backward()
            table = potential.learned.conditioning.table
            assert table is not None
            assert table.grad[0].any()


def test_corrections_start_at_zero(kit: SimpleNamespace) -> None:
    potential = Potential(kit.config("default", "none", "delta"), kit.fidelities, 6.0, 1.0).double()
    assert torch.equal(energies(potential, kit, "pbe"), energies(potential, kit, "ccsdt"))
    energies(potential, kit, "ccsdt").sum().backward()
    gradient = potential.learned.heads.correction.weights[-1].grad
    assert gradient[2].any()
    assert not gradient[:2].any()


def test_heads_start_as_a_copy(kit: SimpleNamespace) -> None:
    config = kit.config("default", "none", "independent")
    heads = HeadsConfig(kind="independent", hidden=[6], init_from={"ccsdt": "pbe"})
    potential = Potential(config.model_copy(update={"heads": heads}), kit.fidelities, 6.0, 1.0).double()
    pbe, ccsdt, gfn2 = (energies(potential, kit, f) for f in ("pbe", "ccsdt", "gfn2"))
    torch.testing.assert_close(pbe, ccsdt, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(pbe, gfn2)


@pytest.mark.parametrize("heads", HEADS)
def test_linear_heads(kit: SimpleNamespace, heads: str) -> None:
    """``hidden: []`` is linear, and folds as the others do."""
    config = kit.config("default", "onehot")
    linear = HeadsConfig(kind=heads, hidden=[], base="pbe" if heads == "delta" else None)
    potential = Potential(config.model_copy(update={"heads": linear}), kit.fidelities, 6.0, 1.0).double()
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert len(potential.learned.heads.mlp.weights) == 1
    for fidelity in kit.fidelities:
        folded = potential.folded(fidelity)
        torch.testing.assert_close(energies(folded, kit, fidelity), energies(potential, kit, fidelity))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_other_fidelities(kit: SimpleNamespace, conditioning: str, heads: str) -> None:
    """Known fidelities keep their predictions in any order; a new one starts as the one it is told to."""
    old = kit.potential("default", conditioning, heads)
    new = Potential(old.config, ["scan", "ccsdt", "pbe"], 6.0, 1.3).double()
    new.load_weights(old.state_dict(), old.fidelities, {"scan": "gfn2"})
    for fidelity, source in (("ccsdt", "ccsdt"), ("pbe", "pbe"), ("scan", "gfn2")):
        torch.testing.assert_close(energies(new, kit, fidelity), energies(old, kit, source), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_new_fidelity_starts_at_the_common_model(kit: SimpleNamespace, conditioning: str) -> None:
    for heads, base in (("shared", None), ("delta", "pbe")):
        old = kit.potential("default", conditioning, heads)
        new = Potential(old.config, [*old.fidelities, "scan"], 6.0, 1.3).double()
        new.load_weights(old.state_dict(), old.fidelities, {})
        common = Potential(
            ModelConfig(backbone=old.config.backbone, heads=HeadsConfig(hidden=[6])), ["any"], 6.0, 1.3
        ).double()
        keep = {k: v for k, v in old.state_dict().items() if "conditioning" not in k and "correction" not in k}
        common.load_state_dict(keep)
        torch.testing.assert_close(energies(new, kit, "scan"), energies(common, kit, "any"), rtol=1e-10, atol=1e-10)
        assert base is None or new.learned.heads.correction.weights[0][3].any()  # or no gradient would reach it


def test_refused_weights(kit: SimpleNamespace) -> None:
    old = kit.potential("default", "onehot", "independent")
    new = Potential(old.config, ["pbe", "scan"], 6.0, 1.3).double()
    before = {k: v.clone() for k, v in new.state_dict().items()}
    with pytest.raises(InputError, match=r"'scan' is new .*model\.init_from: \{scan: "):
        new.load_weights(old.state_dict(), old.fidelities, {})
    with pytest.raises(InputError, match=r"'b3lyp', which the weights lack; they have: ccsdt, gfn2, pbe"):
        new.load_weights(old.state_dict(), old.fidelities, {"scan": "b3lyp"})
    with pytest.raises(InputError, match=r"'hf', which this potential lacks; it has: pbe, scan"):
        new.load_weights(old.state_dict(), old.fidelities, {"hf": "pbe"})
    wider = dict(old.state_dict())
    name = "terms.learned.backbone.elements.weight"
    wider[name] = torch.zeros(119, 12)
    with pytest.raises(InputError, match=r"elements\.weight: shape \(119, 12\) in the weights, \(119, 8\) expected"):
        new.load_weights(wider, old.fidelities, {"scan": "pbe"})
    lacking = {k: v for k, v in old.state_dict().items() if k != name}
    with pytest.raises(InputError, match=r"missing terms\.learned\.backbone\.elements\.weight"):
        new.load_weights(lacking, old.fidelities, {"scan": "pbe"})
    for key, value in new.state_dict().items():
        assert torch.equal(value, before[key])  # a refused load changes nothing


def test_another_delta_base_is_refused(kit: SimpleNamespace) -> None:
    """Which fidelity is the base is not in the weights, but a base has no correction."""
    old = Potential(kit.config("default", "none", "delta"), kit.fidelities, 6.0, 1.3).double()
    with torch.no_grad():
        old.learned.heads.correction.weights[-1][[0, 2]] = 1.0
    heads = HeadsConfig(kind="delta", hidden=[6], base="ccsdt")
    new = Potential(old.config.model_copy(update={"heads": heads}), kit.fidelities, 6.0, 1.3).double()
    with pytest.raises(InputError, match="'ccsdt' has a correction in the weights"):
        new.load_weights(old.state_dict(), old.fidelities, {})
    Potential(old.config, kit.fidelities, 6.0, 1.3).double().load_weights(old.state_dict(), old.fidelities, {})


def test_refused_batches_and_names(kit: SimpleNamespace) -> None:
    potential = kit.potential("default", "onehot", "shared")
    batch = kit.batch([kit.molecule(0)], [3])
    with pytest.raises(InputError, match=r"fidelity index 3 in a batch; this potential has 3 \(gfn2, pbe, ccsdt\)"):
        potential(batch)
    with pytest.raises(InputError, match="fidelity index -1"):
        potential(batch.with_fidelity(torch.tensor([-1])))
    with pytest.raises(InputError, match=r"batch in torch.float32, potential in torch.float64"):
        potential(replace(batch.with_fidelity(torch.tensor([0])), edge_vectors=batch.edge_vectors.float()))
    with pytest.raises(InputError, match=r"unknown fidelity 'hf'; this potential has: ccsdt, gfn2, pbe"):
        potential.folded("hf")
    with pytest.raises(InputError, match="needs one or more different fidelities"):
        Potential(kit.config(), ["pbe", "pbe"], 6.0, 1.0)
    with pytest.raises(InputError, match=r"model.heads names fidelity 'pbe'; fidelities of this potential: hf"):
        Potential(kit.config("default", "none", "delta"), ["hf"], 6.0, 1.0)


def test_its_arguments_and_weights_restore_the_potential(kit: SimpleNamespace) -> None:
    old = kit.potential("default", "film", "delta")
    new = Potential(old.config, old.fidelities, old.avg_neighbors, old.scale).double()
    new.load_state_dict(old.state_dict())
    assert new.scale == 1.3
    assert torch.equal(energies(new, kit, "pbe"), energies(old, kit, "pbe"))
    assert new.n_parameters == old.n_parameters == sum(p.numel() for p in old.parameters())


def test_bfloat16_weights_keep_the_geometry(kit: SimpleNamespace) -> None:
    """An engine in bf16 casts the module: geometry and energy sums stay in float32 and float64."""
    exact = kit.potential("default", "onehot", "delta")
    half = Potential(exact.config, exact.fidelities, exact.avg_neighbors, exact.scale)
    half.load_state_dict(exact.state_dict())
    half = half.bfloat16().eval()
    assert not list(half.buffers())
    systems = [kit.molecule(0), kit.crystal()]
    a = exact(kit.batch(systems, [0, 2]), stress=True)
    b = half(kit.batch(systems, [0, 2], dtype=torch.float32), stress=True)
    assert b.forces.dtype == torch.float32
    assert b.energy.dtype == torch.float64
    error = (b.forces - a.forces).square().mean().sqrt() / a.forces.square().mean().sqrt()
    assert error < 0.1


def test_conditioning_without_a_table_has_no_parameters(kit: SimpleNamespace) -> None:
    potential = Potential(ModelConfig(conditioning=ConditioningConfig(kind="none")), ["a", "b"], 6.0, 1.0)
    assert not potential.per_fidelity()
    assert 1.5e5 < potential.n_parameters < 6e5  # the default, size S
