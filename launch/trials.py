"""Trials of a sweep as jobs of a SLURM cluster: an executor that submits a trial, or adopts the job that it has."""

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import records, runs
from launch.state import NO_ANSWER, TERMINAL, UNKNOWN, named, slurm_state
from launch.submit import submit
from mffm.config.cluster import ClusterConfig
from mffm.config.recipe import Recipe
from mffm.errors import InputError
from mffm.executor import Job, State

FORGOTTEN_SECONDS = 60.0  # SLURM does not know the job, and rank 0 gives no sign: it is over


@dataclass
class ClusterExecutor:
    """Runs one trial as a SLURM job of launch.submit, which is requeued on preemption and time limits.

    A job outlives its controller: one that is queued, runs or has finished since is adopted, not submitted again.

    Attributes:
        recipe: of the trial, with its run folder.
        poll_seconds: between two questions to SLURM; the run's files are asked first.
    """

    recipe: Recipe
    cluster: ClusterConfig
    say: Callable[[str], None] = print
    poll_seconds: float = 5.0

    def run(self, jobs: Sequence[Job], report: Callable[[Mapping[str, State]], None]) -> Mapping[str, State]:
        """Run the trial, whose job's name must be unique on the cluster; return when its job has ended.

        An exception of ``report`` leaves the job as it is. How the job ended is the last line of ``log``.
        """
        (job,) = jobs
        folder = Path(self.recipe.run_folder)
        if is_finished(folder):  # while no controller was there
            report({job.name: "done"})
            return {job.name: "done"}
        job_id = self._under_way(folder, job, report)
        how = "adopted"
        if job_id is None:
            environment = {**self.cluster.environment, **job.environment}
            cluster = self.cluster.model_copy(update={"environment": environment})
            (one,) = submit(self.recipe, cluster, job_name=job.name)
            job_id, how = one.job.job_id, "submitted"
        elif records.read_json(folder / "job.json").get("job_id") != job_id:
            records.write_json(folder / "job.json", {"job_id": job_id, "executor": "slurm"})
        self._note(job.log, f"job {job_id} {how}")
        state = self._wait(folder, job, job_id, report)
        report({job.name: state})
        return {job.name: state}

    def _under_way(self, folder: Path, job: Job, report: Callable[[Mapping[str, State]], None]) -> str | None:
        """Return the trial's job, None where there is none; ask until SLURM says which."""
        silent = False
        while True:
            try:
                return under_way(folder, job.name)
            except NoAnswerError:
                if not silent:
                    self._note(job.log, f"SLURM does not answer; {job.name} waits until it does")
                silent = True
            report({job.name: "waiting"})
            time.sleep(self.poll_seconds)

    def _wait(self, folder: Path, job: Job, job_id: str, report: Callable[[Mapping[str, State]], None]) -> State:
        watched, silent = Watched(folder, job_id), False
        while True:
            report({job.name: watched.shown()})
            slurm = slurm_state(job_id)
            state, why = watched.state(slurm)
            if why:
                self._note(job.log, why)
            if state in ("done", "failed"):
                return state
            if (slurm == NO_ANSWER) != silent:
                silent = not silent
                self._note(job.log, f"SLURM {'does not answer' if silent else 'answers again'}; job {job_id} is kept")
            time.sleep(self.poll_seconds)

    def _note(self, log: Path, text: str) -> None:
        with log.open("a") as file:
            file.write(f"{records.now()} {text}\n")
        self.say(text)


@dataclass
class Watched:
    """A submitted training, seen by the files of its run and by SLURM's state of its job."""

    folder: Path
    job_id: str
    unknown_since: float | None = None

    def shown(self) -> State:
        """Return whether the training runs, or waits in the queue."""
        return "running" if records.status(self.folder).get("state") == "running" else "waiting"

    def state(self, slurm: str) -> tuple[State, str]:
        """Return the state of the training, and why it failed, given the state that SLURM has just told."""
        if is_finished(self.folder):
            return "done", ""
        if slurm in TERMINAL:
            return "failed", f"job {self.job_id} is {slurm}{_reason(self.folder)}"
        if slurm != UNKNOWN or records.is_alive(self.folder):
            self.unknown_since = None
        elif self.unknown_since is None:
            self.unknown_since = time.monotonic()
        elif time.monotonic() - self.unknown_since > FORGOTTEN_SECONDS:
            return "failed", f"SLURM knows nothing of job {self.job_id}{_reason(self.folder)}"
        return self.shown(), ""


class NoAnswerError(InputError):
    """SLURM does not say whether a trial has a job."""


def under_way(folder: Path, name: str) -> str | None:
    """Return the SLURM job of a trial that is queued or runs, None where there is none.

    The name finds a job whose controller died before it could write job.json.

    Raises:
        NoAnswerError: SLURM does not answer, and the trial may have a job.
    """
    if not (folder / "cluster.yaml").is_file():  # launch.submit writes it before it calls sbatch
        return None
    job = records.read_json(folder / "job.json")
    job_id = str(job.get("job_id", ""))
    state = slurm_state(job_id) if job.get("executor") == "slurm" else UNKNOWN
    if state not in (*TERMINAL, UNKNOWN, NO_ANSWER):
        return job_id
    found = NO_ANSWER if state == NO_ANSWER else named(name)
    if found == NO_ANSWER:
        raise NoAnswerError(
            f"{folder}: SLURM does not answer, so a job may still train it; try again when squeue works. Where there "
            f"is no such job, remove {folder / 'job.json'} and {folder / 'cluster.yaml'}"
        )
    return found


def cancel(folder: Path) -> None:
    """End the job of a trial; it saves first."""
    job = records.read_json(folder / "job.json")
    if job.get("executor") == "slurm":
        subprocess.run(["scancel", str(job["job_id"])], capture_output=True, timeout=30)


def is_finished(folder: Path) -> bool:
    """Return whether a submitted run has nothing left to do."""
    return records.status(folder).get("state") == "finished"


def _reason(folder: Path) -> str:
    report = runs.read(folder).report
    return f": {report.read_text().splitlines()[0]}" if report is not None else ""
