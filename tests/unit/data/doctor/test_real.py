"""The faults that are known to be in published sets, found in the files as published; and the shipped data."""

import os
from pathlib import Path

import numpy as np
import pytest

from mffm.data.doctor import Diagnosis, examine

ROOT = Path(__file__).parents[4]
DATA = os.environ.get("MFFM_DATA")
published = pytest.mark.skipif(DATA is None, reason="MFFM_DATA, the folder of published sets, is not set")


def files(folder: str, *names: str) -> list[Path]:
    paths = [Path(str(DATA)) / folder / name for name in names]
    for path in paths:
        if not path.is_file():
            pytest.skip(f"{path} is not there")
    return paths


def kinds(diagnosis: Diagnosis, severity: str) -> set[str]:
    return {f.check for f in diagnosis.findings if f.severity == severity}


def message(diagnosis: Diagnosis, check: str) -> str:
    (finding,) = [f for f in diagnosis.findings if f.check == check]
    return finding.message


@published
def test_3bpa_shares_31_frames():
    diagnosis = examine(files("botnet/dataset_3BPA", "train_300K.xyz", "train_mixedT.xyz", "iso_atoms.xyz"))
    assert message(diagnosis, "overlap") == "31 structures are in train_300K.xyz and train_mixedT.xyz"
    assert kinds(diagnosis, "error") == set()
    assert kinds(diagnosis, "warning") == {"overlap"}


@published
def test_solvent_generation_one_shares_53_of_56():
    names = ("solvent_xtb_train_200.xyz", "solvent_xtb_train_53_gen1.xyz")
    diagnosis = examine(files("solvent_gfn2", *names))
    shared = message(diagnosis, "overlap")
    assert shared == f"50 structures (and 3 isolated atoms) are in {' and '.join(names)}"
    assert diagnosis.coverage.frames[names[1]] == 56
    assert kinds(diagnosis, "error") == set()


@published
def test_mptrj_shares_8_ids_and_contradicts_itself():
    """Three pairs have their atoms in the same order, six more in another (pymatgen's matcher agrees on all nine)."""
    random, stress = files("mattersim_pbe", "mptrj-random-1k.xyz", "mptrj-highest-stress-1k.xyz")
    diagnosis = examine([random, stress])
    assert "8 values of mptrj_traj_id" in message(diagnosis, "shared_ids")
    (conflict,) = [f for f in diagnosis.findings if f.severity == "error"]
    assert conflict.check == "conflict"
    pairs = {tuple(int(p.rpartition(":")[2]) for p in place.split(" and ")) for place, _ in conflict.evidence}
    assert {(6, 7), (161, 167), (537, 541)} < pairs
    assert len(pairs) == 9
    assert dict(conflict.evidence)[f"{stress}:537 and {stress}:541"] == "energy -63.267692 and -62.914849 eV"


@published
def test_s66x8_has_gradients_in_hartree_per_angstrom(tmp_path):
    h5py = pytest.importorskip("h5py")
    (path,) = files("comp6_s66x8", "s66x8_wb97x6-31gd.h5")
    for unit, factor in (("Hartree", 1.0), ("eV", 27.211386)):
        converted = tmp_path / f"{unit}.extxyz"
        with h5py.File(path) as file, converted.open("w") as out:
            for group in file["s66x8"].values():
                symbols = [s.decode() if isinstance(s, bytes) else str(s) for s in group["species"][()]]
                for x, energy, forces in zip(group["coordinates"], group["energies"], group["forces"], strict=True):
                    out.write(f"{len(symbols)}\nProperties=species:S:1:pos:R:3:forces:R:3 ")
                    out.write(f'energy={float(energy) * factor:.10f} pbc="F F F"\n')
                    for symbol, row in zip(symbols, np.hstack([x, forces]).tolist(), strict=True):
                        out.write(f"{symbol} {' '.join(f'{v:.10f}' for v in row)}\n")
        diagnosis = examine([converted])
        forces_finding = message(diagnosis, "forces")
        assert "gradients given as forces" in forces_finding
        if unit == "Hartree":
            assert kinds(diagnosis, "error") == {"forces", "energy_unit"}
            assert "give labels.unnamed.energy.unit: Hartree" in message(diagnosis, "energy_unit")
        else:
            assert kinds(diagnosis, "error") == {"forces"}
            assert "forces in Hartree/Angstrom" in forces_finding


@published
def test_ethanol_has_a_singlet_carbon():
    """In its isolated atoms; those of 3BPA, and of acetylacetone, are sound."""
    ethanol = files("botnet/dataset_ethanol", "train.xyz", "isolated_atoms.xyz")
    diagnosis = examine(ethanol)
    assert kinds(diagnosis, "warning") == {"isolated_atoms"}
    (finding,) = [f for f in diagnosis.findings if f.check == "isolated_atoms"]
    assert any("isolated C: -1025.277" in what for _, what in finding.evidence)
    acac = files("botnet/dataset_acac", "train_300K.xyz", "isolated_atoms.xyz")
    assert kinds(examine(acac), "warning") == set()
    both = examine([ethanol[1], *acac])
    (conflict,) = [f for f in both.findings if f.check == "conflict"]
    assert any("-1025.2771 and -1026.8539" in what for _, what in conflict.evidence)


@published
def test_benchmark_set_in_the_training_data():
    """Of the solvent's test set one structure, a single molecule, is in its training set, seven times."""
    train, test = files("solvent_gfn2", "solvent_xtb_train_200.xyz", "solvent_xtb_test.xyz")
    diagnosis = examine([train], against=[test])
    assert kinds(diagnosis, "error") == {"benchmark"}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("molecules_many", "molecules_wide")]


@pytest.mark.parametrize("name", ["molecules", "molecules_forces", "crystals", "alloys", *SLOW])
def test_shipped_data_have_no_error(name):
    diagnosis = examine([ROOT / "configs" / "data" / f"{name}.yaml"])
    assert kinds(diagnosis, "error") == set()
    assert kinds(diagnosis, "warning") <= {"net_force"}
