"""The trainings of a study as arrays of a SLURM cluster: one of those that can start at once, one behind each stage.

``arrays/<name>.json`` in the study's folder is written before sbatch is called, and once more with the ids of the jobs.
"""

import secrets
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from launch import records
from launch.state import NO_ANSWER, TERMINAL, UNKNOWN, named, slurm_states
from launch.submit import check_folder, load_recipe, submit_checked, with_absolute_paths
from launch.trials import NoAnswerError, Watched, cancel, is_finished
from mffm.config.cluster import ClusterConfig
from mffm.config.recipe import Recipe
from mffm.errors import InputError
from mffm.executor import Job, State

Report = Callable[[Mapping[str, State]], None]
Answer = TypeVar("Answer")
Key = TypeVar("Key")


@dataclass
class ArrayExecutor:
    """Runs trainings as tasks of arrays, each of which is requeued by itself on preemption and time limits.

    A task starts when the training is finished that it starts from: SLURM holds it by ``afterok`` until then. Jobs
    outlive their controller: those that are queued, run or have finished since are adopted, not submitted again.

    Attributes:
        folder: of the study.
        name: first part of the arrays' names in the queue.
        workers: tasks at a time; None: as many as SLURM starts.
        poll_seconds: between two questions to SLURM, one for all jobs.
    """

    folder: Path
    name: str
    cluster: ClusterConfig
    workers: int | None = None
    say: Callable[[str], None] = print
    poll_seconds: float = 5.0

    def __post_init__(self) -> None:
        if self.cluster.executor != "slurm":
            raise InputError("--cluster needs executor: slurm; without --cluster, trainings run on this machine")
        self.folder = self.folder.resolve()

    def run(self, jobs: Sequence[Job], report: Report) -> Mapping[str, State]:
        """Run ``mffm train RECIPE`` and ``mffm resume RUN``, in one environment; return when all jobs have ended.

        An exception of ``report`` or a signal leaves the jobs as they are. How a job ended is the last line of its log.

        Raises:
            InputError: sbatch refused; what was submitted before stays in the queue.
        """
        assert all(job.environment == jobs[0].environment for job in jobs)
        recipes = {job.name: with_absolute_paths(load_recipe(Path(job.command[-1]), [])) for job in jobs}
        runs = {name: Path(recipe.run_folder) for name, recipe in recipes.items()}
        ids = self._adopt(jobs, runs, report)
        finished = {name for name, run in runs.items() if is_finished(run)}
        new = [job for job in jobs if job.name not in ids and job.name not in finished]
        behind = {job_id.partition("_")[0] for job_id in ids.values()}
        for after, group in groups(new, finished).items():
            held = ":".join(ids[name] for name in after) or None
            submitted = self._submit(group, recipes, held, ":".join(sorted(behind)) if self.workers else None)
            behind = {job_id.partition("_")[0] for job_id in submitted.values()}
            ids |= submitted
        return self._watch(jobs, {name: Watched(run, ids.get(name, "")) for name, run in runs.items()}, report)

    def _adopt(self, jobs: Sequence[Job], runs: Mapping[str, Path], report: Report) -> dict[str, str]:
        """Return training → job of those that are under way; ask until SLURM says which."""

        def ask() -> dict[Path, str]:
            end_half_submitted(self.folder)
            return under_way(list(runs.values()))

        def wait() -> None:
            report({job.name: "waiting" for job in jobs})
            time.sleep(self.poll_seconds)

        found = once_answered(ask, wait, self.say)
        ids = {job.name: found[runs[job.name]] for job in jobs if runs[job.name] in found}
        for job in jobs:
            if job.name in ids:
                _note(job.log, f"job {ids[job.name]} adopted")
        if ids:
            self.say(f"{len(ids)} training(s) of an earlier start are queued or run")
        return ids

    def _submit(
        self, jobs: Sequence[Job], recipes: Mapping[str, Recipe], after: str | None, behind: str | None
    ) -> dict[str, str]:
        """Submit trainings as one array; return training → job."""
        wanted = [recipes[job.name] for job in jobs]
        for recipe in wanted:
            last = records.read_json(Path(recipe.run_folder) / "job.json").get("job_id")
            check_folder(recipe, last)  # it has ended: `under_way` has asked for all of them
        slurm = {**self.cluster.slurm, "slurm_array_parallelism": self.workers} if self.workers else self.cluster.slurm
        environment = {**self.cluster.environment, **jobs[0].environment}
        cluster = self.cluster.model_copy(update={"environment": environment, "slurm": slurm})
        name = f"{self.name}-{secrets.token_hex(3)}"
        path = self.folder / "arrays" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        records.write_json(path, {"after": after, "behind": behind})
        submitted = submit_checked(wanted, cluster, self.folder / "submitit", name, after, behind)
        ids = {job.name: one.job.job_id for job, one in zip(jobs, submitted, strict=True)}
        records.write_json(path, {"after": after, "behind": behind, "jobs": ids})
        for job in jobs:
            _note(job.log, f"job {ids[job.name]} submitted")
        waits = f", behind {after}" if after else ""
        self.say(f"array {submitted[0].job.job_id.partition('_')[0]}: {len(jobs)} training(s) submitted{waits}")
        return ids

    def _watch(self, jobs: Sequence[Job], watched: Mapping[str, Watched], report: Report) -> Mapping[str, State]:
        states: dict[str, State] = {job.name: "waiting" for job in jobs}
        silent = False
        while True:
            left = [job for job in jobs if states[job.name] not in ("done", "failed")]
            slurm = slurm_states([watched[job.name].job_id for job in left if watched[job.name].job_id])
            for job in left:
                one = watched[job.name]
                lost = [name for name in job.after if states.get(name) == "failed"]
                if lost:
                    cancel(one.folder)  # where SLURM does not do so itself
                    states[job.name], why = "failed", f"not started: {lost[0]} failed"
                else:
                    states[job.name], why = one.state(slurm.get(one.job_id, UNKNOWN))
                if why:
                    _note(job.log, why)
            report(states)
            if all(state in ("done", "failed") for state in states.values()):
                return states
            if (NO_ANSWER in slurm.values()) != silent:
                silent = not silent
                self.say(f"SLURM {'does not answer; the jobs are kept' if silent else 'answers again'}")
            time.sleep(self.poll_seconds)


