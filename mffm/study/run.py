"""Run a study: train what is not trained yet, judge what is not judged yet. The same command goes on after a kill."""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from mffm.config.base import dump
from mffm.config.base import load as load_recipe
from mffm.config.recipe import Recipe
from mffm.errors import InputError
from mffm.evaluate import parity
from mffm.executor import Executor, Job, LocalExecutor, State, handling_stops, locked, machine, process_of, usages
from mffm.release import load, read_json, refit_references, sha256, write_json, write_text
from mffm.study import judges
from mffm.study.cells import Judge
from mffm.study.grid import Cell, Grid, Training


class Stopped(BaseException):
    """The study was interrupted; its trainings have saved."""


@dataclass(frozen=True)
class Judged:
    """A cell with its errors; of several trials, ``cell.training`` is the one that was chosen.

    Attributes:
        errors: (kind of split, property) → MAE in the report's units.
        rows: kind of split → rows of `parity.Evaluation.rows`.
        found: judge → what it found; empty for a method that is judged on other labels than the study's.
        cpu_seconds: of the cell's own training; None where it was not measured, 0 for a refit.
        stage_cpu_seconds: of the stages that it uses.
        last_step: of the cell's training, which may have stopped early.
        plan: fingerprint of what the training drew.
        frames: (kind of split, property) → errors of every frame.
        machines: where it was trained, and its stages.
    """

    cell: Cell
    errors: dict[tuple[str, str], float]
    rows: dict[str, list[dict[str, Any]]]
    found: dict[str, Any]
    cpu_seconds: float | None
    stage_cpu_seconds: float | None
    last_step: int
    plan: str
    frames: dict[tuple[str, str], parity.FrameErrors]
    machines: list[str]


