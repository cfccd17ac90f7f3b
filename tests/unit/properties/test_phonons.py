"""Phonons of an ASE calculator: sum rules, limits of the heat, and the report."""

from pathlib import Path

import numpy as np
import pytest
from ase import units
from ase.build import bulk, molecule
from ase.calculators.emt import EMT

from mffm.errors import InputError
from mffm.properties import phonons as module

pytest.importorskip("phonopy")


def test_aluminium(tmp_path: Path):
    """EMT's aluminium: acoustic modes vanish at Γ, heat goes to 3 k per atom, highest frequency about 8 to 10 THz."""
    atoms = bulk("Al", cubic=True, a=3.994)
    atoms.calc = EMT()
    seen: list[int] = []
    result = module.phonons(atoms, (2, 2, 2), mesh=30.0, each=lambda done, of: seen.append(of))
    assert seen == [1]  # one displacement suffices in fcc
    found = result.found()
    assert found["n_atoms_primitive"] == 1
    assert found["is_stable"]
    assert 6 < result.highest < 12
    np.testing.assert_allclose(result.branches[0][1][0], 0, atol=1e-3)
    heat = found["heat_capacity_ev_per_k"] / (3 * units.kB)
    assert heat[0] == 0
    assert heat[-1] == pytest.approx(1, abs=0.03)
    assert (np.diff(heat) > 0).all()
    # the free energy's slope is minus the entropy
    slope = np.gradient(found["free_energy_ev"], found["temperatures_k"])
    np.testing.assert_allclose(slope[2:-2], -found["entropy_ev_per_k"][2:-2], rtol=0.03)
    assert [name for _, name in result.ticks] == ["Γ", "X", "W", "K", "Γ", "L", "U", "W", "L", "K|U", "X"]
    module.draw(result, tmp_path / "phonons.png")
    assert (tmp_path / "phonons.png").stat().st_size > 10_000


def test_an_unstable_crystal_and_the_size_of_the_supercell():
    atoms = bulk("Al", "sc", a=2.7)
    atoms.calc = EMT()
    result = module.phonons(atoms, min_length=8.0, mesh=20.0)
    assert result.supercell.tolist() == [3, 3, 3]
    assert not result.found()["is_stable"]


def test_a_molecule():
    with pytest.raises(InputError, match="N2 is not periodic"):
        module.phonons(molecule("N2"))