def groups(jobs: Sequence[Job], finished: Collection[str]) -> dict[tuple[str, ...], list[Job]]:
    """Return jobs by what they still wait for, in an order that suits it if that of ``jobs`` does."""
    found: dict[tuple[str, ...], list[Job]] = {(): []}
    for job in jobs:
        found.setdefault(tuple(name for name in job.after if name not in finished), []).append(job)
    return {after: group for after, group in found.items() if group}


def once_answered(ask: Callable[[], Answer], wait: Callable[[], None], say: Callable[[str], None]) -> Answer:
    """Ask until SLURM answers; say once why it is waited for."""
    silent = False
    while True:
        try:
            return ask()
        except NoAnswerError as error:
            if not silent:
                say(f"{error}; waiting")
            silent = True
        wait()


def under_way(runs: Sequence[Path]) -> dict[Path, str]:
    """Return run → its job, of those whose job is queued or runs.

    Raises:
        NoAnswerError: SLURM does not answer.
    """
    jobs = {run: records.read_json(run / "job.json") for run in runs}
    ids = {run: str(job["job_id"]) for run, job in jobs.items() if job.get("executor") == "slurm"}
    return of_those_under_way(ids)


def of_those_under_way(ids: Mapping[Key, str]) -> dict[Key, str]:
    """Return the entries of jobs that are queued or run.

    Raises:
        NoAnswerError: SLURM does not answer.
    """
    states = slurm_states(list(ids.values()))
    if NO_ANSWER in states.values():
        raise NoAnswerError("SLURM does not answer, so jobs may be under way")
    return {key: job_id for key, job_id in ids.items() if states[job_id] not in (*TERMINAL, UNKNOWN)}


def end_half_submitted(folder: Path) -> None:
    """End arrays whose controller was killed between sbatch and its last record: tasks of theirs may lack their pickle.

    Raises:
        NoAnswerError: SLURM does not answer, or such an array has not ended yet.
    """
    for path in (folder / "arrays").glob("*.json"):
        if "jobs" in records.read_json(path):
            continue
        job = named(path.stem)
        if job is not None:
            subprocess.run(["scancel", "--name", path.stem], capture_output=True, timeout=30)
            raise NoAnswerError(
                "SLURM does not answer, so jobs may be under way" if job == NO_ANSWER
                else f"array {job.partition('_')[0]} was cut short as it was submitted and is being ended"
            )  # fmt: skip
        path.unlink()


def refuse_under_way(folder: Path) -> None:
    """Refuse to train a study here while jobs of an earlier start on a cluster train it.

    Raises:
        InputError: there are such jobs, or SLURM does not answer.
    """
    for path in (folder / "arrays").glob("*.json"):
        job = named(path.stem)
        if job == NO_ANSWER:
            raise NoAnswerError(
                f"{folder}: SLURM does not answer, so jobs of an earlier start with --cluster may train this study; "
                f"try again when squeue works. Where there are none, remove {path.parent}"
            )
        if job is not None:
            raise InputError(
                f"{folder}: array {job.partition('_')[0]} of an earlier start with --cluster trains this study; go on "
                f"with --cluster, or end it first: scancel --name {path.stem}"
            )


def _note(log: Path, text: str) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        file.write(f"{records.now()} {text}\n")
