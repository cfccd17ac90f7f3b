"""The ASE calculator: finite differences, units, dtypes, and errors that list what is known."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.units import Bohr
from dftd3.ase import DFTD3

from mffm.batch import reference_energy
from mffm.config.base import validate
from mffm.config.model import ModelConfig
from mffm.data.loader import evaluation_batches
from mffm.data.references import ElementReferences
from mffm.data.store import Store
from mffm.deploy.ase import Calculator
from mffm.errors import InputError
from mffm.fidelity import Fidelity, FidelityTable
from mffm.models.d3 import WIDTH
from mffm.release import Loaded, PotentialSpec, load

TINY_BACKBONE = {
    "cutoff": 4.0, "lmax": 1, "l_message": 1, "layers": 1, "channels": 8, "edge_channels": 8,
    "n_radial": 4, "radial_hidden": 8, "ff_expansion": 1, "body_order": 3,
}  # fmt: skip


def test_equals_the_potential_with_references(tiny_release: Path, molecule_store: Path):
    store, loaded = Store(molecule_store), load(tiny_release)
    rows = store.rows(split="test", fidelity="pbe")[:3]
    batch = next(iter(evaluation_batches(store, rows, "pbe", loaded.fidelities, 4.0, 10**6)))
    prediction = loaded.potential(batch, forces=True)
    total = prediction.energy.double() + reference_energy(batch, loaded.spec.reference_table())
    start = 0
    for i, row in enumerate(batch.rows.tolist()):
        numbers, positions, _, _ = store.geometry(row)
        atoms = Atoms(numbers, positions, calculator=Calculator(tiny_release, fidelity="pbe"))
        stop = start + len(atoms)
        assert atoms.get_potential_energy() == pytest.approx(float(total[i]), abs=1e-4)
        np.testing.assert_allclose(atoms.get_forces(), prediction.forces[start:stop].numpy(), atol=1e-4)
        assert atoms.calc.results["energies"].sum() == pytest.approx(atoms.get_potential_energy(), abs=1e-4)
        start = stop


def test_forces_and_stress_are_derivatives(tiny_release: Path):
    atoms = bulk("C", "diamond", 3.6, cubic=True).repeat((1, 1, 1))
    atoms.numbers[:2] = 7
    atoms.rattle(0.05, seed=3)
    atoms.calc = Calculator(tiny_release, fidelity="gfn2", dtype="float64")
    numeric = atoms.calc.calculate_numerical_forces(atoms, d=1e-4)
    np.testing.assert_allclose(atoms.get_forces(), numeric, atol=1e-6)
    stress = atoms.get_stress()
    strained = []
    for sign in (1, -1):
        other = atoms.copy()
        other.set_cell(
            atoms.cell.array @ (np.eye(3) + sign * 1e-4 * np.array([[1, 0, 0], [0, 0, 0.5], [0, 0.5, 0]])),
            scale_atoms=True,
        )
        other.calc = atoms.calc
        strained.append(other.get_potential_energy())
    expected = (strained[0] - strained[1]) / 2e-4 / atoms.get_volume()
    assert stress[0] + stress[3] == pytest.approx(expected, abs=1e-6)


def test_dispersion_can_be_added(tiny_release: Path):
    crystal = bulk("C", "diamond", 3.6, cubic=True)
    crystal.rattle(0.05, seed=3)
    for atoms in (crystal, molecule("CH3CH2OH")):
        plain, both, alone = (
            Calculator(tiny_release, fidelity="gfn2", dtype="float64"),
            Calculator(tiny_release, fidelity="gfn2", dtype="float64", d3={"functional": "pbe", "cutoff": 20.0}),
            DFTD3(
                damping="d3bj",
                params_tweaks={"method": "pbe", "atm": False},
                realspace_cutoff={"disp2": 20.0, "disp3": 20.0, "width2": WIDTH * Bohr, "width3": WIDTH * Bohr},
            ),
        )
        properties = ["energy", "forces", *(["stress"] if atoms.pbc.all() else [])]
        for name in properties:
            a, b, c = (np.asarray(calculator.get_property(name, atoms)) for calculator in (plain, both, alone))
            assert np.abs(c).max() > 1e-4
            np.testing.assert_allclose(b - a, c, atol=1e-8)
    with pytest.raises(InputError, match="functional: required"):
        Calculator(tiny_release, fidelity="gfn2", d3={"damping": "bj"})


def test_fidelities_differ_and_none_is_the_default(tiny_release: Path):
    atoms = molecule("CH3CH2OH")
    energies = {}
    for name in ("gfn2", "pbe"):
        atoms.calc = Calculator(tiny_release, fidelity=name)
        energies[name] = atoms.get_potential_energy()
    assert energies["pbe"] < energies["gfn2"] - 1000, "PBE is all-electron, GFN2 counts valence electrons"
    with pytest.raises(TypeError, match="fidelity"):
        Calculator(tiny_release)
    with pytest.raises(InputError, match="unknown fidelity 'scan'; known fidelities: gfn2, pbe"):
        Calculator(tiny_release, fidelity="scan")
    with pytest.raises(InputError, match="float32, float64"):
        Calculator(tiny_release, fidelity="pbe", dtype="half")


def test_unknown_element_lists_the_known(tiny_release: Path):
    atoms = molecule("SiH4")
    atoms.calc = Calculator(tiny_release, fidelity="pbe")
    with pytest.raises(InputError, match=r"element Si is unknown.*known elements: H C N O"):
        atoms.get_potential_energy()


def test_single_precision_is_close_to_double(tiny_release: Path):
    atoms = molecule("CH3CH2OH")
    values = []
    for dtype in ("float32", "float64"):
        atoms.calc = Calculator(tiny_release, fidelity="pbe", dtype=dtype)
        values.append((atoms.get_potential_energy(), atoms.get_forces()))
    assert values[0][0] == pytest.approx(values[1][0], abs=1e-4)
    np.testing.assert_allclose(values[0][1], values[1][1], atol=1e-4)


def test_one_atom_and_no_stress_without_a_cell(tiny_release: Path):
    atoms = Atoms("H", calculator=Calculator(tiny_release, fidelity="gfn2"))
    assert np.isfinite(atoms.get_potential_energy())
    assert (atoms.get_forces() == 0).all()
    assert "stress" not in atoms.calc.results


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.positions.__setitem__(1, a.positions[0]), r"not finite: atoms 0 and 1 are 0 Å apart"),
        (lambda a: a.positions.__setitem__(1, np.nan), r"position nan Å of atom 1 along x"),
        (lambda a: a.positions.__setitem__(1, 1e9), r"position 1e\+09 Å of atom 1 along x.*within 1e\+06"),
        (
            lambda a: a.numbers.__setitem__(0, 119),
            r"element with atomic number 119 is unknown.*known elements: H C N O",
        ),
        (lambda a: a.numbers.__setitem__(0, -1), r"element with atomic number -1 is unknown"),
        (lambda a: a.numbers.__setitem__(0, 0), r"element X is unknown"),
        (lambda a: a.__delitem__(slice(None)), r"the structure has no atoms"),
        (lambda a: a.set_pbc(True), r"the cell has no volume"),
        (lambda a: a.set_pbc([False, False, True]), r"does not span the periodic directions"),
    ],
)
def test_a_structure_that_cannot_be_calculated(tiny_release: Path, change: Callable[[Atoms], None], message: str):
    atoms = molecule("CH4")
    atoms.calc = Calculator(tiny_release, fidelity="pbe")
    assert np.isfinite(atoms.get_potential_energy())
    change(atoms)
    with pytest.raises(InputError, match=message):
        atoms.get_potential_energy()


@pytest.mark.parametrize("device", ["banana", "cuda:99"])
def test_a_device_that_is_not_there(tiny_release: Path, device: str):
    with pytest.raises(InputError, match=f"device '{device}' cannot be used"):
        Calculator(tiny_release, fidelity="pbe", device=device)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_kept_neighbor_lists_change_nothing_along_a_trajectory(tiny_release: Path, dtype: str):
    rng = np.random.default_rng(0)
    atoms = bulk("C", "diamond", 3.7, cubic=True)
    kept, plain = (Calculator(tiny_release, "gfn2", dtype, skin=skin) for skin in (0.4, 0.0))
    for step in range(30):
        atoms.positions += rng.normal(0, 0.02, atoms.positions.shape)
        if step % 3 == 0:
            atoms.set_cell(atoms.cell.array @ (np.eye(3) + rng.normal(0, 2e-3, (3, 3))), scale_atoms=True)
        for name in ("energy", "forces", "stress"):
            a, b = kept.get_property(name, atoms), plain.get_property(name, atoms)
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 if dtype == "float64" else 1e-4)
    assert plain.neighbors.n_made == 30
    assert kept.neighbors.n_made < 20
    with pytest.raises(InputError, match="skin -1 Å"):
        Calculator(tiny_release, "gfn2", skin=-1)


def test_charge_and_spin_are_taken_from_the_structure():
    torch.manual_seed(0)
    backbone = {**TINY_BACKBONE, "charge_and_spin": True}
    config = validate(ModelConfig, {"backbone": backbone, "heads": {"hidden": [8]}}, "test")
    references = ElementReferences.from_dict({"references": {"pbe": {"H": -1.0, "O": -2.0}}})
    spec = PotentialSpec(config, FidelityTable([Fidelity("pbe", "PBE")]), references, avg_neighbors=2.0, scale=1.0)
    potential = spec.build()
    with torch.no_grad():  # the embeddings start at zero
        for name, parameter in potential.named_parameters():
            if "charges" in name or "spins" in name:
                parameter.normal_()
    atoms = molecule("H2O", calculator=Calculator(Loaded(spec, potential, Path("test"), "best", ""), "pbe"))
    energies = {}
    for charge, spin in ((0, 1), (1, 1), (1, 2), (0, 1)):
        atoms.info.update(charge=charge, spin_multiplicity=spin)
        energies.setdefault((charge, spin), []).append(atoms.get_potential_energy())
    assert len({e[0] for e in energies.values()}) == 3
    assert energies[0, 1][0] == energies[0, 1][1]
    atoms.info["charge"] = 0.5
    with pytest.raises(InputError, match=r"atoms.info\['charge'\] = 0.5: expected a whole number"):
        atoms.get_potential_energy()
    atoms.info["charge"] = 99
    with pytest.raises(InputError, match=r"charge 99: model.backbone.charge_and_spin covers"):
        atoms.get_potential_energy()
