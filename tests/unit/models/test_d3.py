"""DFT-D3 as a term: the library's numbers, the physical laws through a whole potential, and nothing learned from it."""

import sys
from types import SimpleNamespace

import ase
import numpy as np
import pytest
import torch
from ase.build import fcc111
from ase.units import Bohr
from dftd3.ase import DFTD3

from mffm.config.model import D3Config
from mffm.data.loader import pack
from mffm.errors import InputError
from mffm.models import d3
from mffm.models.potential import Potential

STEP = 5e-4  # Å
STENCIL = (-2, -1, 1, 2)
CONFIGS = {"pbe": D3Config(functional="pbe"), "ccsdt": D3Config(functional="b3lyp", damping="zero")}


def slope(values: torch.Tensor) -> torch.Tensor:
    return (values[:, 0] - 8 * values[:, 1] + 8 * values[:, 2] - values[:, 3]) / (12 * STEP)


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def both(kit: SimpleNamespace) -> tuple[Potential, Potential]:
    """The same potential with and without DFT-D3."""
    plain = kit.potential("default", "onehot", "delta")
    config = plain.config.model_copy(update={"d3": CONFIGS})
    potential = Potential(config, plain.fidelities, plain.avg_neighbors, plain.scale).double().eval()
    potential.load_state_dict(plain.state_dict())
    return potential, plain


def mixed(kit: SimpleNamespace) -> tuple[list, list[int]]:
    return [kit.molecule(0), kit.crystal(), kit.molecule(3, 4)], [2, 1, 0]


def structures() -> list[ase.Atoms]:
    rng = np.random.default_rng(0)
    slab = fcc111("Cu", (2, 1, 2), vacuum=None)
    slab.rattle(0.1, seed=1)
    slab_in_a_cell = fcc111("Cu", (2, 1, 2), vacuum=4.0)
    molecule = ase.Atoms("CO2NH3", rng.normal(size=(7, 3)) * 2.5)
    wire = ase.Atoms("Si2", [[0, 0, 0], [2.1, 0.4, 0.3]], cell=[4.4, 0, 0], pbc=[True, False, False])
    crystal = ase.Atoms("NaCl", [[0, 0, 0], [2.7, 2.9, 2.8]], cell=[[4, 0.2, 0], [0, 4.3, 0.5], [1, 0, 4.1]], pbc=True)
    return [molecule, crystal, slab, slab_in_a_cell, wire]


@pytest.mark.parametrize(
    ("config", "damping"),
    [
        ({"functional": "pbe"}, "d3bj"),
        ({"functional": "r2scan", "three_body": True}, "d3bj"),
        ({"functional": "pbe", "damping": "zero"}, "d3zero"),
        ({"functional": "pbe", "cutoff": 9.0}, "d3bj"),
    ],
    ids=["bj", "three-body", "zero", "cutoff"],
)
def test_energy_forces_and_stress_are_the_librarys(config: dict, damping: str) -> None:
    pair, width = config.get("cutoff", 60 * Bohr), d3.WIDTH * Bohr
    theirs = {
        "damping": damping,
        "params_tweaks": {"method": config["functional"], "atm": config.get("three_body", False)},
        "realspace_cutoff": {"disp2": pair, "disp3": min(pair, 40 * Bohr), "width2": width, "width3": width},
    }
    frames = structures()[: 2 if config.get("three_body") else None]
    batch = pack([(a.numbers, a.positions, a.cell.array, a.pbc) for a in frames], [0] * len(frames), 4.0, torch.float64)
    out = d3.D3({"x": D3Config(**config)}, ["x"])(batch, batch.edge_vectors)
    for i, atoms in enumerate(frames):
        for axis in np.flatnonzero(
            ~atoms.pbc & atoms.pbc.any()
        ).tolist():  # 60 bohr of vacuum are as good as none periodic
            atoms.center(vacuum=35.0, axis=axis)
            atoms.pbc[axis] = True
        atoms.calc = DFTD3(**theirs)
        mine = batch.system_idx == i
        energy = atoms.get_potential_energy()
        assert abs(energy) > 1e-3
        assert float(out.atom_energies[mine].sum()) == pytest.approx(energy, rel=1e-10)
        np.testing.assert_allclose(out.forces[mine], atoms.get_forces(), atol=1e-10)
        if i == 1:
            stress = out.virial[i].numpy() / atoms.get_volume()
            np.testing.assert_allclose(stress, atoms.get_stress(voigt=False), atol=1e-11)


def test_forces_and_stress_are_derivatives(both: tuple[Potential, Potential], kit: SimpleNamespace) -> None:
    potential, plain = both
    numbers, positions, cell = kit.crystal()
    moved, strained = [], []
    for i in range(positions.size):
        for point in STENCIL:
            at = positions.copy()
            at.flat[i] += point * STEP
            moved.append((numbers, at, cell))
    for i in range(9):
        for point in STENCIL:
            strain = np.zeros(9)
            strain[i] = point * STEP
            deform = np.eye(3) + (strain.reshape(3, 3) + strain.reshape(3, 3).T) / 2
            strained.append((numbers, positions @ deform, cell @ deform))

    def dispersion(systems: list) -> torch.Tensor:
        batch = kit.batch(systems, [1] * len(systems))
        return potential(batch, forces=False).energy - plain(batch, forces=False).energy

    batch = kit.batch([(numbers, positions, cell)], [1])
    a, b = potential(batch, stress=True), plain(batch, stress=True)
    assert (a.forces - b.forces).abs().max() > 1e-2
    same((a.forces - b.forces).flatten(), -slope(dispersion(moved).view(-1, 4)), 1e-6)
    expected = slope(dispersion(strained).view(9, 4)).view(3, 3) / abs(np.linalg.det(cell))
    same((a.stress - b.stress)[0], expected, 1e-5)  # the library cuts coordination numbers off where they are 1e-7


