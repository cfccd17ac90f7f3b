"""Submit a recipe: ``python -m launch.submit RECIPE --cluster configs/clusters/local.yaml [key.key=value ...]``."""

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mffm.config.base import dump, load
from mffm.config.cluster import ClusterConfig
from mffm.config.recipe import Recipe
from mffm.errors import InputError

if TYPE_CHECKING:
    import submitit


def train(recipe: str, threads: int) -> str:
    """Run one rank of a training job inside a submitit task and return the run's folder.

    Raises:
        RuntimeError: the rank failed; its messages are in the task's log.
    """
    import submitit

    task = submitit.JobEnvironment()
    environment = {
        **os.environ,
        "RANK": str(task.global_rank),
        "WORLD_SIZE": str(task.num_tasks),
        "LOCAL_RANK": str(task.local_rank),
        "MASTER_ADDR": task.hostnames[0],
        "MASTER_PORT": str(20000 + int("".join(filter(str.isdigit, task.job_id)) or 0) % 40000),
        "OMP_NUM_THREADS": str(threads),
    }
    folder = Path(recipe).parent
    resumed = (folder / "checkpoints" / "latest").exists()
    arguments = ["resume", str(folder)] if resumed else ["train", recipe]
    code = subprocess.run([sys.executable, "-m", "mffm", *arguments], env=environment).returncode
    if code != 0:
        raise RuntimeError(f"rank {task.global_rank} of {folder} ended with exit code {code}")
    return str(folder)


def submit(recipe: Recipe, cluster: ClusterConfig) -> "tuple[submitit.Job[str], Path]":
    """Write the resolved recipe into the run's folder and submit it; return the job and the folder."""
    import submitit

    folder = Path(recipe.run_folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    resolved = folder / "submitted.yaml"
    store = str(Path(recipe.data.store).resolve())
    content = recipe.model_copy(update={"run": str(folder), "data": recipe.data.model_copy(update={"store": store})})
    resolved.write_text(dump(content))
    executor = submitit.AutoExecutor(folder=folder / "submitit", cluster=cluster.executor)
    parameters: dict[str, object] = {
        "name": recipe.name,
        "nodes": cluster.nodes,
        "tasks_per_node": cluster.tasks_per_node,
        "timeout_min": cluster.time_minutes,
    }
    if cluster.executor == "slurm":
        parameters |= {
            "gpus_per_node": cluster.gpus_per_node,
            "cpus_per_task": cluster.cpus_per_task,
            "slurm_setup": cluster.setup,
        }
        parameters |= {"slurm_srun_args": ["--kill-on-bad-exit=1"], **cluster.slurm}
    executor.update_parameters(**parameters)
    job = executor.submit(train, str(resolved), cluster.cpus_per_task)
    return job, folder


def main(
    recipe: Annotated[Path, typer.Argument(help="recipe YAML")],
    cluster: Annotated[Path, typer.Option(help="cluster YAML")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.key=value")] = None,
) -> None:
    """Submit a training run through submitit."""
    try:
        job, folder = submit(load(Recipe, recipe, overrides or []), load(ClusterConfig, cluster))
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(f"job {job.job_id}: {folder}, logs in {folder / 'submitit'}")


if __name__ == "__main__":
    typer.run(main)
