"""The release that the project ships: it loads, says what it is, and predicts as when it was written."""

from pathlib import Path

import pytest
from ase.io import read

from mffm.deploy.ase import Calculator
from mffm.release import licence_chain, load

SHIPPED = Path(__file__).parents[3] / "data" / "shipped.safetensors"


def test_it_is_what_the_readme_says():
    loaded = load(SHIPPED)  # checks its reference outputs
    assert loaded.fidelities.names == ("gfn1", "gfn2", "pbe", "pbe_gpaw", "r2scan_gpaw")
    assert loaded.potential.is_conservative
    assert {source["licence"] for source in licence_chain(loaded.spec.provenance)} == {"MIT"}
    assert SHIPPED.stat().st_size < 5e6


@pytest.mark.parametrize("fidelity", ["gfn2", "pbe"])
def test_energies_of_a_molecule_come_with_an_error_bar(fidelity: str):
    frames = read(SHIPPED.with_name("molecules.extxyz"), ":40")
    errors = []
    calculator = Calculator(SHIPPED, fidelity=fidelity, uncertainty=True)
    for atoms in frames:
        label = atoms.info[f"energy_{fidelity}"]
        atoms.calc = calculator
        errors.append(abs(atoms.get_potential_energy() - label) / len(atoms))
        assert 0 < atoms.calc.results["energy_std"] < 1
    assert sum(errors) / len(errors) < 0.02  # eV/atom; most of these trained it
