"""Submit a recipe: ``python -m launch.submit RECIPE --cluster configs/clusters/local.yaml [key.key=value ...]``."""

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch import records, then
from launch.state import NO_ANSWER, TERMINAL, UNKNOWN, slurm_state
from launch.task import Training
from mffm.config.base import Schema, dump, load
from mffm.config.cluster import ClusterConfig
from mffm.config.recipe import Recipe
from mffm.errors import InputError

if TYPE_CHECKING:
    import submitit

ROOT = Path(__file__).parents[1]  # of the clone, where launch runs from one


@dataclass(frozen=True)
class Submitted:
    """A job and the folder of its run."""

    job: "submitit.Job[str]"
    folder: Path


def submit(
    recipe: Recipe,
    cluster: ClusterConfig,
    seeds: Sequence[int] = (),
    after: str | None = None,
    job_name: str | None = None,
    steps: Sequence[str] = (),
) -> list[Submitted]:
    """Write the folders of the runs and submit them: one job, or an array with one task a seed.

    Args:
        seeds: one run each, in ``<run>/seed-<n>``, all in one group of the tracker.
        after: job ids, joined by ``:``, that must be done before this one starts.
        job_name: in the queue; None: the recipe's name.
        steps: what follows each training when it has finished, as jobs of their own; see ``then``.

    Raises:
        InputError: the folder holds another run, its run is under way, or the cluster cannot do what is asked; where
            sbatch took the trainings and refused a step, they stay in the queue.
    """
    if cluster.executor == "local" and (seeds or after):
        raise InputError("executor local has no queue: --seeds and --after need executor: slurm")
    recipe = with_absolute_paths(recipe)
    base = Path(recipe.run_folder)
    if seeds:
        runs = [
            recipe.model_copy(
                update={
                    "name": f"{recipe.name}-seed-{seed}",
                    "seed": seed,
                    "run": str(base / f"seed-{seed}"),
                    "log": recipe.log.model_copy(update={"group": recipe.log.group or recipe.name}),
                }
            )
            for seed in dict.fromkeys(seeds)
        ]
    else:
        runs = [recipe]
    for run in runs:
        check_folder(run, after)
        then.check(Path(run.run_folder), steps)
    submitted = submit_checked(runs, cluster, base / "submitit", job_name or recipe.name, after)
    if steps:
        _follow_all(submitted, cluster, steps, job_name or recipe.name)
    return submitted


def submit_checked(
    runs: Sequence[Recipe],
    cluster: ClusterConfig,
    place: Path,
    name: str,
    after: str | None = None,
    behind: str | None = None,
) -> list[Submitted]:
    """Write the folders of runs that `check_folder` let through, and submit them: one job, or one array.

    Args:
        place: folder for submitit's files.
        name: in the queue.
        after, behind: job ids, joined by ``:``, that must be done, or must have ended somehow, before these start.

    Raises:
        InputError: sbatch refused.
    """
    code = code_version()
    folders = [prepare_folder(run, cluster, code) for run in runs]
    executor = make_executor(place, name, cluster, after, behind)
    jobs: list[submitit.Job[str]] = []
    bodies = [Training(str(folder), cluster.cpus_per_task, cluster.environment) for folder in folders]
    with refusals("the job"):
        if len(bodies) == 1:
            jobs.append(executor.submit(bodies[0]))
        else:
            with executor.batch():
                jobs.extend(executor.submit(body) for body in bodies)
    for job, folder in zip(jobs, folders, strict=True):
        written = {
            "job_id": job.job_id,
            "executor": cluster.executor,
            "nodes": cluster.nodes,
            "tasks_per_node": cluster.tasks_per_node,
            "after": after,
            "submitted": time.time(),
            "submitted_at": records.now(),
        }
        records.write_json(folder / "job.json", written)
    return [Submitted(job, folder) for job, folder in zip(jobs, folders, strict=True)]


