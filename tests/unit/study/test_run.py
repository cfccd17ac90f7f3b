"""A study trains each cell once, goes on after an interruption, judges on the same labels and reports."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from ase import Atoms

from mffm.config.study import load_study
from mffm.deploy.ase import Calculator
from mffm.errors import InputError
from mffm.executor import Executor, Usage, locked
from mffm.release import write_json
from mffm.study import report
from mffm.study.gate import gates
from mffm.study.grid import expand
from mffm.study.page import markdown
from mffm.study.run import StudyRun

from .conftest import DELTAS, OneProcess, content, train_all

SMALL = {"n_high": [8, 16], "seeds": [0]}


def study_run(path: Path, executor: Executor, *overrides: str) -> StudyRun:
    folder = path.parent / "out"
    return StudyRun(expand(load_study(path, overrides), path, folder), folder, executor, say=lambda line: None)


def test_goes_on_after_an_interruption_and_reports(make_study: Callable[..., Path]):
    path = make_study(**SMALL, candidate="delta")
    first = OneProcess(die_after=3)
    with pytest.raises(KeyboardInterrupt):
        study_run(path, first).train()
    assert [name for name, _, _ in first.commands] == [
        "stages/low/s0", "methods/hf_only/n8-s0", "methods/hf_only/n16-s0"
    ]  # fmt: skip
    second = OneProcess()
    run = study_run(path, second)
    assert run.train() == {}
    names = [name for name, _, _ in second.commands]
    assert len(names) == 4
    assert not set(names) & {n for n, _, _ in first.commands}, "a finished cell was trained again"
    assert {command for _, command, _ in second.commands} == {"train"}
    third = OneProcess()
    again = study_run(path, third)
    assert again.train() == {}
    assert third.commands == []

    judged = again.judge()
    assert {one.cell.name for one in judged} == {c.name for c in again.grid.cells}
    summary = report.summarise(again.grid, judged, gates(again.grid), {})
    report.write(again.grid, summary, again.folder)
    check_summary(json.loads((again.folder / "report.json").read_text()))
    check_page((again.folder / "report.md").read_text())
    assert (again.folder / "learning_curves.png").stat().st_size > 10_000

    there, other = (again.folder / "errors" / "delta" / f"n{n}-s0.json" for n in (8, 16))
    stamps = there.stat().st_mtime_ns, other.stat().st_mtime_ns
    other.with_suffix(".npz").unlink()
    assert [one.errors for one in again.judge()] == [one.errors for one in judged]
    assert there.stat().st_mtime_ns == stamps[0], "judged twice"
    assert other.stat().st_mtime_ns != stamps[1]
    other.with_suffix(".npz").write_bytes(b"no zip")
    with pytest.raises(InputError, match=r"n16-s0.npz: damaged .* remove it"):
        again.judge()
    other.with_suffix(".npz").unlink()
    again.judge()
    shutil.rmtree(again.folder / "runs")  # a study copied without its runs, or from another machine
    record = again.folder / "records" / "methods" / "delta" / "n8-s0.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "machine": "another"}))
    older = again.folder / "records" / "methods" / "delta" / "n16-s0.json"  # of an mffm that did not note it
    older.write_text(json.dumps({k: v for k, v in json.loads(older.read_text()).items() if k != "machine"}))
    copied = study_run(path, OneProcess())
    assert copied.train() == {}
    found = copied.judge()
    assert [one.errors for one in found] == [one.errors for one in judged]
    assert [one.cell.name for one in found if "another" in one.machines] == ["delta/n8-s0"]
    assert [one.cell.name for one in found if "machine not recorded" in one.machines] == ["delta/n16-s0"]
    other.unlink()
    with pytest.raises(InputError, match=r"run is gone, and delta/n16-s0 must be judged again; remove .*16-s0.json"):
        copied.judge()


def check_summary(summary: dict[str, Any]) -> None:
    assert summary["missing"] == []
    fair = summary["fairness"]
    assert fair["steps"] == {"hf_only": [4], "delta": [4], "fine_tune": [4], "low_only": [2]}
    assert not fair["steps_equal"], "the low fidelity alone has two steps"
    assert fair["test_equal"]
    assert fair["high_frames_equal"]
    assert fair["same_batches"] == [["hf_only", "fine_tune"], ["delta"]], "the pools tell"
    points = summary["curves"]["iid/energy"]["delta"]
    assert [p["n_high"] for p in points] == [8, 16]
    errors = {(c["method"], c["n_high"]): c["errors"]["iid"][0] for c in summary["cells"]}
    assert points[0]["mean"] == pytest.approx(errors["delta", 8]["mae"])
    assert errors["low_only", 8]["mae"] != errors["low_only", 16]["mae"], "references were not refitted"
    assert set(summary["factors"]["iid/forces"]) == {"hf_only", "fine_tune"}
    assert set(summary["factors"]["iid/forces"]["hf_only"]) == {"delta", "fine_tune", "low_only"}
    assert summary["advice"]
    found = summary["not_worse"]
    assert set(found["panels"]["iid/energy"]) == {"hf_only", "fine_tune", "low_only"}
    (point, _) = found["panels"]["iid/forces"]["hf_only"]
    maes = {c["method"]: c["errors"]["iid"][1]["mae"] for c in summary["cells"] if c["n_high"] == 8}
    assert point["ratio"] == pytest.approx(maes["delta"] / maes["hf_only"])
    assert point["upper"] > point["ratio"]
    assert summary["tuning"] is None


def check_page(page: str) -> None:
    for text in (
        "## Advice", "![learning curves](learning_curves.png)", "### IID energy, MAE in meV/atom",
        "### k against PBE alone, IID forces", "## CPU time", "not measured", "Optimiser steps are not equal",
        "Test set: the same labels for every cell", "all methods have the same ones", "`gfn2`", "references refitted",
        "One seed", "## Is delta head not worse than the others?", "bootstrap draws of test frames alone",
        "### delta head against the others, IID forces: ", "Tuning: none",
    ):  # fmt: skip
        assert text in page, text


def test_a_training_cut_short_is_resumed(make_study: Callable[..., Path]):
    path = make_study(**SMALL, methods={"hf_only": content()["methods"]["hf_only"]}, stages={}, baselines=["hf_only"])
    run = study_run(path, OneProcess(die_after=0))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    name = "methods/hf_only/n8-s0"
    recipe = yaml.safe_load((run.folder / "recipes" / f"{name}.yaml").read_text())
    recipe["train"]["steps"] = 2
    (path.parent / "short.yaml").write_text(yaml.safe_dump(recipe))
    train_all([("train", str(path.parent / "short.yaml"))])
    saved = run.folder / "runs" / name / "recipe.yaml"
    saved.write_text(saved.read_text().replace("  steps: 2\n", "  steps: 4\n"))  # as if a kill had come at step 2
    executor = OneProcess()
    again = study_run(path, executor)
    again.train()
    assert [(n, c) for n, c, _ in executor.commands] == [(name, "resume"), ("methods/hf_only/n16-s0", "train")]
    assert {one.last_step for one in again.judge()} == {4}


def test_a_sum_of_two_potentials_is_judged_on_the_high_labels(make_study: Callable[..., Path], difference_store: Path):
    """As the calculators of both runs have it; the stage reads the structures with a cutoff of its own."""
    stage = {"changes": {**content()["stages"]["low"]["changes"], "model.backbone.cutoff": 3.5}}
    run = study_run(
        make_study(
            n_high=[8], seeds=[0], methods=DELTAS, stages={"low": stage}, baselines=["delta_exact"],
            changes={"data.store": str(difference_store)},
        ),
        OneProcess(),
    )  # fmt: skip
    assert run.train() == {}
    for name, seconds in (("methods/delta_ml/n8-s0", 60.0), ("stages/low/s0", 30.0)):
        write_json(run.folder / "cpu" / f"{name}.json", {"seconds": seconds, "is_open": False, "is_lost": False})
    exact, ml = run.judge()
    runs, store = run.folder / "runs", run.grid.store
    difference = Calculator(runs / "methods" / "delta_ml" / "n8-s0", fidelity="pbe_minus_gfn2")
    low = Calculator(runs / "stages" / "low" / "s0", fidelity="gfn2")
    energy_errors, force_errors = [], []
    for row in store.rows(split="test", fidelity="pbe").tolist():
        numbers, positions, _, _ = store.geometry(row)
        atoms, labels = Atoms(numbers, positions), store.labels(row, "pbe")
        energy = sum(calculator.get_potential_energy(atoms) for calculator in (difference, low))
        forces = sum(calculator.get_forces(atoms) for calculator in (difference, low))
        energy_errors.append(abs(energy - float(labels["energy"])) / len(atoms))
        force_errors.append(np.abs(forces - labels["forces"]).ravel())
    assert ml.errors["iid", "energy"] == pytest.approx(1e3 * np.mean(energy_errors), rel=1e-4)
    assert ml.errors["iid", "forces"] == pytest.approx(1e3 * np.concatenate(force_errors).mean(), rel=1e-4)
    assert exact.rows["iid"][0]["fidelity"] == "pbe_minus_gfn2"
    assert ml.rows["iid"][0]["fidelity"] == "pbe"
    assert ml.rows["iid"][0]["n_systems"] == len(energy_errors)
    assert (ml.cpu_seconds, ml.stage_cpu_seconds, exact.stage_cpu_seconds) == (60.0, 30.0, 0.0)

    summary = report.summarise(run.grid, [exact, ml], gates(run.grid), {})
    assert summary["methods"]["delta_ml"]["steps"] == [4 + 2]
    assert "`low` (its prediction is added)" in markdown(summary)
    weights = runs / "stages" / "low" / "s0" / "weights"
    (weights / "raw.safetensors").rename(weights / "best.safetensors")
    exact_again, ml_again = run.judge()
    assert exact_again.errors == exact.errors
    assert ml_again.errors != ml.errors, "judged with the stage's old weights"
    (run.folder / "records" / "stages" / "low" / "s0.json").unlink()
    assert [one.cell.method for one in run.judge()] == ["delta_exact"], "judged before its stage is finished"


def test_a_failed_training_leaves_a_gap_that_the_report_names(make_study: Callable[..., Path]):
    methods = {name: content()["methods"][name] for name in ("hf_only", "delta")}
    path = make_study(n_high=[8], seeds=[0], methods=methods, stages={}, baselines=["hf_only"])
    run = study_run(path, OneProcess(fail="methods/delta/n8-s0"))
    failed = run.train()
    assert failed == {"methods/delta/n8-s0": "error: no luck"}
    summary = report.summarise(run.grid, run.judge(), [], failed)
    assert summary["missing"] == ["delta/n8-s0"]
    page = markdown(summary)
    assert "**Not complete:** 1 cells are missing: delta/n8-s0" in page
    assert "methods/delta/n8-s0 failed: error: no luck" in page
    assert "delta head" not in " ".join(summary["advice"]), "ranked without its cell"
    executor = OneProcess()
    assert study_run(path, executor).train() == {}
    assert [n for n, _, _ in executor.commands] == ["methods/delta/n8-s0"]


def test_the_trial_with_the_best_validation_is_judged(make_study: Callable[..., Path]):
    methods = {"hf_only": content()["methods"]["hf_only"]}
    tune = {"optim.lr": [1e-9, 0.01]}
    path = make_study(n_high=[8], seeds=[0], methods=methods, stages={}, baselines=["hf_only"], tune=tune)
    names = [f"methods/hf_only/n8-s0-t{k}" for k in range(2)]
    run = study_run(path, OneProcess(fail=names[1]))
    assert run.train() == {names[1]: "error: no luck"}
    assert run.judge() == []
    assert report.summarise(run.grid, [], [], {})["missing"] == ["hf_only/n8-s0"]
    executor = OneProcess()
    run = study_run(path, executor)
    assert run.train() == {}
    assert [n for n, _, _ in executor.commands] == names[1:]
    best = [json.loads((run.folder / "records" / f"{name}.json").read_text())["best"] for name in names]
    assert best[1] < best[0]
    (one,) = run.judge()
    assert one.cell.training == names[1]
    summary = report.summarise(run.grid, [one], [], {})
    assert summary["cells"][0]["tuned"] == {"optim.lr": 0.01}
    page = markdown(summary)
    assert "Tuning: 2 trials for each cell" in page
    assert "  - PBE alone: `optim.lr: 1e-09` in 0; `optim.lr: 0.01` in 1." in page
    assert "Own trainings are those of the chosen trial; 2 were made for each." in page


def test_another_recipe_in_the_same_folder_is_refused(make_study: Callable[..., Path]):
    methods = {"hf_only": content()["methods"]["hf_only"]}
    path = make_study(**SMALL, methods=methods, stages={}, baselines=["hf_only"])
    study_run(path, OneProcess()).train()
    with pytest.raises(InputError, match=r"holds a run of methods/hf_only/n8-s0 with another recipe \(optim.lr\)"):
        study_run(path, OneProcess(), "changes={optim.lr: 0.01}").train()
    more = OneProcess()
    study_run(path, more, "n_high=[8, 12, 16]").train()
    assert [n for n, _, _ in more.commands] == ["methods/hf_only/n12-s0"], "a grid may grow"
    with locked(path.parent / "out" / "lock"), pytest.raises(InputError, match="another controller"):
        study_run(path, OneProcess()).train()


def test_a_training_that_a_killed_study_left_running_is_not_started_twice(make_study: Callable[..., Path]):
    methods = {"hf_only": content()["methods"]["hf_only"]}
    run = study_run(make_study(**SMALL, methods=methods, stages={}, baselines=["hf_only"]), OneProcess())
    recipe = run.folder / "recipes" / "methods" / "hf_only" / "n16-s0.yaml"
    orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)", str(recipe)])
    try:
        with pytest.raises(InputError, match=f"n16-s0: process {orphan.pid} of an earlier start still trains it"):
            run.train()
    finally:
        orphan.kill()
        orphan.wait()


def test_cpu_time_is_that_of_sittings_here_and_of_starts_on_a_cluster(make_study: Callable[..., Path]):
    run = study_run(make_study(**SMALL), OneProcess())
    name = "stages/low/s0"
    folder = run.folder / "runs" / name
    folder.mkdir(parents=True)
    assert run._cpu_seconds(name) is None
    for start, rank, seconds in (("8_0.0", 0, 2.0), ("8_0.0", 1, 1.5), ("8_0.1", 0, 4.0)):
        Usage(seconds, "a node").write(folder, start, rank)
    assert run._cpu_seconds(name) == 7.5
    assert set(run._machines(name)) == {"a node"}
    record = run.folder / "cpu" / f"{name}.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"seconds": 0.5, "is_open": False, "is_lost": False}))
    assert run._cpu_seconds(name) == 8.0
    Usage(None, "a node").write(folder, "8_0.2", 0)
    assert run._cpu_seconds(name) is None, "the end of a start was not seen"


def test_command_line_refuses_a_wrong_study_with_code_2(make_study: Callable[..., Path], run_mffm: Callable[..., Any]):
    done = run_mffm("study", str(make_study(baselines=["best"])))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "baselines: no method 'best'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_killed_study_goes_on_from_checkpoints(make_study: Callable[..., Path], run_mffm: Callable[..., Any]):
    methods = {"hf_only": content()["methods"]["hf_only"]}
    changes = {"train.steps": 60, "train.save_every": 5, "train.validate_every": 60}
    path = make_study(n_high=[8, 16], seeds=[0], methods=methods, stages={}, baselines=["hf_only"], changes=changes)
    folder = path.parent / "out"
    command = [sys.executable, "-m", "mffm", "study", str(path), "--folder", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    latest = folder / "runs" / "methods" / "hf_only" / "n8-s0" / "checkpoints" / "latest"
    deadline = time.monotonic() + 200
    while not latest.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert "the same command goes on" in stderr
    assert not (folder / "records" / "methods").exists(), "killed too late to show anything"

    done = run_mffm("study", str(path), "--folder", str(folder))
    assert done.returncode == 0, done.stderr
    log = (folder / "logs" / "methods" / "hf_only" / "n8-s0.log").read_text()
    assert "resumed from step-" in log
    summary = json.loads((folder / "report.json").read_text())
    assert [c["last_step"] for c in summary["cells"]] == [60, 60]
    assert all(c["cpu_seconds"] > 1 for c in summary["cells"])
    assert "report: " in done.stdout
    recipe = yaml.safe_load((folder / "recipes" / "methods" / "hf_only" / "n8-s0.yaml").read_text())
    assert recipe["data"]["plan"]["pools"][0]["max_frames"] == 8