def test_translation_permutation_images_and_one_by_one(both: tuple[Potential, Potential], kit: SimpleNamespace) -> None:
    potential, plain = both
    systems, fidelities = mixed(kit)
    a = potential(kit.batch(systems, fidelities), stress=True)
    moved = [(n, p + np.array([3.1, -2.2, 0.7]), c) for n, p, c in systems]
    numbers, positions, cell = systems[1]
    moved[1] = (numbers, positions + np.array([[1, 0, -2], [0, 3, 1]]) @ cell, cell)
    b = potential(kit.batch(moved, fidelities), stress=True)
    alone = [potential(kit.batch([s], [f]), stress=True) for s, f in zip(systems, fidelities, strict=True)]
    for other in (b.energy, torch.cat([p.energy for p in alone])):
        same(a.energy, other, 1e-9)
    for other in (b.forces, torch.cat([p.forces for p in alone])):
        same(a.forces, other, 1e-9)
    for other in (b.stress, torch.cat([p.stress for p in alone])):
        same(a.stress, other, 1e-9)
    order = np.array([3, 0, 4, 1, 2])
    numbers, positions, _ = systems[0]
    permuted = potential(kit.batch([(numbers[order], positions[order], None)], [2]))
    same(a.forces[order], permuted.forces)
    same(a.atom_energies[order], permuted.atom_energies)
    # only the fidelities that name it
    without = plain(kit.batch(systems, fidelities))
    assert (a.energy - without.energy)[:2].abs().min() > 1e-3
    assert float(a.energy[2]) == pytest.approx(float(without.energy[2]), abs=1e-12)


def test_the_learned_part_learns_the_rest(both: tuple[Potential, Potential], kit: SimpleNamespace) -> None:
    """The gradient of a loss is that of the plain potential on labels less DFT-D3."""
    potential, plain = both
    batch = kit.batch(*mixed(kit))
    with torch.no_grad():
        a, b = potential(batch, stress=True), plain(batch, stress=True)
    rest = {n: getattr(a, n) - getattr(b, n) for n in ("energy", "forces", "stress")}
    gradients = []
    for model, offset in ((potential, 0.0), (plain, 1.0)):
        model.zero_grad()  # another test may have left some
        model.train()
        p = model(batch, stress=True)
        loss = sum((getattr(p, n) - 0.3 + offset * value).square().sum() for n, value in rest.items())
        loss.backward()
        model.eval()
        gradients.append({n: q.grad.clone() for n, q in model.named_parameters() if q.grad is not None})
        model.zero_grad()
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        same(gradient, gradients[1][name], 1e-9)


def test_folded_direct_and_kept(both: tuple[Potential, Potential], kit: SimpleNamespace) -> None:
    potential, plain = both
    systems, _ = mixed(kit)
    for i, name in enumerate(potential.fidelities):
        a = potential(kit.batch(systems, [i] * 3), stress=True)
        b = potential.folded(name)(kit.batch(systems, [0] * 3), stress=True)
        same(a.energy, b.energy)
        same(a.forces, b.forces)
        same(a.stress, b.stress)
    term = potential.terms["d3"]
    kept = len(term._kept)
    potential(kit.batch(systems, [1] * 3))
    assert len(term._kept) == kept  # computed once a geometry and fidelity
    config = plain.config.model_copy(update={"forces": "direct"})
    parts = [
        Potential(config.model_copy(update={"d3": c}), kit.fidelities, 6.0, 1.3).double().eval() for c in ({}, CONFIGS)
    ]
    parts[1].load_state_dict(parts[0].state_dict())
    batch = kit.batch(systems, [1] * 3)
    conservative = potential(batch).forces - plain(batch).forces
    same(parts[1](batch).forces - parts[0](batch).forces, conservative)


def test_kept_results_are_bounded(kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(d3, "KEPT_ATOMS", 12)
    term = d3.D3({"pbe": CONFIGS["pbe"]}, kit.fidelities)
    batch = kit.batch([kit.molecule(seed) for seed in range(6)], [1] * 6)
    first = term(batch, batch.edge_vectors)
    assert len(term._kept) == 2
    same(term(batch, batch.edge_vectors).forces, first.forces, 0.0)


def test_refusals(kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(name: str = "pbe", **config: str) -> d3.D3:
        return d3.D3({name: D3Config(**{"functional": "pbe", **config})}, kit.fidelities)

    with pytest.raises(InputError, match="names fidelity 'scan'; fidelities of this potential: ccsdt, gfn2, pbe"):
        make("scan")
    with pytest.raises(InputError, match=r"model\.d3\.pbe\.functional 'pbx': .* no parameters of it with damping bj"):
        make(functional="pbx")
    batch = kit.batch([(np.array([104, 1]), np.array([[0.0, 0, 0], [2, 0, 0]]), None)], [1])
    with pytest.raises(InputError, match="atomic number 104; DFT-D3 has elements 1 to 103"):
        make()(batch, batch.edge_vectors)
    monkeypatch.setitem(sys.modules, "dftd3.interface", None)
    with pytest.raises(InputError, match=r"needs simple-dftd3 .*pip install 'mffm\[d3\]'"):
        make()