@contextmanager
def refusals(of: str) -> Iterator[None]:
    """Make sbatch's refusal an InputError in its own words."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ == "FailedJobError":
            raise InputError(f"sbatch refused {of}: {str(error).strip()}") from error
        raise


def _follow_all(submitted: Sequence[Submitted], cluster: ClusterConfig, steps: Sequence[str], name: str) -> None:
    """Submit what follows each training, up to the first refusal.

    Raises:
        InputError: a refusal; the trainings stay in the queue, and the message says how to add what is missing.
    """
    refusal: InputError | None = None
    queued, missing = [], []
    for one in submitted:
        ids: dict[str, str] = {}
        if refusal is None:
            try:
                follow(one.job.job_id, one.folder, cluster, steps, name, ids)
            except InputError as error:
                refusal = error
            path = one.folder / "job.json"
            records.write_json(path, {**records.read_json(path), "then": ids})
        queued += [f"job {one.job.job_id} (training of {one.folder})", *(f"job {ids[step]} ({step})" for step in ids)]
        if len(ids) < len(steps):
            after = ":".join((one.job.job_id, *ids.values()))
            more = f"--cluster {one.folder / 'cluster.yaml'} --after {after} --then {','.join(steps)}"
            missing.append(f"  python -m launch.submit {one.folder} {more}")
    if refusal is not None:
        add = "\n".join(missing)
        raise InputError(f"{refusal}\nqueued all the same: {', '.join(queued)}\nadd what is missing with:\n{add}")


def follow(
    job_id: str, folder: Path, cluster: ClusterConfig, steps: Sequence[str], name: str, ids: dict[str, str]
) -> None:
    """Submit the steps after a training, each after the one before, on one task.

    Args:
        ids: gets step → job id of every job that is queued.

    Raises:
        InputError: sbatch refused one.
    """
    one = {"nodes": 1, "tasks_per_node": 1, "gpus_per_node": min(1, cluster.gpus_per_node)}
    small = cluster.model_copy(update=one)
    for step in steps:
        after = next(reversed(ids.values()), job_id)
        held = after if cluster.executor == "slurm" else None
        executor = make_executor(folder / "submitit", f"{name}-{step}", small, held)
        body = then.FollowUp(step, str(folder), cluster.cpus_per_task, cluster.environment, list(ids), after)
        with refusals(f"{step} of {folder}"):
            ids[step] = executor.submit(body).job_id


def make_executor(
    folder: Path, name: str, cluster: ClusterConfig, after: str | None, behind: str | None = None
) -> "submitit.AutoExecutor":
    """Return submitit's executor for a cluster; ``after`` and ``behind`` as for `submit_checked`.

    Raises:
        InputError: no SLURM here, or a parameter that submitit does not know.
    """
    import submitit

    parameters: dict[str, Any] = {
        "name": name,
        "nodes": cluster.nodes,
        "tasks_per_node": cluster.tasks_per_node,
        "timeout_min": cluster.time_minutes,
    }
    if cluster.gpus_per_node:
        parameters["gpus_per_node"] = cluster.gpus_per_node
    options: dict[str, Any] = {}
    if cluster.executor == "slurm":
        options["slurm_max_num_timeout"] = cluster.max_timeouts
        if cluster.python:
            options["slurm_python"] = cluster.python
        parameters |= slurm_parameters(cluster, after, behind)
    elif cluster.setup:
        parameters["local_setup"] = cluster.setup
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster.executor, **options)
        executor.update_parameters(**parameters)
    except (RuntimeError, NameError, AssertionError) as error:
        raise InputError(f"cluster: {error}") from error
    return executor


def slurm_parameters(cluster: ClusterConfig, after: str | None, behind: str | None) -> dict[str, Any]:
    """Return submitit's parameters that only SLURM has; what the YAML gives under ``slurm`` wins."""
    setup = list(cluster.setup)
    if (ROOT / "pyproject.toml").is_file() and not cluster.python:  # a clone, not an installed package
        setup.append(f"export PYTHONPATH='{ROOT}'${{PYTHONPATH:+:$PYTHONPATH}}")
    given = dict(cluster.slurm)
    # Since SLURM 22.05 srun does not take --cpus-per-task from sbatch.
    srun = ["--kill-on-bad-exit=1", f"--cpus-per-task={cluster.cpus_per_task}", *given.pop("slurm_srun_args", [])]
    # Without --requeue a cluster with JobRequeue=0 refuses to requeue.
    extra = {"requeue": True, **given.pop("slurm_additional_parameters", {})}
    parameters: dict[str, Any] = {
        "cpus_per_task": cluster.cpus_per_task,
        "slurm_signal_delay_s": cluster.warn_seconds,
        "slurm_setup": setup,
        "slurm_srun_args": srun,
    }
    held = [f"{kind}:{jobs}" for kind, jobs in (("afterok", after), ("afterany", behind)) if jobs]
    if held:
        parameters["slurm_dependency"] = ",".join(held)
        extra.setdefault("kill-on-invalid-dep", "yes")  # else a job waits for ever for one that failed
    return {**parameters, "slurm_additional_parameters": extra, **given}


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Return the recipe with absolute paths: a job may start in another folder."""
    pools = [
        pool if pool.only is None else pool.model_copy(update={"only": str(Path(pool.only).resolve())})
        for pool in recipe.data.plan.pools
    ]
    data = {
        "store": str(Path(recipe.data.store).resolve()),
        "plan": recipe.data.plan.model_copy(update={"pools": pools}),
    }
    update: dict[str, Any] = {
        "run": str(Path(recipe.run_folder).resolve()),
        "data": recipe.data.model_copy(update=data),
    }
    if recipe.start_from is not None:
        update["start_from"] = str(Path(recipe.start_from).resolve())
    return recipe.model_copy(update=update)


def check_folder(recipe: Recipe, after: str | None = None) -> None:
    """Refuse a folder whose run is another one, or is under way.

    A resume takes the run's own recipe: a changed one would silently not be used.

    Raises:
        InputError: with the first differing key, or the job that is under way, or may be: SLURM does not answer.
    """
    folder = Path(recipe.run_folder)
    job = records.read_json(folder / "job.json")
    job_id = str(job.get("job_id", ""))
    if job.get("executor") == "slurm" and job_id not in (after or "").split(":"):
        state = slurm_state(job_id)
        if state == NO_ANSWER:
            raise InputError(
                f"{folder}: SLURM does not answer, so job {job_id} of this run may be under way; try again when squeue "
                f"works. If that job is over, remove {folder / 'job.json'}"
            )
        if state not in TERMINAL and state != UNKNOWN:
            raise InputError(f"{folder}: job {job_id} of this run is {state}; end it first: scancel {job_id}")
    if job.get("executor") == "local" and records.is_alive(folder) and records.process_runs(job_id):
        raise InputError(f"{folder}: a local job of this run is running: process {job_id}")
    if not (folder / "checkpoints" / "latest").is_file():
        return
    have = _leaves(with_absolute_paths(load(Recipe, folder / "recipe.yaml")))
    for name, value in _leaves(recipe).items():
        # None: chosen and pinned when the run started
        if value is not None and name != "run" and have.get(name) != value:
            raise InputError(
                f"{folder}: holds a run with {name}={have.get(name)!r}, not {value!r}. Give another folder with "
                f"run=..., or go on with that run: python -m launch.submit {folder} --cluster ..."
            )


def _leaves(config: Schema) -> dict[str, Any]:
    def walk(node: Any, prefix: str) -> dict[str, Any]:
        if isinstance(node, dict) and node:
            return {k: v for key, inner in node.items() for k, v in walk(inner, f"{prefix}{key}.").items()}
        return {prefix[:-1]: node}

    return walk(config.model_dump(mode="json"), "")


def prepare_folder(recipe: Recipe, cluster: ClusterConfig, code: tuple[dict[str, Any], str]) -> Path:
    """Write the resolved recipe, the cluster's YAML and the version of the code into the run's folder."""
    folder = Path(recipe.run_folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "checkpoints" / "latest").is_file():
        (folder / "status.json").unlink(missing_ok=True)  # of a run whose checkpoints were removed
    (folder / "submitted.yaml").write_text(dump(recipe))
    (folder / "cluster.yaml").write_text(dump(cluster))
    version, diff = code
    records.write_json(folder / "code.json", version)
    (folder / "code.diff").unlink(missing_ok=True)
    if diff:
        (folder / "code.diff").write_text(diff)
    return folder


def code_version() -> tuple[dict[str, Any], str]:
    """Return version, commit, dirty and Python for code.json, and the diff of tracked files against the commit."""
    try:
        version = metadata.version("mffm")
    except metadata.PackageNotFoundError:
        version = "not installed"
    found: dict[str, Any] = {"version": version, "commit": None, "dirty": None}
    diff = ""
    if (ROOT / ".git").exists():
        found["commit"] = _git("rev-parse", "HEAD").strip() or None
        found["dirty"] = bool(_git("status", "--porcelain").strip())
        diff = _git("diff", "HEAD") if found["dirty"] else ""
    return {**found, "python": sys.version.split()[0], "argv": sys.argv, "written": records.now()}, diff


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def load_recipe(path: Path, overrides: Sequence[str]) -> Recipe:
    """Return a recipe, or that of a run's folder, to go on with it."""
    if not path.is_dir():
        return load(Recipe, path, overrides)
    if overrides:
        raise InputError(f"{path}: a run goes on with its own recipe; overrides need a new run")
    own = path / "recipe.yaml"
    recipe = load(Recipe, own if own.is_file() else path / "submitted.yaml")
    return recipe.model_copy(update={"run": str(path)})


