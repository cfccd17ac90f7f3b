"""A sweep of eight trials as jobs of a real SLURM: the controller is interrupted, and the same command goes on."""

import json
import re
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

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400), pytest.mark.usefixtures("slurm")]

ROOT = Path(__file__).parents[2]
TRIALS = 8
STEPS = 30


def finished(folder: Path) -> int:
    return sum(records.status(run).get("state") == "finished" for run in folder.glob("trial-*") if run.is_dir())


def test_eight_trials_interrupted_and_adopted(make_recipe: Callable[..., Path], tmp_path: Path):
    recipe = make_recipe(train={"steps": STEPS, "validate_every": 10, "save_every": 10})
    content: dict[str, Any] = {
        "name": "slurm-sweep", "method": "random", "metric": {"name": "val/loss", "goal": "minimize"},
        "parameters": {"optim.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}},
        "run_cap": TRIALS,
    }  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"executor": "slurm", "time_minutes": 10}))
    folder = tmp_path / "s"
    command = [sys.executable, "-m", "launch.sweep", str(tmp_path / "sweep.yaml"), "--recipe", str(recipe)]
    command += ["--cluster", str(tmp_path / "cluster.yaml"), "--workers", "3", "--folder", str(folder)]
    try:
        first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        deadline = time.monotonic() + 150
        while finished(folder) < 2:
            assert time.monotonic() < deadline
            assert first.poll() is None
            time.sleep(0.1)
        first.send_signal(signal.SIGINT)
        out = first.communicate(timeout=60)[0]
        assert first.returncode == 75, out
        left = re.findall(r"^(trial-\d+) goes on in the queue$", out, re.MULTILINE)
        assert left, out
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    finally:
        for path in folder.glob("trial-*/job.json"):
            subprocess.run(["scancel", records.read_json(path)["job_id"]], timeout=30)
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.count("| complete |") == TRIALS
    resubmitted = set(re.findall(r"^(trial-\d+): job \d+ submitted$", done.stdout, re.MULTILINE))
    assert not resubmitted & set(left)
    for number in range(TRIALS):
        run = folder / f"trial-{number:04d}"
        assert (run / "logs" / "rank-0.log").read_text().count("--- start ") == 1, "trained by one job, started once"
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, STEPS + 1))
    assert (folder / "summary.md").read_text().count("| complete |") == TRIALS
    assert (folder / "sweep.png").stat().st_size > 5000
