"""Relaxations: known minima of an ASE calculator, cell filters, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from ase import units
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones

from mffm.errors import InputError
from mffm.properties import relax as module


@pytest.mark.parametrize("optimizer", ["lbfgs", "fire"])
def test_a_molecule_comes_to_its_minimum(optimizer: str):
    atoms = molecule("N2")
    atoms.positions *= 1.1
    atoms.calc = EMT()
    before = atoms.positions.copy()
    found = module.relax(atoms, optimizer, fmax=0.005)
    assert found.converged
    assert found.atoms.get_distance(0, 1) == pytest.approx(0.998, abs=0.01)
    assert np.linalg.norm(found.atoms.get_forces(), axis=1).max() < 0.005
    assert found.energies[-1] < found.energies[0]
    np.testing.assert_array_equal(atoms.positions, before)


def test_cells():
    atoms = bulk("Cu", cubic=True, a=3.7)
    atoms.set_cell(atoms.cell.array @ np.diag([1.0, 1.0, 1.04]), scale_atoms=True)
    atoms.calc = EMT()
    full = module.relax(atoms, cell="full", fmax=0.002)
    np.testing.assert_allclose(full.atoms.cell.lengths(), 3.59, atol=0.005)
    np.testing.assert_allclose(full.atoms.get_stress(), 0, atol=1e-3)
    assert full.volume_change == pytest.approx(full.atoms.get_volume() / atoms.get_volume() - 1)
    volume = module.relax(atoms, cell="volume", fmax=0.002).atoms.cell.lengths()
    assert volume[2] / volume[0] == pytest.approx(1.04)
    shape = module.relax(atoms, cell="shape", fmax=0.002)
    assert shape.volume_change == pytest.approx(0, abs=1e-9)
    assert np.ptp(shape.atoms.cell.lengths()) < 0.01
    pressed = module.relax(atoms, cell="full", fmax=0.002, pressure=10.0)
    assert -np.trace(pressed.atoms.get_stress(voigt=False)) / 3 / units.GPa == pytest.approx(10, abs=0.1)


def test_steps_that_do_not_suffice_and_the_plot(tmp_path: Path):
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=1)
    atoms.calc = EMT()
    found = module.relax(atoms, steps=2)
    assert not found.converged
    assert found.found()["n_steps"] == 2
    module.draw(found, tmp_path / "relax.png")
    assert (tmp_path / "relax.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": "newton"}, "known are fire, lbfgs"),
        ({"cell": "all"}, "known are fixed, full, shape, volume"),
        ({"pressure": 1.0}, "on a fixed cell"),
        ({"cell": "full"}, "N2 is not periodic"),
    ],
)
def test_refused(arguments: dict, message: str):
    atoms = molecule("N2")
    atoms.calc = EMT()
    with pytest.raises(InputError, match=message):
        module.relax(atoms, **arguments)


def test_a_space_group_that_is_kept_and_strains_that_are_not_free():
    atoms = bulk("Cu", cubic=True, a=3.7)
    atoms.set_cell(atoms.cell.array @ np.diag([1.0, 1.0, 1.04]), scale_atoms=True)
    atoms.calc = EMT()
    lengths = module.relax(atoms, cell="full", fmax=0.002, strains=[False, False, True, False, False, False])
    np.testing.assert_allclose(lengths.atoms.cell.lengths()[:2], 3.7)
    assert lengths.atoms.cell.lengths()[2] < 3.6
    atoms = bulk("Cu", cubic=True)
    atoms.calc = EMT()
    atoms.positions[0, 0] += 1e-3  # within the tolerance: taken for the site itself
    kept = module.relax(atoms, fmax=1e-6, symprec=0.01)
    np.testing.assert_allclose(kept.atoms.get_distances(0, [1, 2, 3], mic=True), 3.61 / 2**0.5, atol=1e-3)


@pytest.mark.parametrize("apart", [1e-60, 0.05])
def test_forces_beyond_reason(apart: float):
    atoms = molecule("N2")
    atoms.set_distance(0, 1, apart)
    atoms.calc = LennardJones()
    with pytest.raises(module.Diverged, match="after 0 steps of relaxing N2"), np.errstate(all="ignore"):
        module.relax(atoms, largest_force=1e4)