def load_cluster(path: Path, nodes: int | None, gpus_per_node: int | None, time_minutes: int | None) -> ClusterConfig:
    """Return a cluster's YAML with the command line's changes; with GPUs there is one rank a GPU."""
    overrides = []
    if nodes is not None:
        overrides.append(f"nodes={nodes}")
    if gpus_per_node is not None:
        overrides += [f"gpus_per_node={gpus_per_node}", f"tasks_per_node={max(1, gpus_per_node)}"]
    if time_minutes is not None:
        overrides.append(f"time_minutes={time_minutes}")
    return load(ClusterConfig, path, overrides)


def parse_seeds(text: str | None) -> list[int]:
    """Return the seeds of ``0,1,2``."""
    words = [word.strip() for word in (text or "").split(",") if word.strip()]
    if not all(word.isdigit() for word in words):
        raise InputError(f"--seeds {text}: expected whole numbers with commas, e.g. 0,1,2")
    return [int(word) for word in words]


def main(
    recipe: Annotated[Path, typer.Argument(help="recipe YAML, or the folder of a run to go on with")],
    cluster: Annotated[Path, typer.Option(help="cluster YAML")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.key=value")] = None,
    nodes: Annotated[int | None, typer.Option(help="instead of the cluster YAML's")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="instead of the YAML's; one rank a GPU")] = None,
    time_minutes: Annotated[int | None, typer.Option("--time", help="time limit in minutes")] = None,
    seeds: Annotated[str | None, typer.Option(help="array job, a run a seed, e.g. 0,1,2")] = None,
    after: Annotated[str | None, typer.Option(help="start when this job (or 12:13) is done")] = None,
    then_: Annotated[
        str | None, typer.Option("--then", help="jobs that follow the finished training, e.g. release,evaluate")
    ] = None,
) -> None:
    """Submit a training run through submitit; it goes on after preemption and time limits by itself."""
    try:
        config = load_cluster(cluster, nodes, gpus_per_node, time_minutes)
        steps = then.parse(then_)
        loaded = load_recipe(recipe, overrides or [])
        submitted = submit(loaded, config, parse_seeds(seeds), after, steps=steps)
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    for one in submitted:
        typer.echo(f"job {one.job.job_id}: {one.folder}, output in {one.folder / 'logs'}")
        for step, job_id in (records.read_json(one.folder / "job.json").get("then") or {}).items():
            typer.echo(f"  then job {job_id}: {step}")
    typer.echo(f"how it stands: mffm runs {Path(submitted[0].folder).parent}")


if __name__ == "__main__":
    typer.run(main)
