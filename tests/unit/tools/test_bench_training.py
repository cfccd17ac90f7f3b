"""Accuracy at equal time: exported frames, errors, the log's table and figure, the clock."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

ROOT = Path(__file__).parents[3]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Return the tool, with a data folder of 30 crystals of as many compositions and stores of its own."""
    import bake_off
    import bench_training

    data = tmp_path / "data" / "mattersim_pbe"
    data.mkdir(parents=True)
    rng = np.random.default_rng(0)
    energy = {"Cu": -3.5, "Na": -1.2, "Cl": -2.0}
    frames = []
    for i in range(30):
        n = i + 2
        atoms = Atoms(rng.choice(sorted(energy), n), 2.5 * np.arange(n)[:, None] * [1.0, 0, 0], pbc=True)
        atoms.set_cell([2.5 * n, 4, 4])
        atoms.rattle(0.1, seed=i)
        stress = rng.normal(size=6) * 0.01
        total = sum(energy[s] for s in atoms.get_chemical_symbols()) + 0.01 * rng.normal()
        atoms.calc = SinglePointCalculator(atoms, energy=total, forces=rng.normal(size=(n, 3)), stress=stress)
        frames.append(atoms)
    ase.io.write(data / "all.xyz", frames, format="extxyz")
    monkeypatch.setenv("MFFM_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(bake_off, "ROOT", tmp_path)
    monkeypatch.setattr(bench_training, "RUNS", tmp_path / "runs")
    monkeypatch.setitem(bake_off.STORES["crystals"], "files", ["mattersim_pbe/all.xyz"])
    return bench_training


def test_exported_frames_are_the_store_s_less_the_references(bench, tmp_path: Path) -> None:
    found = bench.export("crystals", tmp_path / "frames")
    original = {
        tuple(a.positions.ravel().round(6)): a for a in ase.io.read(tmp_path / "data/mattersim_pbe/all.xyz", ":")
    }
    files = {"train": found["train"], "val": found["val"], **found["tests"]}
    parts = {name: ase.io.read(path, ":") for name, path in files.items()}
    assert found["n_train"] == len(parts["train"])
    assert found["symbols"] == ["Cl", "Cu", "Na"]
    seen = [tuple(a.positions.ravel().round(6)) for part in parts.values() for a in part]
    assert sorted(seen) == sorted(original)  # all of them, none twice
    for atoms in parts["crystals"]:
        source = original[tuple(atoms.positions.ravel().round(6))]
        assert atoms.get_potential_energy() + atoms.info["reference"] == pytest.approx(source.get_potential_energy())
        assert abs(atoms.get_potential_energy()) < 1.0
        np.testing.assert_allclose(atoms.get_forces(), source.get_forces(), atol=1e-6)
        np.testing.assert_allclose(atoms.get_stress(), source.get_stress(), atol=1e-7)


def test_errors_of_whole_and_of_shifted_energies(bench, tmp_path: Path) -> None:
    bench.export("crystals", tmp_path / "frames")
    frames = ase.io.read(tmp_path / "frames" / "crystals.xyz", ":")
    off = 0.25
    predicted = {
        "energy": np.array([a.get_potential_energy() + off * len(a) for a in frames]),
        "forces": np.concatenate([a.get_forces() for a in frames]) - off,
        "stress": np.array([a.get_stress(voigt=False) for a in frames]) + off,
    }
    shifted = bench.differences(frames, predicted, whole=False)
    predicted["energy"] = predicted["energy"] + [a.info["reference"] for a in frames]
    for found in (shifted, bench.differences(frames, predicted, whole=True)):
        np.testing.assert_allclose(found["energy"], off)
        np.testing.assert_allclose(found["forces"], -off)
        np.testing.assert_allclose(found["stress"], off)


def row(peer: str, minutes: float, mark: float, seed: int, error: float) -> str:
    import bench_training

    errors = {key: error for _, key in bench_training.SHOWN["acac"]}
    content = {"set": "acac", "peer": peer, "version": f"{peer} 1.0", "minutes": minutes, "seed": seed, "mark": mark}
    return json.dumps({**content, "cpu_minutes": mark, "steps": 600, "n_parameters": 1.5e6, "errors": errors})


def test_table_and_figure_of_a_log(tmp_path: Path) -> None:
    import bench_training

    from mffm import plots

    log = tmp_path / "log.jsonl"
    lines = [row("mace", 60, 60, 0, 5.0), row("mace", 60, 2, 0, 50.0), row("mace", 60, 2, 1, 30.0)]
    log.write_text("\n".join([*lines, row("mace", 10, 10, 0, 9.0), row("mffm", 60, 40, 0, 4.0)]) + "\n")
    curves = bench_training.curves("acac", log, "acac-300K/forces_rmse")
    mace = [([10.0], [9.0], True), ([2.0, 60.0], [40.0, 5.0], True)]
    assert curves == {"mace": mace, "mffm": [([40.0], [4.0], False)]}
    table = bench_training.table("acac", log).splitlines()
    assert [line.split(" | ")[4] for line in table[2:]] == ["10.0 (end)", "2.0", "60.0 (end)", "2.0", "40.0"]
    assert table[2].count("|") == table[0].count("|") == table[1].count("|")
    assert " | 1000 | " in table[2]  # 10 minutes, 600 steps
    plots.errors_at_time(tmp_path / "figure.png", {"forces": curves, "energy": curves})
    assert (tmp_path / "figure.png").stat().st_size > 10_000


TRAINING = """
import sys, time
from clock import Clock, read_job
job = read_job()
path = __import__("pathlib").Path(job["folder"])
clock = Clock(job, lambda at: (path / f"{at.name}.txt").write_text(str(clock.step)))
clock.start(resumed=(path / "saved.json").exists(), n_parameters=7)
for _ in range(job["sitting"]):
    end = time.process_time() + 0.01
    while time.process_time() < end:
        pass
    clock.tick()
clock.saved()
if job["over"]:
    clock.finish()
"""


def test_the_clock_goes_on_and_copies_at_its_marks(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tools" / "peers")}
    job = {"folder": str(tmp_path), "seed": 0, "marks": [0.0013, 0.002], "slack": 1.5}  # 0.08 s, 0.12 s × 1.5

    def sit(n: int, **more: object) -> None:
        (tmp_path / "job.json").write_text(json.dumps({**job, "sitting": n, "over": False, **more}))
        subprocess.run([sys.executable, "-c", TRAINING, str(tmp_path / "job.json")], env=environment, check=True)

    sit(5)
    assert not list(tmp_path.glob("at-*"))
    sit(100)
    first, last = (json.loads((tmp_path / f"at-{m}.json").read_text()) for m in ("0.0013", "0.002"))
    assert (first["sittings"], first["n_parameters"]) == (2, 7)
    assert 0.078 <= first["cpu_s"] < 0.12
    assert 0.18 <= last["cpu_s"] < 0.25
    assert 5 < first["step"] < last["step"] < 30
    assert (tmp_path / "at-0.002.txt").read_text() == str(last["step"])
    for path in tmp_path.glob("at-*"):
        path.unlink()
    (tmp_path / "saved.json").unlink()
    sit(3, over=True)
    assert json.loads((tmp_path / "at-0.002.json").read_text())["step"] == 3  # a schedule that ended early
    sit(30, probe=[5, 15])
    assert 0.009 < json.loads((tmp_path / "probe.json").read_text())["per_step_s"] < 0.03


def test_a_peer_that_is_not_installed_is_refused_with_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import bench_training
    from peers import install

    monkeypatch.setenv("MFFM_PEERS", str(tmp_path))
    (tmp_path / "mace").mkdir()  # half made
    with pytest.raises(SystemExit, match=r"mace is not installed in .*; python tools/peers/install.py mace"):
        bench_training.run("acac", "mace", 1.0, 0, tmp_path / "log.jsonl")
    (tmp_path / "mace" / "installed.txt").write_text("")
    assert bench_training.interpreter("mace") == str(tmp_path / "mace" / "bin" / "python")
    assert install.version("mace").startswith("mace-torch 0.")
