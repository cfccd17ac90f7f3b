"""A table of runs from the files in their folders: ``mffm runs FOLDER``, ``python -m launch.runs FOLDER``.

Asks no scheduler.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from launch import records, then
from mffm.config.base import read_yaml
from mffm.errors import InputError

MARKS = ("job.json", "submitted.yaml", "recipe.yaml")
INNER = {
    "release",
    "then",
    "plots",
    "checkpoints",
    "weights",
    "potential",
    "submitit",
    "logs",
    "failures",
    "cpu",
    "wandb",
    "quarantine",
}


@dataclass(frozen=True)
class Row:
    """How a run stands.

    Attributes:
        state: ``queued``, ``running``, ``requeued``, ``stopped`` (saved), ``failed``, ``lost`` (no heartbeat),
            ``finished``; of a run that was not submitted ``finished`` or ``unfinished``.
        eta_seconds: from the pace of the last rows of this start; None where it cannot be told.
        best: value of the recipe's metric at its best, None before the first validation.
        report: of the rank that died first.
        then: how the jobs stand that follow the training.
        reasons: of those that failed.
    """

    folder: Path
    state: str
    step: int
    steps: int
    eta_seconds: float | None
    metric: str
    best: float | None
    job_id: str
    report: Path | None = None
    then: str = ""
    reasons: tuple[str, ...] = ()


def find(folder: Path) -> Iterator[Path]:
    """Yield the folders of runs at and under a folder."""
    for place, inner, files in os.walk(folder):
        inner[:] = sorted(name for name in inner if name not in INNER and not name.startswith("."))
        if any(mark in files for mark in MARKS) and is_run(Path(place)):
            yield Path(place)


def is_run(folder: Path) -> bool:
    """Return whether the launcher or a training wrote here; a lone recipe.yaml is not a run."""
    return (folder / "submitted.yaml").is_file() or (folder / "checkpoints").is_dir()


def read(folder: Path) -> Row:
    """Return how the run in a folder stands."""
    recipe = _recipe(folder)
    train = recipe.get("train") if isinstance(recipe.get("train"), dict) else {}
    assert isinstance(train, dict)
    steps, metric = int(train.get("steps", 0)), str(train.get("best", "val/loss"))
    status, job = records.status(folder), records.read_json(folder / "job.json")
    step = max(int(records.last_row(folder).get("step", 0)), records.checkpoint_step(folder) or 0)
    state, report = _state(folder, status, job, step, steps)
    follow, reasons = then.shown(folder, job, state)
    return Row(
        folder, state, step, steps, _eta(folder, status, step, steps) if state == "running" else None,
        metric, _best(folder / "metrics.jsonl", metric), str(job.get("job_id") or status.get("job_id") or ""), report,
        follow, tuple(reasons),
    )  # fmt: skip


def _recipe(folder: Path) -> dict[str, Any]:
    for name in ("recipe.yaml", "submitted.yaml"):
        try:
            return read_yaml(folder / name)
        except InputError:
            continue
    return {}


def _state(folder: Path, status: dict[str, Any], job: dict[str, Any], step: int, steps: int) -> tuple[str, Path | None]:
    if not status and not job:
        return ("finished" if steps and step >= steps else "unfinished"), None
    if not status or job.get("job_id") not in (None, status.get("job_id")):
        return "queued", None
    state = str(status.get("state"))
    if state in ("running", "stopped", "failed"):
        reports = records.failures(folder, str(status.get("start")))
        if reports:
            return "failed", reports[0]
        if state == "running" and not records.is_alive(folder):
            return "lost", None
    return state, None


def _eta(folder: Path, status: dict[str, Any], step: int, steps: int) -> float | None:
    """Return the time left from the last rows of this start, or from all of it where rows carry no time."""
    try:
        begun, first = float(status["started"]), int(status["started_step"])
        rows = [(r["time"], r["step"]) for r in records.last_rows(folder) if "time" in r and r["step"] > first]
        moments = [(float(moment), int(at)) for moment, at in rows if float(moment) >= begun]
        if len(moments) > 1 and moments[-1][1] > moments[0][1]:
            (since, low), (until, high) = moments[0], moments[-1]
            return (steps - step) * (until - since) / (high - low)
        seconds = (folder / "metrics.jsonl").stat().st_mtime - begun
        done = step - first
    except (OSError, KeyError, TypeError, ValueError):
        return None
    return (steps - step) * seconds / done if done > 0 and seconds > 0 else None


def _best(path: Path, metric: str) -> float | None:
    """Return the metric of the best weights: what the run last said of them, else the least value."""
    values: list[float] = []
    said: float | None = None
    try:
        with path.open() as file:
            for line in file:
                if f'"{metric}"' in line:
                    try:
                        row = json.loads(line)
                        values.append(float(row[metric]))
                        said = float(row["best"]) if "best" in row else said
                    except (json.JSONDecodeError, KeyError, TypeError):
                        continue
    except OSError:
        return None
    return min(values, default=None) if said is None else said


def duration(seconds: float | None) -> str:
    """Return seconds as ``2d 03h``, ``3h 05m`` or ``4m``; empty for None."""
    if seconds is None:
        return ""
    minutes = round(seconds / 60)
    if minutes >= 24 * 60:
        return f"{minutes // 1440}d {minutes % 1440 // 60:02d}h"
    return f"{minutes // 60}h {minutes % 60:02d}m" if minutes >= 60 else f"{max(minutes, 1)}m"


def table(rows: list[Row], base: Path) -> Table:
    """Return the rows as a table; folders relative to ``base``."""
    with_then = any(row.then for row in rows)
    shown = Table("run", "state", "step", "ETA", "best", "job", *(["then"] if with_then else []), box=None)
    for row in rows:
        name = os.path.relpath(row.folder, base)
        best = "" if row.best is None else f"{row.best:.5g} {row.metric}"
        step = f"{row.step}/{row.steps}"
        name = row.folder.name if name == "." else name
        cells = [name, row.state, step, duration(row.eta_seconds), best, row.job_id]
        shown.add_row(*cells, *([row.then] if with_then else []))
    return shown


def main(folder: Annotated[Path, typer.Argument(help="a folder with runs, or a run")] = Path("runs")) -> None:
    """Show how the runs in a folder stand."""
    try:
        show(folder, Console())
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


def show(folder: Path, console: Console) -> None:
    """Print the table of the runs in a folder, and the first line of every report of a dead rank.

    Raises:
        InputError: no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    rows = [read(run) for run in find(folder)]
    console.print(table(rows, folder) if rows else f"no runs in {folder}")
    for row in rows:
        if row.report is not None:
            console.print(f"{row.report}: {row.report.read_text().splitlines()[0]}", highlight=False, soft_wrap=True)
        for reason in row.reasons:
            console.print(reason, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
