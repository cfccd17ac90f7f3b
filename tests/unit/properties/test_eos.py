"""Equations of state: a curve that is known, and a crystal of an ASE calculator."""

from pathlib import Path

import numpy as np
import pytest
from ase import units
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.eos import birchmurnaghan

from mffm.errors import InputError
from mffm.properties import eos as module

V0 = 75.0
VOLUMES = np.linspace(65, 85, 9)


def energy(volume: np.ndarray, v0: float = V0, bulk_modulus: float = 160.0) -> np.ndarray:
    return np.asarray(birchmurnaghan(volume, -40.0, bulk_modulus * units.GPa, 4.2, v0))


def test_fit_of_a_known_curve():
    fitted = module.fit(VOLUMES, energy(VOLUMES))
    assert fitted is not None
    assert fitted.volume == pytest.approx(V0, rel=1e-5)
    assert fitted.bulk_modulus == pytest.approx(160, rel=1e-4)
    assert fitted.derivative == pytest.approx(4.2, rel=1e-3)
    np.testing.assert_allclose(fitted.energies(VOLUMES), energy(VOLUMES), atol=1e-6)


@pytest.mark.parametrize("energies", [energy(VOLUMES, v0=100.0), -energy(VOLUMES), np.full(9, np.nan), VOLUMES * 0.1])
def test_no_minimum_is_no_number(energies: np.ndarray):
    assert module.fit(VOLUMES, energies) is None


def test_copper(tmp_path: Path):
    """EMT's copper: a0 3.59 Å and B 134 GPa (Jacobsen, Stoltze, Nørskov 1996)."""
    atoms = bulk("Cu", cubic=True, a=3.6)
    atoms.calc = EMT()
    result = module.eos(atoms, strain=0.03, points=7)
    found = result.found()
    assert found["cell_lengths_ang"] == pytest.approx([3.59] * 3, abs=0.01)
    assert found["bulk_modulus_gpa"] == pytest.approx(134, rel=0.03)
    module.draw(result, tmp_path / "eos.png")
    assert (tmp_path / "eos.png").stat().st_size > 5000


def test_what_has_no_volume_and_too_few_points():
    with pytest.raises(InputError, match="H2O is not periodic in all directions"):
        module.eos(molecule("H2O"))
    with pytest.raises(InputError, match="4 points"):
        module.eos(bulk("Cu"), points=4)


def test_cells_that_do_not_relax_are_counted():
    atoms = bulk("Cu", cubic=True, a=3.6)
    atoms.rattle(0.1, seed=1)
    atoms.calc = EMT()
    result = module.eos(atoms, points=5, relaxed=True, fmax=1e-3, steps=1)
    assert result.n_not_relaxed == result.found()["n_not_relaxed"] == 5
    assert module.eos(atoms, points=5, relaxed=True, fmax=0.05).n_not_relaxed == 0
