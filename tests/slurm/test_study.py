"""A study as arrays of a real SLURM: its stage is preempted, the controller interrupted; the same command goes on."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import records
from launch.state import slurm_state

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600), pytest.mark.usefixtures("slurm")]

ROOT = Path(__file__).parents[2]
STAGE_STEPS = 150  # seconds, for the warning to come in between
HIGH = {"data.plan.pools": [{"fidelity": "pbe", "properties": ["energy"]}]}
STUDY: dict[str, Any] = {
    "name": "slurm-study", "recipe": "base.yaml", "high": "pbe", "n_high": [8, 16], "seeds": [0], "ood": None,
    "changes": {"model.heads": {"kind": "shared", "hidden": [8]}, "model.conditioning.kind": "none"},
    "stages": {"low": {"changes": {
        "data.plan.pools": [{"fidelity": "gfn2", "properties": ["energy", "forces"]}], "train.steps": STAGE_STEPS
    }}},
    "methods": {
        "hf_only": {"changes": HIGH},
        "fine_tune": {"start_from": "low", "changes": {**HIGH, "model.init_from": {"pbe": "gfn2"}}},
        "low_only": {"refit": "low"},
    },
    "baselines": ["hf_only"],
}  # fmt: skip


def until(condition: Callable[[], Any], folder: Path, seconds: float = 200.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        logs = "\n".join(f"{path}\n{path.read_text()[-1500:]}" for path in folder.rglob("*.log"))
        assert time.monotonic() < deadline, f"not within {seconds} s\n{logs}"
        time.sleep(0.2)


def starts(run: Path) -> int:
    log = run / "logs" / "rank-0.log"
    return log.read_text().count("--- start ") if log.is_file() else 0


@pytest.fixture
def command(molecule_store: Path, tiny_recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> list[str]:
    base = tiny_recipe(molecule_store, tmp_path / "never")
    base["train"] |= {"steps": 10, "validate_every": 50, "save_every": 50, "best": "val/loss", "preflight": False}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"executor": "slurm", "time_minutes": 10}))
    study = [sys.executable, "-m", "mffm", "study", str(tmp_path / "study.yaml"), "--folder", str(tmp_path / "study")]
    return [*study, "--workers", "2", "--cluster", str(tmp_path / "cluster.yaml")]


def test_a_preempted_stage_holds_its_cells_and_a_second_controller_ends_the_study(command: list[str], tmp_path: Path):
    folder = tmp_path / "study"
    stage, here = folder / "runs" / "stages" / "low" / "s0", command[:-2]
    tuned = [folder / "runs" / "methods" / "fine_tune" / f"n{n}-s0" for n in (8, 16)]
    try:
        first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        until(lambda: int(records.last_row(stage).get("step", 0)) >= 5, folder)
        job = records.read_json(stage / "job.json")["job_id"]
        subprocess.run(["scancel", job, "--signal", "USR2"], check=True, timeout=30)
        until(lambda: records.status(stage).get("state") == "requeued", folder)
        until(lambda: slurm_state(job) == "PENDING", folder)
        first.send_signal(signal.SIGTERM)
        out, err = first.communicate(timeout=60)
        assert first.returncode == 75, out + err
        assert "jobs that were submitted go on without it" in err
        held = [records.read_json(run / "job.json") for run in tuned]
        assert [slurm_state(one["job_id"]) for one in held] == ["PENDING"] * 2
        assert {one["after"] for one in held} == {job}
        local = subprocess.run(here, capture_output=True, text=True, cwd=ROOT, timeout=100)
        assert local.returncode == 2
        assert "of an earlier start with --cluster trains this study" in local.stderr
        start = ["scontrol", "update", f"jobid={job}", "StartTime=now+3"]
        until(lambda: subprocess.run(start, capture_output=True, timeout=30).returncode == 0, folder)
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400)
    finally:
        for path in (folder / "arrays").glob("*.json"):
            subprocess.run(["scancel", "--name", path.stem], timeout=30)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "submitted" not in done.stdout, "all were adopted, or had finished"
    assert starts(stage) == 2
    others = [run for run in folder.glob("runs/methods/*/*") if run.is_dir()]
    assert [starts(run) for run in others] == [1] * 4
    finished = (stage / "weights" / "last.safetensors").stat().st_mtime
    assert all(records.status(run)["started"] > finished for run in tuned)
    summary = json.loads((folder / "report.json").read_text())
    assert summary["missing"] == []
    assert summary["failed"] == {}
    assert len(summary["cells"]) == 6
    assert all(one["cpu_seconds"] > 1 for one in summary["cells"] if one["method"] != "low_only")
    used = [json.loads(path.read_text())["cpu_seconds"] for path in (stage / "cpu").iterdir()]
    assert len(used) == 2
    assert {one["stage_cpu_seconds"] for one in summary["cells"] if one["method"] != "hf_only"} == {sum(used)}
    assert "not measured" not in (folder / "report.md").read_text()
