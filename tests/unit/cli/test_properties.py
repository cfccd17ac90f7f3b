"""Property commands: each writes its report, goes on or refuses; numbers are those of the drivers."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.io import read, write
from click.testing import Result
from typer.testing import CliRunner

from mffm.cli import app
from mffm.deploy.ase import Calculator
from mffm.errors import InputError
from mffm.properties.eos import eos

Run = Callable[..., Result]


@pytest.fixture
def crystal(tmp_path: Path) -> Path:
    atoms = bulk("C", "diamond", a=3.6, cubic=True)
    atoms.rattle(0.02, seed=0)
    write(tmp_path / "c.extxyz", atoms)
    return tmp_path / "c.extxyz"


@pytest.fixture
def run(tiny_release: Path) -> Run:
    def run(command: str, structure: Path, folder: Path, *options: str) -> Result:
        arguments = [command, str(tiny_release), str(structure), str(folder), "--fidelity", "gfn2", *options]
        return CliRunner().invoke(app, arguments)

    return run


def report(folder: Path, name: str) -> dict:
    """Return the JSON of a report whose Markdown and plot are there too."""
    assert (folder / f"{name}.png").stat().st_size > 3000
    assert f"![{name}]({name}.png)" in (folder / f"{name}.md").read_text()
    found = json.loads((folder / f"{name}.json").read_text())
    assert found["made_by"]["fidelity"] == "gfn2"
    assert len(found["made_by"]["weights_sha256"]) == 64
    return found


def test_relax(run: Run, crystal: Path, tmp_path: Path):
    done = run("relax", crystal, tmp_path / "r", "--steps", "3", "--fmax", "1e-6")
    assert done.exit_code == 1
    assert "not converged in 3 steps" in done.output
    found = report(tmp_path / "r", "relax")
    assert found["n_steps"] == 3
    assert found["energy_change_ev"] == pytest.approx(found["energies_ev"][-1] - found["energies_ev"][0])
    relaxed = read(tmp_path / "r" / "relaxed.extxyz")
    assert relaxed.get_potential_energy() == pytest.approx(found["energy_ev"])
    assert run("relax", crystal, tmp_path / "r", "--fmax", "100").exit_code == 0


def test_relax_many(run: Run, tmp_path: Path):
    frames = [bulk("C", "diamond", a=a, cubic=True) for a in (3.5, 3.6)]
    for atoms in frames:
        atoms.rattle(0.05, seed=1)
    write(tmp_path / "many.extxyz", frames)
    done = run("relax", tmp_path / "many.extxyz", tmp_path / "m", "--batched", "--fmax", "0.5", "--steps", "100")
    found = report(tmp_path / "m", "relax")
    assert (done.exit_code == 0) == all(found["converged"])
    assert len(read(tmp_path / "m" / "relaxed.extxyz", ":")) == 2
    assert all(change < 0 for change in found["energy_changes_mev_per_atom"])
    one = run("eos", tmp_path / "many.extxyz", tmp_path / "e")
    assert isinstance(one.exception, InputError)
    assert "2 structures; say which with --index 0 to 1" in str(one.exception)


def test_md_goes_on(run: Run, crystal: Path, tmp_path: Path):
    options = ["--ensemble", "nve", "--timestep", "0.5", "log_every=1", "save_every=5"]
    assert run("md", crystal, tmp_path / "md", "--steps", "5", *options).exit_code == 0
    done = run("md", crystal, tmp_path / "md", "--steps", "10", *options)
    assert done.exit_code == 0, done.output
    assert "went on from step 5" in done.output
    found = report(tmp_path / "md", "md")
    assert found["n_steps"] == 10
    assert abs(found["energy_drift_ev_per_atom_per_ps"]) < 0.1
    assert len(read(tmp_path / "md" / "trajectory.extxyz", ":")) == 3
    other = run("md", crystal, tmp_path / "md", "--steps", "10", *options, "seed=1")
    assert "its trajectory has seed 0, now 1" in str(other.exception)
    unknown = run("md", crystal, tmp_path / "md", "--steps", "10", "tau=3")
    assert "tau: unknown key; known keys here: barostat_time" in str(unknown.exception)


def test_phonons(run: Run, crystal: Path, tmp_path: Path):
    write(crystal, bulk("C", "diamond", a=3.6, cubic=True))
    done = run("phonons", crystal, tmp_path / "p", "--as-given", "--supercell", "1", "1", "1")
    assert done.exit_code == 0, done.exception
    found = report(tmp_path / "p", "phonons")
    assert found["supercell"] == [1, 1, 1]
    assert (found["n_displacements"], found["n_atoms_primitive"]) == (1, 2)
    assert (tmp_path / "p" / "phonopy.yaml").stat().st_size > 1000


def test_elastic_and_eos(run: Run, crystal: Path, tmp_path: Path, tiny_release: Path):
    assert run("elastic", crystal, tmp_path / "e", "--as-given", "--clamped").exit_code == 0
    found = report(tmp_path / "e", "elastic")
    assert len(found["stresses_gpa"]) == 24
    tensor = np.array(found["elastic_tensor_gpa"])
    assert found["bulk_modulus_voigt_gpa"] == pytest.approx(tensor[:3, :3].mean(), rel=1e-6)
    atoms = read(crystal)
    atoms.calc = Calculator(tiny_release, "gfn2", "float64")
    done = run("eos", crystal, tmp_path / "e", "--strain", "0.05", "--points", "7")
    found = report(tmp_path / "e", "eos")
    assert found["energies_ev"] == pytest.approx(eos(atoms, 0.05, 7).energies.tolist(), abs=1e-6)
    assert (done.exit_code == 1) == ("no minimum within these volumes" in done.output) == (not found["has_minimum"])


def test_strained_cells_that_do_not_relax(run: Run, crystal: Path, tmp_path: Path):
    for command, n in (("eos", 5), ("elastic", 24)):
        options = ["--relax", "--points", "5"] if command == "eos" else ["--as-given"]
        done = run(command, crystal, tmp_path / "s", *options, "--fmax", "1e-9", "--steps", "1")
        assert done.exit_code == 1
        assert f"{n} strained cells not relaxed; give a larger --fmax or more --steps" in done.output
        assert report(tmp_path / "s", command)["n_not_relaxed"] == n
        assert f"| strained cells relaxed | 0 of {n} |" in (tmp_path / "s" / f"{command}.md").read_text()


def test_refused(run: Run, crystal: Path, tmp_path: Path):
    write(tmp_path / "water.xyz", molecule("H2O"))
    for command in ("phonons", "elastic", "eos"):
        done = run(command, tmp_path / "water.xyz", tmp_path / "x")
        assert "is not periodic in all directions" in str(done.exception)
    assert "--index 3: " in str(run("eos", crystal, tmp_path / "x", "--index", "3").exception)
    assert "none.xyz: no such file" in str(run("eos", tmp_path / "none.xyz", tmp_path / "x").exception)
    for option, value in (("--pressure", "5"), ("--optimizer", "lbfgs")):
        done = run("relax", crystal, tmp_path / "x", "--batched", "--cell", "full", option, value)
        assert "leave --pressure and --optimizer out" in str(done.exception)
    write(tmp_path / "silane.xyz", molecule("SiH4"))
    assert "Si is unknown" in str(run("relax", tmp_path / "silane.xyz", tmp_path / "x").exception)
