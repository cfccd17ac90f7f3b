"""train → release → evaluate on a real SLURM: they follow the end of the training, not its preemption or its death."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import records, runs, state, then

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300), pytest.mark.usefixtures("slurm")]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def submit(make_recipe: Callable[..., Path], tmp_path: Path) -> Iterator[Callable[[int], list[str]]]:
    """Return a function that submits a training of so many steps with its chain; the ids of the three jobs."""
    jobs: list[str] = []

    def make(steps: int) -> list[str]:
        recipe = make_recipe(train={"steps": steps, "validate_every": 50, "save_every": 50})
        cluster = tmp_path / "cluster.yaml"
        cluster.write_text(yaml.safe_dump({"executor": "slurm", "time_minutes": 10}))
        command = [sys.executable, "-m", "launch.submit", str(recipe), "--cluster", str(cluster)]
        done = subprocess.run(
            [*command, "--then", "release,evaluate"], capture_output=True, text=True, timeout=60, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        jobs.extend(re.findall(r"job (\d+):", done.stdout))
        return list(jobs)

    yield make
    for job in jobs:
        subprocess.run(["scancel", job], timeout=30)


def until(condition: Callable[[], Any], run: Path, seconds: float = 100.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        logs = "\n".join(path.read_text()[-2000:] for path in (run / "logs").glob("*"))
        assert time.monotonic() < deadline, f"not within {seconds} s: {records.status(run)}\n{logs}"
        time.sleep(0.2)


def pid(run: Path) -> int:
    return int(re.findall(r"^--- start .* pid (\d+),", (run / "logs" / "rank-0.log").read_text(), re.MULTILINE)[-1])


def test_the_chain_waits_through_a_preemption(submit: Callable[[int], list[str]], tmp_path: Path):
    run = tmp_path / "run"
    training, release, evaluate = submit(200)
    until(lambda: int(records.last_row(run).get("step", 0)) >= 5, run)
    subprocess.run(["scancel", training, "--signal", "USR2"], check=True, timeout=30)
    until(lambda: records.status(run).get("state") == "requeued", run)
    until(lambda: state.slurm_state(training) == "PENDING", run)
    assert [state.slurm_state(job) for job in (release, evaluate)] == ["PENDING"] * 2
    assert runs.read(run).then == "release waiting, evaluate waiting"
    start = ["scontrol", "update", f"jobid={training}", "StartTime=now+3"]
    until(lambda: subprocess.run(start, capture_output=True, timeout=30).returncode == 0, run)
    ends = state.wait([training, release, evaluate], 150, poll_seconds=0.5)
    assert set(ends.values()) == {"COMPLETED"}, ends
    row = runs.read(run)
    assert (row.state, row.then) == ("finished", "release finished, evaluate finished")
    assert (run / "logs" / "rank-0.log").read_text().count("--- start ") == 2
    finished = (run / "weights" / "last.safetensors").stat().st_mtime
    assert (run / "release" / "model.safetensors").stat().st_mtime > finished
    assert json.loads((run / "evaluation-test.json").read_text())["potential"] == str(run / "release")


def test_a_killed_training_cancels_the_chain(submit: Callable[[int], list[str]], tmp_path: Path):
    run = tmp_path / "run"
    training, release, evaluate = submit(100_000)
    until(lambda: int(records.last_row(run).get("step", 0)) >= 1, run)
    os.kill(pid(run), signal.SIGKILL)
    ends = state.wait([training, release, evaluate], 60, poll_seconds=0.5)
    assert ends == {training: "FAILED", release: "CANCELLED", evaluate: "CANCELLED"}
    row = runs.read(run)
    assert (row.state, row.then) == ("failed", "release cancelled, evaluate cancelled")
    assert not (run / "release").exists()


def test_a_cancelled_step_is_stopped_and_so_is_its_process(submit: Callable[[int], list[str]], tmp_path: Path):
    run = tmp_path / "run"
    training, release, evaluate = submit(5)
    until(lambda: then.status(run, "release").get("state") == "running", run)
    subprocess.run(["scancel", release], check=True, timeout=30)
    ends = state.wait([training, release, evaluate], 60, poll_seconds=0.5)
    assert ends == {training: "COMPLETED", release: "CANCELLED", evaluate: "CANCELLED"}
    assert runs.read(run).then == "release stopped, evaluate not started"
    assert not (run / "release").exists()
    assert subprocess.run(["pgrep", "-f", f"mffm release {run} "], capture_output=True).returncode == 1
