"""Commands that can go on where they stopped, as one array of a SLURM cluster; each is a task on one node.

``arrays/<name>.json`` in the folder is written before sbatch is called, and once more with the ids of the jobs.
"""

import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from launch import records
from launch.arrays import end_half_submitted, of_those_under_way, once_answered
from launch.command import Command
from launch.state import NO_ANSWER, TERMINAL, UNKNOWN, slurm_states
from launch.submit import make_executor, refusals
from launch.trials import FORGOTTEN_SECONDS
from mffm.config.cluster import ClusterConfig
from mffm.errors import InputError
from mffm.executor import Job, State

if TYPE_CHECKING:
    import submitit

Report = Callable[[Mapping[str, State]], None]


class Repeatable(Command):
    """A command that is requeued at a time limit or a preemption, and goes on by itself when it is started again."""

    def checkpoint(self) -> "submitit.helpers.DelayedSubmission":
        """Return what the requeued job runs: the same."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


@dataclass
class CommandArray:
    """Runs commands ``python -m MODULE ...`` as tasks of one array; their output goes to ``rank-0.log`` beside ``log``.

    Jobs outlive their controller: those that are queued or run since an earlier start are adopted.

    Attributes:
        folder: for submitit's files and records of the arrays.
        workers: tasks at a time; None: as many as SLURM starts.
        poll_seconds: between two questions to SLURM, one for all jobs.
    """

    folder: Path
    name: str
    cluster: ClusterConfig
    workers: int | None = None
    say: Callable[[str], None] = print
    poll_seconds: float = 5.0
    _unknown_since: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.cluster.executor != "slurm":
            raise InputError("--cluster needs executor: slurm; without --cluster, work is done on this machine")

    def run(self, jobs: Sequence[Job], report: Report) -> Mapping[str, State]:
        """Run all commands; return when all jobs have ended. An exception leaves the jobs as they are.

        Raises:
            InputError: sbatch refused.
        """
        ids = self._adopt(jobs, report)
        new = [job for job in jobs if job.name not in ids]
        if new:
            ids |= self._submit(new)
        return self._watch(jobs, ids, report)

    def _adopt(self, jobs: Sequence[Job], report: Report) -> dict[str, str]:
        """Return command → job of those that are under way; ask until SLURM says which."""
        names = {job.name for job in jobs}

        def ask() -> dict[str, str]:
            end_half_submitted(self.folder)
            ids: dict[str, str] = {}
            for path in sorted((self.folder / "arrays").glob("*.json"), key=lambda path: path.stat().st_mtime):
                ids |= {name: job_id for name, job_id in records.read_json(path)["jobs"].items() if name in names}
            return of_those_under_way(ids)

        def wait() -> None:
            report({job.name: "waiting" for job in jobs})
            time.sleep(self.poll_seconds)

        found = once_answered(ask, wait, self.say)
        if found:
            self.say(f"{len(found)} task(s) of an earlier start are queued or run")
        return found

    def _submit(self, jobs: Sequence[Job]) -> dict[str, str]:
        """Submit commands as one array; return command → job."""
        one = {"nodes": 1, "tasks_per_node": 1, "gpus_per_node": min(1, self.cluster.gpus_per_node)}
        slurm = dict(self.cluster.slurm)
        if self.workers:
            slurm["slurm_array_parallelism"] = self.workers
        cluster = self.cluster.model_copy(update={**one, "slurm": slurm})
        name = f"{self.name}-{secrets.token_hex(3)}"
        path = self.folder / "arrays" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        records.write_json(path, {})
        executor = make_executor(self.folder / "submitit", name, cluster, None)
        bodies = []
        for job in jobs:
            place = job.log.parent
            place.mkdir(parents=True, exist_ok=True)
            for old in place.glob("rank-0.*"):
                old.unlink()
            assert list(job.command[:2]) == [sys.executable, "-m"], job.command
            bodies.append(Repeatable(job.command[2], job.command[3:], str(place), 1, cluster.environment))
        with refusals("the array"), executor.batch():
            submitted = [executor.submit(body) for body in bodies]
        ids = {job.name: one.job_id for job, one in zip(jobs, submitted, strict=True)}
        records.write_json(path, {"jobs": ids})
        self.say(f"array {submitted[0].job_id.partition('_')[0]}: {len(jobs)} task(s) submitted")
        return ids

    def _watch(self, jobs: Sequence[Job], ids: Mapping[str, str], report: Report) -> Mapping[str, State]:
        states: dict[str, State] = {job.name: "waiting" for job in jobs}
        silent = False
        while True:
            left = [job for job in jobs if states[job.name] not in ("done", "failed")]
            slurm = slurm_states([ids[job.name] for job in left])
            for job in left:
                states[job.name] = self._state(job.log.parent, slurm[ids[job.name]], ids[job.name])
            report(states)
            if all(state in ("done", "failed") for state in states.values()):
                return states
            if (NO_ANSWER in slurm.values()) != silent:
                silent = not silent
                self.say(f"SLURM {'does not answer; the jobs are kept' if silent else 'answers again'}")
            time.sleep(self.poll_seconds)

    def _state(self, place: Path, slurm: str, job_id: str) -> State:
        if (place / "rank-0.done").exists() or slurm == "COMPLETED":
            return "done"
        if (place / "rank-0.failed").exists() or slurm in TERMINAL:
            return "failed"
        if slurm != UNKNOWN:
            self._unknown_since.pop(job_id, None)
        elif time.monotonic() - self._unknown_since.setdefault(job_id, time.monotonic()) > FORGOTTEN_SECONDS:
            return "failed"
        return "running" if slurm == "RUNNING" else "waiting"


def refuse_under_way(folder: Path) -> None:
    """Refuse to go on without a cluster while tasks of an earlier start on one are at work.

    Raises:
        InputError: there are such tasks, or SLURM does not answer.
    """
    for path in (folder / "arrays").glob("*.json"):
        jobs = records.read_json(path).get("jobs", {})
        states = slurm_states(list(jobs.values()))
        if any(state not in (*TERMINAL, UNKNOWN) for state in states.values()):
            silent = NO_ANSWER in states.values()
            raise InputError(
                f"{folder}: {'SLURM does not answer, so tasks' if silent else 'tasks'} of an earlier start with "
                f"--cluster {'may be' if silent else 'are'} at work; go on with --cluster, or end them first: "
                f"scancel --name {path.stem}"
            )
