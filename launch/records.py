"""What the launcher writes into the folder of a run, so that files alone say how the run stands.

submitted.yaml         the resolved recipe
cluster.yaml           the cluster configuration with the command line's changes
code.json, code.diff   version, git commit, whether the tree had changes, and those
job.json               job id, executor, nodes × tasks, when it was submitted
status.json            written by rank 0's task: state, start, when; its mtime is a heartbeat
logs/rank-<r>.log      output of a rank, appended over all starts
cpu/                   <start>-rank-<r>.json: CPU time of a rank in a start, null until its end; `mffm.executor.Usage`
then/                  <step>.json: state of a job that follows the training; its mtime is a heartbeat
failures/              <start>-rank-<r>.txt: report of a rank that died; a start is <job id>.<requeues>
submitit/              submitit's own scripts, pickles and logs of the tasks
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mffm.failures import reports

State = Literal["running", "requeued", "stopped", "finished", "failed"]

HEARTBEAT_SECONDS = 20.0
LOST_SECONDS = 120.0  # without a heartbeat; a clock that is off by a minute is not a lost job


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file, empty where there is none or it is cut off."""
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file aside and rename it: a reader never sees half of it."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(aside, path)


def now() -> str:
    """Return the time in ISO 8601 with the offset from UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def status(folder: Path) -> dict[str, Any]:
    """Return what rank 0's task wrote last, empty before the first start."""
    return read_json(folder / "status.json")


def write_status(folder: Path, state: State, **values: Any) -> None:
    """Change the state, and whatever else is given, in status.json."""
    write_json(folder / "status.json", {**status(folder), **values, "state": state, "changed": now()})


def failures(folder: Path, start: str) -> list[Path]:
    """Return the reports of the ranks that died in a start of the run, the first death first."""
    return reports(folder, start)


def checkpoint_step(folder: Path) -> int | None:
    """Return the step of the newest checkpoint, None where there is none."""
    try:
        name = (folder / "checkpoints" / "latest").read_text().strip()
    except OSError:
        return None
    digits = name.removeprefix("step-")
    return int(digits) if digits.isdigit() else None


def last_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the whole rows in the last 64 kB of metrics.jsonl, the newest last."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def last_row(folder: Path) -> dict[str, Any]:
    """Return the last whole row of metrics.jsonl, empty where there is none."""
    return next(reversed(last_rows(folder)), {})


def is_alive(folder: Path) -> bool:
    """Return whether rank 0's task says that it runs, and its heartbeat is fresh."""
    return status(folder).get("state") == "running" and is_fresh(folder / "status.json")


def is_fresh(path: Path) -> bool:
    """Return whether a file whose mtime is a heartbeat was touched lately."""
    try:
        return time.time() - path.stat().st_mtime < LOST_SECONDS
    except OSError:
        return False


def process_runs(pid: str) -> bool:
    """Return whether a process of this machine runs; one that has ended but was not waited for does not."""
    try:
        os.kill(int(pid), 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, ValueError):
        return False
    except OSError:  # another user's, or no /proc
        return True
