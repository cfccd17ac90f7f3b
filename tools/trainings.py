"""What the studies in tools/ share: trainings as jobs that go on where they stopped."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mffm.errors import InputError
from mffm.executor import Job, LocalExecutor, State


def job(folder: Path, name: str, arguments: Sequence[str]) -> Job:
    """Return ``mffm ARGUMENTS``, whose run is ``folder/runs/<name>``, or its resumption."""
    run = folder / "runs" / name
    if (run / "checkpoints" / "latest").exists():
        arguments = ["resume", str(run)]
    command = [sys.executable, "-m", "mffm", *arguments]
    return Job(name, command, folder / "logs" / f"{name}.log", {"OMP_NUM_THREADS": "1"})


def is_finished(folder: Path, name: str) -> bool:
    """An interrupted run has last weights too."""
    log = folder / "logs" / f"{name}.log"
    if not (folder / "runs" / name / "weights" / "last.safetensors").is_file() or not log.is_file():
        return False
    return "finished at step" in log.read_text(errors="replace")


def rows(run: Path) -> list[dict[str, float]]:
    """Return the whole lines of a run's metrics."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def run_all(jobs: Sequence[Job], workers: int) -> None:
    """Run jobs and print a line whenever one begins or ends.

    Raises:
        InputError: a training failed.
    """
    for one in jobs:
        one.log.parent.mkdir(parents=True, exist_ok=True)
    last: dict[str, State] = {}

    def report(states: Any) -> None:
        for name, state in states.items():
            if state != last.get(name, "waiting"):
                last[name] = state
                n_ended = sum(s in ("done", "failed") for s in states.values())
                print(f"{name} {state} ({n_ended} of {len(jobs)} ended)", flush=True)

    states = LocalExecutor(workers).run(jobs, report)
    failed = [one.log for one in jobs if states[one.name] == "failed"]
    if failed:
        raise InputError(f"{len(failed)} trainings failed; the first: {failed[0]}; the same command goes on")
