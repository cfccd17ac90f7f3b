"""The table of runs: every state from files alone."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import records, runs


def make(folder: Path, status: dict[str, Any] | None = None, job: str | None = "7", step: int = 0) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "submitted.yaml").write_text(yaml.safe_dump({"train": {"steps": 100, "best": "val/pbe/forces_mae"}}))
    if job is not None:
        records.write_json(folder / "job.json", {"job_id": job, "executor": "slurm"})
    if status is not None:
        records.write_json(folder / "status.json", {"job_id": "7", "start": "7.0", **status})
    rows = [{"step": s, "train/loss": 1.0} for s in range(1, step + 1)]
    rows += [{"step": 10, "val/pbe/forces_mae": 9.0}, {"step": 20, "val/pbe/forces_mae": 11.0}]
    if step:
        rows.sort(key=lambda row: row["step"])
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "metrics.jsonl").write_text(text + '{"step": 99, "cut o')
    return folder


def test_states(tmp_path: Path):
    make(tmp_path / "queued")
    make(tmp_path / "again", {"state": "stopped"}, job="8")
    make(tmp_path / "finished", {"state": "finished"}, step=100)
    make(tmp_path / "group" / "requeued", {"state": "requeued"}, step=30)
    make(tmp_path / "plain", job=None, step=40)
    lost = make(tmp_path / "lost", {"state": "running"}, step=30)
    old = time.time() - 2 * records.LOST_SECONDS
    os.utime(lost / "status.json", (old, old))
    running = make(tmp_path / "running", {"state": "running", "started": time.time() - 100, "started_step": 5}, step=30)
    failed = make(tmp_path / "failed", {"state": "stopped"}, step=30)
    (failed / "failures").mkdir()
    (failed / "failures" / "7.0-rank-3.txt").write_text("rank 3 of 4 on n2 died: exit code 1\nmore\n")
    (tmp_path / "no-run").mkdir()
    (tmp_path / "no-run" / "recipe.yaml").write_text("name: x\n")

    found = {os.path.relpath(row.folder, tmp_path): row for row in map(runs.read, runs.find(tmp_path))}
    assert {name: row.state for name, row in found.items()} == {
        "queued": "queued", "again": "queued", "finished": "finished", "group/requeued": "requeued",
        "plain": "unfinished", "lost": "lost", "running": "running", "failed": "failed",
    }  # fmt: skip
    row = found["running"]
    assert (row.step, row.steps, row.best, row.job_id) == (30, 100, 9.0, "7")
    assert row.eta_seconds == pytest.approx(70 * 100 / 25, rel=0.1)
    assert running == row.folder

    for module in (["launch.runs"], ["mffm", "runs"]):
        command = [sys.executable, "-m", *module, str(tmp_path)]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "30/100" in shown
        assert "9 val/pbe/forces_mae" in shown
        assert "rank 3 of 4 on n2 died: exit code 1" in shown
        missing = subprocess.run([*command[:-1], str(tmp_path / "none")], capture_output=True, text=True)
        assert (missing.returncode, missing.stderr) == (2, f"error: {tmp_path / 'none'}: no such folder\n")


def test_the_pace_is_that_of_the_last_rows_of_this_start(tmp_path: Path):
    begun = time.time() - 5000
    run = make(tmp_path / "run", {"state": "running", "started": begun, "started_step": 10}, step=30)
    # steps 1 to 12 are of the start before; then a slow first step, and 2 s a step
    rows = [{"step": s, "train/loss": 1.0, "time": begun - 100 + s} for s in range(1, 13)]
    rows += [{"step": s, "train/loss": 1.0, "time": begun + 900 + 2 * s} for s in range(11, 31)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert runs.read(run).eta_seconds == pytest.approx(70 * 2)


def test_duration():
    assert [runs.duration(s) for s in (None, 20, 600, 7500, 190_000)] == ["", "1m", "10m", "2h 05m", "2d 04h"]
