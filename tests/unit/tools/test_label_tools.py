"""The labelling scripts against the shipped data: the same geometries, the same labels.

A level is its settings, so a label that is computed again must be the stored one: xTB to 1e-6 eV, PBE and CCSD(T) to
1 meV. GPAW's levels are not tested: GPAW needs a compiler and libxc and is no dependency.
"""

import itertools
from pathlib import Path

import label_crystals
import label_molecules
import labelling
import make_molecules
import numpy as np
import pytest
from ase import Atoms
from ase.io import iread
from labelling import Job

from mffm.label.engines import xtb

DATA = Path(__file__).parents[3] / "data"
MOLECULES = ("H2O", "HCN", "CH3OH", "N2O", "H2CO", "C2H4")


def stored_frames(name: str) -> list[Atoms]:
    return list(iread(DATA / name))


@pytest.fixture(scope="module")
def molecules() -> dict[str, Atoms]:
    """The first shipped frame of every molecule, by molecule."""
    found: dict[str, Atoms] = {}
    for frame in stored_frames("molecules.extxyz"):
        found.setdefault(frame.info["molecule"], frame)
    return found


def computed(stored: Atoms, levels: tuple[str, ...], script: object) -> Atoms:
    """Return the labels of a stored frame's geometry, computed now."""
    info = {key: value for key, value in stored.info.items() if key in ("frame_id", "charge", "multiplicity", "kmesh")}
    bare = Atoms(stored.numbers, stored.positions, cell=stored.cell, pbc=stored.pbc, info=info)
    done = script.label(Job(bare, levels))  # type: ignore[attr-defined]
    assert not [key for key in done.info if key.startswith("error_")], done.info
    return done


def energy_error(stored: Atoms, done: Atoms, level: str) -> float:
    return abs(done.info[f"energy_{level}"] - stored.info[f"energy_{level}"])


def forces_error(stored: Atoms, done: Atoms, level: str) -> float:
    return float(np.abs(done.arrays[f"forces_{level}"] - stored.arrays[f"forces_{level}"]).max())


