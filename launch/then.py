"""Jobs that follow a training: its release, its evaluation. They start when the training has finished, and only then.

On SLURM they are held by ``afterok``, which a requeue does not fulfil: a requeued job keeps its id and has not ended.
A training that failed or was cancelled leaves them cancelled (``kill-on-invalid-dep``). submitit's local executor has
no queue: there they are processes that wait for the one before.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from launch import records
from launch.task import KILLED_WITHIN_SECONDS, ending, prepare_child, rank_environment
from mffm.errors import InputError, known

if TYPE_CHECKING:
    import submitit

STEPS = ("release", "evaluate")
POLL_SECONDS = 1.0
WATCH_SECONDS = 0.2  # between two looks at SIGTERM and the heartbeat


def parse(text: str | None) -> list[str]:
    """Return the steps of ``release,evaluate``, in the order given.

    Raises:
        InputError: an unknown step, or one twice.
    """
    steps = [word.strip() for word in (text or "").split(",") if word.strip()]
    for step in steps:
        if step not in STEPS or steps.count(step) > 1:
            raise InputError(f"--then {text}: steps are {known(STEPS)}, each once, e.g. release,evaluate")
    return steps


class FollowUp:
    """The callable that submitit pickles: one step after a training.

    Args:
        step: ``release`` writes RUN/release; ``evaluate`` writes RUN/evaluation-test.json and a parity plot, of the
            release where one was made before, else of the run.
        before: steps of the chain that come first.
        after: job id of the one before, to wait for with the local executor.
    """

    def __init__(
        self, step: str, folder: str, threads: int, environment: Mapping[str, str], before: Sequence[str], after: str
    ):
        self.step = step
        self.folder = folder
        self.threads = threads
        self.environment = dict(environment)
        self.before = list(before)
        self.after = after

    def checkpoint(self) -> "submitit.helpers.DelayedSubmission":
        """Return what a requeued job runs: the same from its beginning."""
        import submitit

        return submitit.helpers.DelayedSubmission(
            FollowUp(self.step, self.folder, self.threads, self.environment, self.before, self.after)
        )

    def __call__(self) -> str:
        """Do the step and return the run's folder; its output goes to RUN/logs/<step>.log.

        SIGTERM (scancel, preemption) ends the step's process. On SLURM the task then waits to be killed: whoever sent
        it decides whether the job starts again. SIGUSR2 stays submitit's, which requeues.

        Raises:
            RuntimeError: the training has not finished, or the step failed.
            SystemExit: asked to stop.
        """
        import submitit

        task = submitit.JobEnvironment()
        folder = Path(self.folder)
        asked: set[int] = set()
        signal.signal(signal.SIGTERM, lambda *_: asked.add(signal.SIGTERM))
        if task.cluster == "local":
            self._wait(folder, asked)
        missing = self._missing(folder)
        if asked:
            self._leave(folder, task)
        if missing is not None:
            return self._fail(folder, task.job_id, missing)
        write_status(folder, self.step, "running", task.job_id)
        log = folder / "logs" / f"{self.step}.log"
        log.parent.mkdir(exist_ok=True)
        command = self.command()
        with log.open("ab") as stream:
            if command is None:
                stream.write(f"{release_of(folder)} is there already\n".encode())
            code = 0 if command is None else self._run(command, stream, rank_environment(task, self.threads), asked)
        if asked and code != 0:
            self._leave(folder, task)
        if code != 0:
            lines = log.read_text(errors="replace").strip().splitlines()
            return self._fail(folder, task.job_id, f"{ending(code)}: {lines[-1] if lines else 'no output'}")
        write_status(folder, self.step, "finished", task.job_id)
        return self.folder

    def command(self) -> list[str] | None:
        """Return the command, None for a release that is there: it is written as a whole or not at all."""
        mffm, release = [sys.executable, "-m", "mffm"], release_of(Path(self.folder))
        if self.step == "release":
            return None if release.is_dir() else [*mffm, "release", self.folder, str(release)]
        of = str(release) if "release" in self.before else self.folder
        return [*mffm, "evaluate", of, "--output", self.folder]

    def _run(self, command: list[str], output: BinaryIO, environment: Mapping[str, str], asked: set[int]) -> int:
        """Run the step's process, with a heartbeat, until it ends or the task is asked to stop; return its code."""
        process = subprocess.Popen(
            command,
            env={**environment, **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=prepare_child,
        )
        beat = time.monotonic()
        try:
            while True:
                try:
                    return process.wait(timeout=WATCH_SECONDS)
                except subprocess.TimeoutExpired:
                    pass
                if asked:
                    process.kill()
                if time.monotonic() - beat > records.HEARTBEAT_SECONDS:
                    beat = time.monotonic()
                    os.utime(path_of(Path(self.folder), self.step))
        finally:  # SIGUSR2: submitit requeues out of its handler
            process.kill()
            process.wait()

    def _leave(self, folder: Path, task: "submitit.JobEnvironment") -> NoReturn:
        write_status(folder, self.step, "stopped", task.job_id)
        if task.cluster != "local":
            time.sleep(KILLED_WITHIN_SECONDS)
        raise SystemExit(128 + signal.SIGTERM)

    def _missing(self, folder: Path) -> str | None:
        state = records.status(folder).get("state")
        if state != "finished":
            return f"the training is {state or 'not started'}, not finished"
        for step in self.before:
            state = status(folder, step).get("state")
            if state != "finished":
                return f"{step} is {state or 'not started'}, not finished"
        return None

    def _wait(self, folder: Path, asked: set[int]) -> None:
        """Wait until all is there, or the process of the one before has ended, or the task is asked to stop."""
        while not asked and records.process_runs(self.after) and self._missing(folder) is not None:
            time.sleep(POLL_SECONDS)

    def _fail(self, folder: Path, job_id: str, reason: str) -> str:
        write_status(folder, self.step, "failed", job_id, reason=reason)
        raise RuntimeError(f"{self.step} of {folder}: {reason}")


def release_of(folder: Path) -> Path:
    return folder / "release"


def check(folder: Path, steps: Sequence[str]) -> None:
    """Refuse a release that is there before its training has finished.

    Raises:
        InputError: it is of another training.
    """
    if "release" in steps and release_of(folder).exists() and records.status(folder).get("state") != "finished":
        raise InputError(f"{release_of(folder)}: exists, of an earlier run; move it away, or leave out --then release")


def status(folder: Path, step: str) -> dict[str, Any]:
    """Return what a step wrote last, empty before its start."""
    return records.read_json(path_of(folder, step))


def path_of(folder: Path, step: str) -> Path:
    return folder / "then" / f"{step}.json"


def write_status(folder: Path, step: str, state: str, job_id: str, **values: Any) -> None:
    path = path_of(folder, step)
    path.parent.mkdir(exist_ok=True)
    records.write_json(path, {"state": state, "job_id": job_id, "changed": records.now(), **values})


def shown(folder: Path, job: Mapping[str, Any], training: str) -> tuple[str, list[str]]:
    """Return how the steps after a training stand, for the table of runs, and the reasons of those that failed.

    A step that says running without a heartbeat is ``lost``; one that was told to end is ``stopped``. Whether SLURM
    starts it again or cancels what follows, files do not tell: that is ``not started``.
    """
    states, reasons, hopeless = [], [], training == "failed"
    held = "waiting" if training in ("queued", "running", "requeued", "finished") else "not started"
    for step, job_id in (job.get("then") or {}).items():
        wrote = status(folder, step)
        state = str(wrote["state"]) if wrote.get("job_id") == job_id else "cancelled" if hopeless else held
        if state == "running" and not records.is_fresh(path_of(folder, step)):
            state = "lost"
        hopeless |= state in ("failed", "cancelled")
        held = "not started" if state in ("lost", "stopped") else held
        states.append(f"{step} {state}")
        if state == "failed":
            reasons.append(f"{folder}: {step} failed: {wrote.get('reason')}")
    return ", ".join(states), reasons
