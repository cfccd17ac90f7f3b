"""Which keys of a file are labels is told from names and shapes; what cannot be told is one clear error."""

from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from mffm.data.guess import Guess, guess, read_keys
from mffm.errors import InputError
from mffm.keys import Property


def write(path: Path, info: dict[str, object], vectors: tuple[str, ...] = (), is_periodic: bool = False) -> Path:
    atoms = Atoms("OH2", np.eye(3), info=info)
    if is_periodic:
        atoms.set_cell([5, 5, 5])
        atoms.pbc = True
    for name in vectors:
        atoms.arrays[name] = np.ones((3, 3))
    ase.io.write(path, [atoms] * 2, format="extxyz")
    return path


def of(path: Path, **given: str) -> Guess:
    named: dict[Property, str] = dict(given)  # type: ignore[arg-type]
    return guess(read_keys(path), named, "--low")


def shown(found: Guess) -> dict[str, str]:
    return {prop: spec.key for prop, spec in found.labels.items()}


@pytest.mark.parametrize(
    ("info", "vectors", "expected"),
    [
        ({"energy": -1.0}, ("forces",), {"energy": "energy", "forces": "forces"}),
        ({"REF_energy": -1.0}, ("REF_forces", "momenta"), {"energy": "REF_energy", "forces": "REF_forces"}),
        ({"TotEnergy": -1.0, "formation_energy_per_atom": 1.0}, (), {"energy": "TotEnergy"}),
        ({"energy": -1.0, "free_energy": -1.1, "zpe_energy": 0.1}, (), {"energy": "energy"}),
        ({"E_tot": -1.0, "bandgap": 2.0}, ("force",), {"energy": "E_tot", "forces": "force"}),
        ({"dft_energy": -1.0, "energy": 0.0}, ("forces", "dft_forces"), {"energy": "energy", "forces": "forces"}),
    ],
)
def test_names_that_are_in_use(tmp_path: Path, info: dict[str, object], vectors: tuple[str, ...], expected: dict):
    assert shown(of(write(tmp_path / "a.extxyz", info, vectors))) == expected


def test_the_forces_of_a_named_energy_go_with_it(tmp_path: Path):
    path = write(tmp_path / "a.xyz", {"energy_pbe": -1.0, "energy_gfn2": -2.0}, ("forces_pbe", "forces_gfn2"))
    with pytest.raises(InputError, match=r"several keys look like energy: energy_gfn2, energy_pbe; .*--low-energy KEY"):
        of(path)
    found = of(path, energy="energy_pbe")
    assert shown(found) == {"energy": "energy_pbe", "forces": "forces_pbe"}
    assert any("forces_gfn2" in note for note in found.notes)
    assert shown(of(path, energy="energy_pbe", forces="forces_gfn2"))["forces"] == "forces_gfn2"
    with pytest.raises(InputError, match=r"--low-energy nothing: no frame of .*a.xyz has it; keys: .*energy_pbe"):
        of(path, energy="nothing")


@pytest.mark.parametrize(
    ("low", "forces", "stress"),
    [
        ("energy_gfn2", "forces_gfn2", "stress_gfn2"),
        ("gfn2_energy", "gfn2_gradient", "virial_gfn2"),
        ("E_gfn2", "F_gfn2", "gfn2_stress"),
        ("energy", "forces", "stress"),
    ],
)
def test_forces_and_stress_of_another_level_are_no_labels(tmp_path: Path, low: str, forces: str, stress: str):
    info = {low: -1.0, "energy_ccsdt": -2.0, stress: np.eye(3)}
    path = write(tmp_path / "all.extxyz", info, (forces,), is_periodic=True)
    high = of(path, energy="energy_ccsdt")
    assert shown(high) == {"energy": "energy_ccsdt"}
    assert f"{forces} is left out: it goes with {low} (--low-forces {forces} takes it)" in high.notes
    assert f"{stress} is left out: it goes with {low} (--low-stress {stress} takes it)" in high.notes
    assert shown(of(path, energy=low)) == {"energy": low, "forces": forces, "stress": stress}
    named = of(path, energy="energy_ccsdt", forces=forces)
    assert shown(named) == {"energy": "energy_ccsdt", "forces": forces}
    assert not any("forces" in note and "left out" in note for note in named.notes)


def test_forces_go_with_free_energies_too(tmp_path: Path):
    path = write(tmp_path / "a.extxyz", {"energy": -1.0, "free_energy": -1.1}, ("forces",))
    assert shown(of(path, energy="free_energy")) == {"energy": "free_energy", "forces": "forces"}


def test_gradients_virials_and_stress_without_a_cell(tmp_path: Path):
    found = of(write(tmp_path / "a.xyz", {"energy": -1.0, "virial": np.eye(3)}, ("gradient",), is_periodic=True))
    assert found.labels["forces"].negate
    assert found.labels["stress"].virial
    assert len(found.notes) == 2
    assert "stress" not in of(write(tmp_path / "b.xyz", {"energy": -1.0, "stress": np.zeros(6)})).labels


def test_charge_and_spin_are_found(tmp_path: Path):
    found = of(write(tmp_path / "a.xyz", {"energy": -1.0, "charge": 1, "multiplicity": 2}))
    assert (found.charge_key, found.spin_multiplicity_key) == ("charge", "multiplicity")


def test_a_file_that_ase_reads(tmp_path: Path):
    atoms = Atoms("OH2", np.eye(3))
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.ones((3, 3)))
    ase.io.write(tmp_path / "a.traj", atoms)
    assert shown(of(tmp_path / "a.traj")) == {"energy": "energy", "forces": "forces"}


def test_no_label_and_no_file(tmp_path: Path):
    with pytest.raises(InputError, match=r"no key looks like the total energy.*--low-energy KEY; keys: dipole_length"):
        of(write(tmp_path / "a.xyz", {"dipole_length": 1.0}))
    with pytest.raises(InputError, match=r"none.xyz: no such file"):
        read_keys(tmp_path / "none.xyz")
    (tmp_path / "empty.xyz").write_text("")
    with pytest.raises(InputError, match=r"empty.xyz: has no frame that can be read"):
        read_keys(tmp_path / "empty.xyz")