@pytest.mark.usefixtures("label_codes")
@pytest.mark.parametrize("name", MOLECULES)
def test_xtb_of_molecules(name: str, molecules: dict[str, Atoms]) -> None:
    done = computed(molecules[name], ("gfn1", "gfn2"), label_molecules)
    for level in ("gfn1", "gfn2"):
        assert energy_error(molecules[name], done, level) < 1e-6
        assert forces_error(molecules[name], done, level) < 1e-5
        assert done.info[f"cpu_s_{level}"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("label_codes")
@pytest.mark.parametrize("name", MOLECULES)
def test_pbe_and_coupled_cluster_of_molecules(name: str, molecules: dict[str, Atoms]) -> None:
    stored = molecules[name]
    done = computed(stored, ("pbe", "ccsdt"), label_molecules)
    assert energy_error(stored, done, "pbe") < 1e-3
    assert forces_error(stored, done, "pbe") < 1e-3
    assert energy_error(stored, done, "ccsdt") < 1e-3
    assert done.info["t1_diagnostic"] == pytest.approx(stored.info["t1_diagnostic"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("label_codes")
def test_all_electron_coupled_cluster_forces_are_the_gradient(molecules: dict[str, Atoms]) -> None:
    water = molecules["H2O"]
    forces = computed(water, ("ccsdt_ae",), label_molecules).arrays["forces_ccsdt_ae"]
    energies = []
    for step in (-1e-3, 1e-3):
        moved = water.copy()
        moved.positions[0, 0] += step
        energies.append(label_molecules.LEVELS["ccsdt_ae"].compute(moved).energy)
    assert forces[0, 0] == pytest.approx(-(energies[1] - energies[0]) / 2e-3, abs=1e-3)


@pytest.mark.usefixtures("label_codes")
def test_what_would_be_a_wrong_label_is_an_error(molecules: dict[str, Atoms], monkeypatch: pytest.MonkeyPatch) -> None:
    from pyscf import dft

    water = molecules["H2O"]
    monkeypatch.setattr(dft.rks.RKS, "max_cycle", 2)  # PySCF returns a number all the same, 9 eV off
    done = label_molecules.label(Job(water, ("pbe",)))
    assert done.info["error_pbe"].startswith("convergence: ")
    argon = Atoms("ArH2", [[0, 0, 0], [0, 0, 3], [0, 0, 3.7]], info={"frame_id": "argon"})
    done = label_molecules.label(Job(argon, ("ccsdt",)))
    assert done.info["error_ccsdt"].startswith("input: ")


def test_molecules_that_these_levels_cannot_do_are_left_out(
    molecules: dict[str, Atoms], capsys: pytest.CaptureFixture[str]
) -> None:
    radical = Atoms("OH", [[0, 0, 0], [0, 0, 1]], info={"frame_id": "radical"})
    anion = Atoms("OH", [[0, 0, 0], [0, 0, 1]], info={"frame_id": "anion", "charge": -1})
    triplet = Atoms("O2", [[0, 0, 0], [0, 0, 1.2]], info={"frame_id": "triplet", "multiplicity": 3})
    kept = labelling.report_left_out(
        [radical, anion, triplet, molecules["H2O"]], lambda frame: label_molecules.reason_to_leave_out(frame, 12)
    )
    assert [frame.info["frame_id"] for frame in kept] == ["anion", molecules["H2O"].info["frame_id"]]
    assert "left out, odd number of electrons: 1 (first: radical)" in capsys.readouterr().out


@pytest.mark.usefixtures("label_codes")
@pytest.mark.parametrize(
    ("file", "frame_id", "n"),
    [
        ("crystals", "diamond-C-1", (2, 2, 3)),  # stopped by the 120 atoms
        pytest.param("alloys", "alloy-rocksalt-MgCaO-2-0", (2, 2, 2), marks=pytest.mark.slow),
    ],
)
def test_gfn1_of_crystals(file: str, frame_id: str, n: tuple[int, ...]) -> None:
    stored = next(frame for frame in stored_frames(f"{file}.extxyz") if frame.info["frame_id"] == frame_id)
    done = computed(stored, ("gfn1",), label_crystals)
    assert tuple(done.info["gfn1_repeat"]) == n
    assert energy_error(stored, done, "gfn1") < 1e-6
    assert forces_error(stored, done, "gfn1") < 1e-5
    np.testing.assert_allclose(done.info["stress_gfn1"], stored.info["stress_gfn1"], atol=1e-6)


@pytest.mark.parametrize(
    ("file", "made"),
    [
        ("crystals", lambda: label_crystals.generate_compounds(7, 0)),
        ("alloys", lambda: label_crystals.generate_alloys(2, 0)),
    ],
)
def test_the_shipped_cells_are_generated_again(file: str, made: object) -> None:
    cells = {cell.info["frame_id"]: cell for cell in made()}  # type: ignore[operator]
    stored = stored_frames(f"{file}.extxyz")
    assert len(stored) == len(cells)
    for frame in stored:
        cell = cells[frame.info["frame_id"]]
        assert list(frame.symbols) == list(cell.symbols)
        np.testing.assert_allclose(frame.positions, cell.positions, atol=1e-8)
        np.testing.assert_allclose(frame.cell, cell.cell, atol=1e-12)
        for key in set(cell.info) - {"kmesh"}:
            assert frame.info[key] == cell.info[key]


def test_other_seeds_have_other_names_and_other_cells() -> None:
    for make in (label_crystals.generate_compounds, label_crystals.generate_alloys):
        first, second = make(3, 0), make(3, 1)
        assert not {c.info["frame_id"] for c in first} & {c.info["frame_id"] for c in second}
        assert not np.allclose(first[2].positions, second[2].positions, atol=1e-3)


def test_short_cells_are_repeated() -> None:
    for cell in itertools.chain(label_crystals.generate_compounds(1, 0), label_crystals.generate_alloys(0, 0)):
        n = label_crystals.repeats(cell)
        assert np.prod(n) * len(cell) <= label_crystals.GFN1_ATOMS
        longer = n + (np.arange(3) == np.argmin(cell.cell.lengths() * n))
        capped = np.prod(longer) * len(cell) > label_crystals.GFN1_ATOMS
        assert (cell.cell.lengths() * n).min() >= xtb.GAMMA_LENGTH or capped


def test_held_out_molecules_are_the_shipped_ones(molecules: dict[str, Atoms]) -> None:
    made = make_molecules.small_molecules()
    assert set(made) == set(molecules)
    assert {name for name, frame in molecules.items() if frame.info["holdout"]} == set(make_molecules.HOLDOUT)
    for name, frame in molecules.items():
        assert list(frame.numbers) == list(made[name].numbers)
