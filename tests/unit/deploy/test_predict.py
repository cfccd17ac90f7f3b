"""Labels of a file's structures: equal to the calculator's, in order, and a killed run goes on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from typer.testing import CliRunner

from mffm.cli import app
from mffm.deploy.ase import Calculator
from mffm.deploy.at_fidelity import AtFidelity
from mffm.deploy.predict import count_frames, predict, predict_file
from mffm.errors import InputError

NAMES = ("H2O", "CH3CH2OH", "NH3", "C6H6", "CO", "H")


def frames() -> list[Atoms]:
    found = [molecule(name) for name in NAMES] + [bulk("C", "diamond", 3.6, cubic=True)]
    for i, atoms in enumerate(found):
        atoms.rattle(0.05, seed=i)
        atoms.info["name"] = i
    found[0].calc = SinglePointCalculator(found[0], energy=1.5, forces=np.ones((3, 3)))
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write(tmp_path / "in.extxyz", frames())
    return tmp_path / "in.extxyz"


@pytest.mark.parametrize("edge_budget", [1, 400, 10**6])
def test_equals_the_calculator(tiny_release: Path, source: Path, tmp_path: Path, edge_budget: int):
    at = AtFidelity(tiny_release, "pbe", "float64")
    summary = predict_file(at, source, tmp_path / "out.extxyz", edge_budget)
    assert (summary.n_frames, summary.n_before, summary.n_failed) == (7, 0, 0)
    assert not list(tmp_path.glob("out.extxyz.*"))
    calculator = Calculator(tiny_release, fidelity="pbe", dtype="float64")
    for found, atoms in zip(read(tmp_path / "out.extxyz", ":"), frames(), strict=True):
        assert found.info["name"] == atoms.info["name"]
        assert found.info["fidelity"] == "pbe"
        atoms.positions = found.positions  # extxyz keeps eight digits
        calculator.calculate(atoms)
        for key, value in calculator.results.items():
            np.testing.assert_allclose(found.calc.results[key], value, atol=3e-8, rtol=1e-12)
        assert ("stress" in found.calc.results) == atoms.pbc.all()
    first = read(tmp_path / "out.extxyz", 0)
    assert first.info["energy_source"] == 1.5
    assert (first.arrays["forces_source"] == 1).all()


def test_what_cannot_be_calculated(tiny_release: Path, tmp_path: Path):
    bad = [molecule("H2O"), molecule("SiH4"), molecule("NH3"), molecule("CH4"), Atoms("H", cell=np.eye(3), pbc=True)]
    bad[3].positions[1] = bad[3].positions[0]
    bad[4].cell[:] = 0
    write(tmp_path / "in.extxyz", bad[:4])
    at = AtFidelity(tiny_release, "pbe")
    with pytest.raises(InputError, match=r"frame 1 \(H4Si\): element Si is unknown.*--skip-failures"):
        predict_file(at, tmp_path / "in.extxyz", tmp_path / "out.extxyz", 1)
    assert count_frames(tmp_path / "out.extxyz.partial")[0] == 1
    summary = predict_file(at, tmp_path / "in.extxyz", tmp_path / "out.extxyz", skip_failures=True)
    assert (summary.n_frames, summary.n_before, summary.n_failed) == (4, 1, 2)
    found = read(tmp_path / "out.extxyz", ":")
    assert "Si is unknown" in found[1].info["mffm_error"]
    assert "0 Å apart" in found[3].info["mffm_error"]
    assert found[1].calc is None
    assert found[2].get_potential_energy() < 0


def test_failures_do_not_pile_up(tiny_release: Path):
    read_so_far = []

    def source() -> Iterator[Atoms]:
        for i in range(100):
            read_so_far.append(i)
            yield molecule("SiH4")

    _, found = next(predict(AtFidelity(tiny_release, "pbe"), source(), edge_budget=30))
    assert isinstance(found, InputError)
    assert len(read_so_far) == 6  # batches of five atoms and one


def test_failures_before_a_stop_count(tiny_release: Path, tmp_path: Path):
    bad = [molecule("SiH4"), molecule("H2O"), molecule("SiH4")]
    bad[1].info["mffm_error"] = "of an output that is a source now"
    write(tmp_path / "in.extxyz", bad)

    def stop(n: int) -> None:
        if n == 2:
            raise KeyboardInterrupt

    at = AtFidelity(tiny_release, "pbe")
    with pytest.raises(KeyboardInterrupt):
        predict_file(at, tmp_path / "in.extxyz", tmp_path / "out.extxyz", 1, skip_failures=True, progress=stop)
    summary = predict_file(at, tmp_path / "in.extxyz", tmp_path / "out.extxyz", skip_failures=True)
    assert (summary.n_frames, summary.n_before, summary.n_failed) == (3, 2, 2)


def test_labels_of_the_source_are_kept(tiny_release: Path, tmp_path: Path):
    atoms = molecule("H2O", cell=[9, 9, 9], pbc=True)
    rng = np.random.default_rng(0)
    labels = {
        "energy": 1.0, "free_energy": 2.0, "energies": rng.random(3), "forces": rng.random((3, 3)),
        "stress": rng.random(6), "dipole": rng.random(3), "magmom": 1.5, "charges": rng.random(3),
        "magmoms": rng.random(3), "stresses": rng.random((3, 6)),
    }  # fmt: skip
    atoms.calc = SinglePointCalculator(atoms, **labels)
    write(tmp_path / "in.extxyz", atoms)
    predict_file(AtFidelity(tiny_release, "pbe"), tmp_path / "in.extxyz", tmp_path / "out.extxyz")
    found = read(tmp_path / "out.extxyz")
    for key in ("dipole", "magmom", "charges", "magmoms", "stresses"):
        np.testing.assert_allclose(found.calc.results[key], labels[key], atol=1e-8)
    for key in ("energy", "free_energy", "stress"):
        np.testing.assert_allclose(found.info[f"{key}_source"], labels[key], atol=1e-8)
    for key in ("energies", "forces"):
        np.testing.assert_allclose(found.arrays[f"{key}_source"], labels[key], atol=1e-8)
    assert found.get_potential_energy() != 1.0


def test_refused(tiny_release: Path, source: Path, tmp_path: Path):
    at = AtFidelity(tiny_release, "pbe")
    (tmp_path / "there.extxyz").write_text("")
    with pytest.raises(InputError, match=r"there.extxyz: exists"):
        predict_file(at, source, tmp_path / "there.extxyz")
    (tmp_path / "text.extxyz").write_text("no structure\n")
    with pytest.raises(InputError, match=r"ASE cannot read frame 0|no structures"):
        predict_file(at, tmp_path / "text.extxyz", tmp_path / "out.extxyz")
    with pytest.raises(InputError, match=r"none.extxyz: no such file"):
        predict_file(at, tmp_path / "none.extxyz", tmp_path / "out.extxyz")


def test_what_failed_before_its_first_frame_binds_nobody(tiny_release: Path, source: Path, tmp_path: Path):
    at, output = AtFidelity(tiny_release, "pbe"), tmp_path / "out.extxyz"
    (tmp_path / "bad.xyz").write_text("1\n\nQ 0 0 0\n")
    with pytest.raises(InputError, match="ASE cannot read frame 0"):
        predict_file(at, tmp_path / "bad.xyz", output)
    assert predict_file(at, source, output).n_before == 0
    assert count_frames(output)[0] == count_frames(source)[0]


def test_frames_of_a_file_that_a_kill_cut(tmp_path: Path):
    write(tmp_path / "a.extxyz", frames())
    whole = (tmp_path / "a.extxyz").read_bytes()
    assert count_frames(tmp_path / "a.extxyz") == (7, len(whole))
    for cut in (1, 40, 200):
        (tmp_path / "a.extxyz").write_bytes(whole[:-cut])
        n, size = count_frames(tmp_path / "a.extxyz")
        assert n == 6
        assert whole[:size].endswith(b"\n")


def test_a_killed_run_goes_on(tiny_release: Path, tmp_path: Path):
    many = [a for i in range(60) for a in frames()]
    for i, atoms in enumerate(many):
        atoms.info["name"] = i
    write(tmp_path / "in.extxyz", many)
    arguments = [sys.executable, "-m", "mffm", "predict", str(tiny_release), str(tmp_path / "in.extxyz")]
    tail = ["--fidelity", "pbe", "--edges", "300"]
    partial = tmp_path / "out.extxyz.partial"
    process = subprocess.Popen([*arguments, str(tmp_path / "out.extxyz"), *tail], stderr=subprocess.DEVNULL)
    while process.poll() is None and not (partial.is_file() and partial.stat().st_size > 20_000):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    n_before, _ = count_frames(partial)
    assert 0 < n_before < len(many)
    with pytest.raises(InputError, match="begun with fidelity 'pbe', now 'gfn2'"):
        predict_file(AtFidelity(tiny_release, "gfn2"), tmp_path / "in.extxyz", tmp_path / "out.extxyz")
    done = CliRunner().invoke(app, [*arguments[3:], str(tmp_path / "out.extxyz"), *tail])
    assert done.exit_code == 0, done.output
    assert f"{n_before} of them before" in done.output
    found = read(tmp_path / "out.extxyz", ":")
    assert [a.info["name"] for a in found] == list(range(len(many)))
    whole = AtFidelity(tiny_release, "pbe")
    predict_file(whole, tmp_path / "in.extxyz", tmp_path / "whole.extxyz", 300)
    for a, b in zip(found, read(tmp_path / "whole.extxyz", ":"), strict=True):
        assert a.get_potential_energy() == pytest.approx(b.get_potential_energy(), abs=1e-4)