class StudyRun:
    """A study in its folder.

    ``recipes/`` holds the recipes, ``runs/`` the runs, ``logs/`` their output, ``records/`` a JSON of each finished
    training, ``cpu/`` the CPU time of each, ``errors/`` a JSON of each judged cell and an NPZ of its frames.
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
        """Return the errors of every cell whose trainings are finished; those judged before are read."""
        torch.set_num_threads(1)
        finished = [
            cell for cell in self.grid.cells if all(self._record(t).is_file() for t in {*cell.trials, *cell.judged})
        ]  # fmt: skip
        return [self._judge(self._chosen(cell)) for cell in finished]

    def _chosen(self, cell: Cell) -> Cell:
        """Return a cell with its best trial by validation as its training; the first of equals."""
        if len(cell.trials) == 1:
            return cell
        best = {t: read_json(self._record(t))["best"] for t in cell.trials}
        return replace(cell, training=min(cell.trials, key=lambda t: math.inf if best[t] is None else best[t]))

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
        rows = [json.loads(line) for line in (self._run(name) / "metrics.jsonl").read_text().splitlines()]
        best = next((row["best"] for row in reversed(rows) if "best" in row), None)
        write_json(self._record(name), {
            "last_step": rows[-1]["step"], "best": best, "finished": time.time(), "machine": machine()
        })  # fmt: skip

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
        """Return the CPU time of a training in all sittings and in all starts of its jobs on a cluster."""
        record, used = self._cpu_record(name), [usage.cpu_seconds for usage in usages(self._run(name))]
        if record:
            used.append(None if record["is_open"] or record["is_lost"] else record["seconds"])
        known = [seconds for seconds in used if seconds is not None]
        return sum(known) if used and len(known) == len(used) else None

    def _machines(self, name: str) -> list[str]:
        used = [usage.machine for usage in usages(self._run(name))]
        return used or [read_json(self._record(name)).get("machine", "machine not recorded")]

    def _judge(self, cell: Cell) -> Judged:
        path = self.folder / "errors" / f"{cell.name}.json"
        # Of differences HF - LF, alone or added to something, the other judges know no energy.
        others = self.grid.judges if cell.fidelity == self.grid.config.high and cell.plus is None else []
        content = read_json(path) if path.is_file() else {}
        weights = self._weights(cell, content.get("key", {}))
        key: dict[str, Any] = {
            "weights_sha256": weights[cell.training], "splits": self.grid.config.splits, "fidelity": cell.fidelity,
            "asked": cell.asked, "draw": cell.draw,
        }  # fmt: skip
        if cell.plus is not None:
            key["plus_weights_sha256"] = weights[cell.plus]
        if others:
            key["judges"] = judges.digests(others)
        frames = path.with_suffix(".npz")
        if content.get("key") != key or not frames.is_file():
            path.unlink(missing_ok=True)  # so that a kill leaves no JSON with the frames of other weights
            content = {"key": key, **self._evaluate(cell, others, frames)}
            write_json(path, content)
        rows = content["splits"]
        errors = {(kind, row["property"]): row["mae"] for kind in rows for row in rows[kind]}
        found = {one.name: content["found"][one.name] for one in others}
        own_cpu, stage_cpu = self.cpu_seconds(cell)
        last_step = read_json(self._record(cell.training))["last_step"]
        stages = [stage.name for stage in self.grid.stages_of(cell)]
        machines = [m for t in (cell.training, *stages) for m in self._machines(t)]
        by_frame = read_frames(frames, errors)
        return Judged(
            cell, errors, rows, found, own_cpu, stage_cpu, last_step, content["plan"], by_frame, machines
        )  # fmt: skip

    def _weights(self, cell: Cell, judged: Mapping[str, Any]) -> dict[str, str]:
        """Return the digest of the weights that a cell is judged by; of runs that are gone, those that were judged.

        A study whose cells are judged may give up its runs, or be copied without them.
        """
        then = {cell.training: judged.get("weights_sha256")}
        if cell.plus is not None:
            then[cell.plus] = judged.get("plus_weights_sha256")
        gone = {name: digest for name, digest in then.items() if digest and not self._run(name).exists()}
        self._require_runs(cell, but=gone)
        return {n: gone.get(n) or sha256(self._run(n) / "weights" / "best.safetensors") for n in then}

    def _require_runs(self, cell: Cell, but: Iterable[str] = ()) -> None:
        gone = next((name for name in {*cell.judged} - {*but} if not self._run(name).exists()), None)
        if gone is not None:
            raise InputError(
                f"{self._run(gone)}: the run is gone, and {cell.name} must be judged again; remove "
                f"{self._record(gone)} to train it again"
            )

    def cpu_seconds(self, cell: Cell) -> tuple[float | None, float | None]:
        """Return the CPU time of a cell's own training, 0 for a refit, and of the stages that it uses.

        None: not measured, or not trained yet.
        """
        own = self._cpu_seconds(cell.training)
        of_stages = [self._cpu_seconds(stage.name) for stage in self.grid.stages_of(cell)]
        measured = [seconds for seconds in of_stages if seconds is not None]
        stages = sum(measured) if len(measured) == len(of_stages) else None
        return (0.0, own) if cell.is_refit else (own, stages)

    def _evaluate(self, cell: Cell, others: Sequence[Judge], frames: Path) -> dict[str, Any]:
        """Return the errors of a cell on the study's splits and what the other judges find; write those of frames."""
        self._require_runs(cell)
        loaded = load(self._run(cell.training))
        own: dict[str, Any] = {}
        if cell.is_refit:
            refitted = refit_references(loaded, self.grid.store, cell.high_rows, cell.fidelity, cell.asked)
            own = {"predict_as": cell.asked, "references": refitted}
        elif cell.plus is not None:
            low = self.grid.trainings[cell.plus].recipe.fidelities[0]
            own = {"predict_as": cell.asked, "plus": parity.Addend(load(self._run(cell.plus)), low)}
        found = {
            kind: parity.evaluate(loaded, self.grid.store, split, [cell.fidelity], **own)
            for kind, split in self.grid.config.splits.items()
        }
        by_kind = {kind: evaluation.frame_errors(cell.fidelity) for kind, evaluation in found.items()}
        write_frames(frames, {(k, p): errors for k, props in by_kind.items() for p, errors in props.items()})
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


FIELDS = [field.name for field in fields(parity.FrameErrors)]


def write_frames(path: Path, frames: Mapping[tuple[str, str], parity.FrameErrors]) -> None:
    """Write the errors of a cell's frames aside, and rename."""
    aside = path.with_name(path.name + ".partial")
    arrays = {f"{kind}.{prop}.{name}": getattr(f, name) for (kind, prop), f in frames.items() for name in FIELDS}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error}); free some space") from error


def read_frames(path: Path, panels: Iterable[tuple[str, str]]) -> dict[tuple[str, str], parity.FrameErrors]:
    try:
        with np.load(path) as arrays:
            return {
                (kind, prop): parity.FrameErrors(*(arrays[f"{kind}.{prop}.{name}"] for name in FIELDS))
                for kind, prop in panels
            }
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise InputError(f"{path}: damaged ({error}); remove it, and its cell is judged again") from error


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
