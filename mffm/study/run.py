"""Run a study: train what is not trained yet, judge what is not judged yet. The same command goes on after a kill."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mffm.config.base import dump
from mffm.config.base import load as load_recipe
from mffm.config.recipe import Recipe
from mffm.errors import InputError
from mffm.evaluate import parity
from mffm.executor import Executor, Job, LocalExecutor, State, handling_stops, locked, process_of
from mffm.release import load, read_json, refit_references, sha256, write_json, write_text
from mffm.study import judges
from mffm.study.cells import Judge
from mffm.study.grid import Cell, Grid, Training


class Stopped(BaseException):
    """The study was interrupted; its trainings have saved."""


@dataclass(frozen=True)
class Judged:
    """A cell with its errors.

    Attributes:
        errors: (kind of split, property) → MAE in the report's units.
        rows: kind of split → rows of `parity.Evaluation.rows`.
        found: judge → what it found; empty for a method that is judged on other labels than the study's.
        cpu_seconds: of the cell's own training; None where it was not measured, 0 for a refit.
        stage_cpu_seconds: of the stage that it uses.
        last_step: of the cell's training, which may have stopped early.
        plan: fingerprint of what the training drew.
    """

    cell: Cell
    errors: dict[tuple[str, str], float]
    rows: dict[str, list[dict[str, Any]]]
    found: dict[str, Any]
    cpu_seconds: float | None
    stage_cpu_seconds: float | None
    last_step: int
    plan: str


class StudyRun:
    """A study in its folder.

    ``recipes/`` holds the recipes, ``runs/`` the runs, ``logs/`` their output, ``records/`` a JSON of each finished
    training, ``cpu/`` the CPU time of each, ``errors/`` a JSON of each judged cell.
    """

    def __init__(self, grid: Grid, folder: Path, executor: Executor, say: Callable[[str], None] = print):
        self.grid, self.folder, self.executor, self.say = grid, folder, executor, say
        self._states: dict[str, State] = {}

    def train(self) -> dict[str, str]:
        """Train what is not finished; return training → last line of its log, of those that failed.

        Raises:
            InputError: the folder holds other recipes, or another controller or training is at work in it.
            Stopped: SIGINT or SIGTERM; every training has saved.
        """
        (self.folder / "records").mkdir(parents=True, exist_ok=True)
        with locked(self.folder / "lock"), _stopping():
            self._write_recipes()
            left = [t for t in self.grid.trainings.values() if not self._record(t.name).is_file()]
            for training in left:
                process = process_of(self._recipe(training.name), self._run(training.name))
                if process is not None:
                    raise InputError(
                        f"{self._run(training.name)}: process {process} of an earlier start still trains it; end it "
                        f"(kill {process} saves a checkpoint first) and give the same command again"
                    )
            self.say(f"{len(self.grid.trainings)} trainings, {len(self.grid.trainings) - len(left)} of them finished")
            jobs = [self._job(t, {other.name for other in left}) for t in left]
            if not jobs:
                return {}
            try:
                states = self.executor.run(jobs, self._report)
            finally:
                self._keep_cpu_time()
        return {name: _last_line(self._log(name)) for name, state in states.items() if state == "failed"}

    def judge(self) -> list[Judged]:
        """Return the errors of every cell whose training is finished; those judged before are read."""
        torch.set_num_threads(1)
        return [self._judge(cell) for cell in self.grid.cells if self._record(cell.training).is_file()]

    def _write_recipes(self) -> None:
        for training in self.grid.trainings.values():
            path = self._recipe(training.name)
            if path.is_file() and self._has_checkpoint(training.name):
                # By what they say: a later mffm writes keys that an earlier one did not know.
                before, now = (_flat(r.model_dump(mode="json")) for r in (load_recipe(Recipe, path), training.recipe))
                changed = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
                if changed:
                    raise InputError(
                        f"{self.folder}: holds a run of {training.name} with another recipe "
                        f"({', '.join(changed[:5])}); give another --folder, or the same YAML on the same store"
                    )
            write_text(path, dump(training.recipe))

    def _job(self, training: Training, left: set[str]) -> Job:
        begun = self._has_checkpoint(training.name)
        arguments = ["resume", str(self._run(training.name))] if begun else ["train", str(self._recipe(training.name))]
        after = [training.after] if training.after in left else []
        return Job(
            training.name, [sys.executable, "-m", "mffm", *arguments], self._log(training.name),
            {"OMP_NUM_THREADS": "1"}, [a for a in after if a],
        )  # fmt: skip

    def _report(self, states: Mapping[str, State]) -> None:
        for name, state in states.items():
            if state == self._states.get(name, "waiting"):
                continue
            self._states[name] = state
            done = sum(s == "done" for s in states.values())
            if state == "running" and isinstance(self.executor, LocalExecutor):
                self._begin_cpu_time(name)
            elif state == "done":
                self._finish(name)
                self.say(f"[{done}/{len(states)}] {name} done")
            elif state == "failed":
                self.say(f"{name} failed: {_last_line(self._log(name))} ({self._log(name)})")

    def _finish(self, name: str) -> None:
        self._keep_cpu_time()
        rows = (self._run(name) / "metrics.jsonl").read_text().splitlines()
        write_json(self._record(name), {"last_step": json.loads(rows[-1])["step"], "finished": time.time()})

    def _keep_cpu_time(self) -> None:
        """Add the CPU time of processes that have ended to what earlier sittings used."""
        if isinstance(self.executor, LocalExecutor):
            for name, seconds in self.executor.cpu_seconds.items():
                before = self._cpu_record(name)
                write_json(
                    self._cpu(name), {**before, "seconds": before.get("seconds", 0.0) + seconds, "is_open": False}
                )
            self.executor.cpu_seconds.clear()

    def _begin_cpu_time(self, name: str) -> None:
        """Note that a process runs: one whose end nobody sees, as the study itself is killed, has a time not known."""
        before = self._cpu_record(name)
        lost = before.get("is_lost", False) or before.get("is_open", False)
        write_json(self._cpu(name), {"seconds": before.get("seconds", 0.0), "is_open": True, "is_lost": lost})

    def _cpu_record(self, name: str) -> dict[str, Any]:
        return read_json(self._cpu(name)) if self._cpu(name).is_file() else {}

    def _cpu_seconds(self, name: str) -> float | None:
        record = self._cpu_record(name)
        return None if not record or record["is_open"] or record["is_lost"] else record["seconds"]

    def _judge(self, cell: Cell) -> Judged:
        path = self.folder / "errors" / f"{cell.name}.json"
        # A potential of differences HF - LF has no energy of its own for the other judges.
        others = self.grid.judges if cell.fidelity == self.grid.config.high else []
        key: dict[str, Any] = {
            "weights_sha256": sha256(self._run(cell.training) / "weights" / "best.safetensors"),
            "splits": self.grid.config.splits, "fidelity": cell.fidelity, "asked": cell.asked, "draw": cell.draw,
        }  # fmt: skip
        if others:
            key["judges"] = judges.digests(others)
        content = read_json(path) if path.is_file() else {}
        if content.get("key") != key:
            content = {"key": key, **self._evaluate(cell, others)}
            write_json(path, content)
        rows = content["splits"]
        errors = {(kind, row["property"]): row["mae"] for kind in rows for row in rows[kind]}
        found = {one.name: content["found"][one.name] for one in others}
        stage = self.grid.stage_of(cell)
        own_cpu = self._cpu_seconds(cell.training)
        stage_cpu = self._cpu_seconds(stage.name) if stage else 0.0
        if cell.is_refit:
            own_cpu, stage_cpu = 0.0, own_cpu
        last_step = read_json(self._record(cell.training))["last_step"]
        return Judged(cell, errors, rows, found, own_cpu, stage_cpu, last_step, content["plan"])

    def _evaluate(self, cell: Cell, others: Sequence[Judge]) -> dict[str, Any]:
        """Return the errors of a cell on the study's splits and what the other judges find."""
        loaded = load(self._run(cell.training))
        own: dict[str, Any] = {}
        if cell.is_refit:
            refitted = refit_references(loaded, self.grid.store, cell.high_rows, cell.fidelity, cell.asked)
            own = {"predict_as": cell.asked, "references": refitted}
        found = {
            kind: parity.evaluate(loaded, self.grid.store, split, [cell.fidelity], **own)
            for kind, split in self.grid.config.splits.items()
        }
        return {
            "splits": {kind: evaluation.rows() for kind, evaluation in found.items()},
            "found": judges.judge(others, loaded, cell.asked),
            "plan": loaded.spec.provenance.get("plan_fingerprint", ""),
        }

    def _has_checkpoint(self, training: str) -> bool:
        return (self._run(training) / "checkpoints" / "latest").exists()

    def _recipe(self, training: str) -> Path:
        return self.folder / "recipes" / f"{training}.yaml"

    def _run(self, training: str) -> Path:
        return self.folder / "runs" / training

    def _log(self, training: str) -> Path:
        return self.folder / "logs" / f"{training}.log"

    def _cpu(self, training: str) -> Path:
        return self.folder / "cpu" / f"{training}.json"

    def _record(self, training: str) -> Path:
        return self.folder / "records" / f"{training}.json"


@contextmanager
def _stopping() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `Stopped` in the main thread; further ones wait for the trainings to save."""

    def handler(number: int, frame: object) -> None:
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, signal.SIG_IGN)
        raise Stopped

    with handling_stops(handler):
        yield


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for key, value in node.items() for k, v in _flat(value, f"{prefix}.{key}" if prefix else key).items()}


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "not started: what it starts from failed")


def machine() -> str:
    """Return the processor, for the report."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = "processor not known"
    return f"{name}, {os.cpu_count()} CPUs"
