"""Active learning: active."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mffm.cli.cluster import find_cluster
from mffm.cli.label import TASKS, Stopped
from mffm.cli.output import say
from mffm.cli.progress import Stages
from mffm.errors import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from mffm.active.loop import Means


def active(
    config: Annotated[Path, typer.Argument(help="active-learning YAML, e.g. configs/active.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.key=value of the YAML")] = None,
    folder: Annotated[Path | None, typer.Option(help="runs/active/<name> where not given")] = None,
    workers: Annotated[int, typer.Option(min=1, help="processes that compute labels")] = 1,
    cluster: Annotated[
        str | None,
        typer.Option(help="cluster YAML, or the name of one in configs/clusters: labels and trainings there"),
    ] = None,
) -> None:
    """Choose structures, label them, fine-tune, judge; again and again. The same command goes on after a kill."""
    from mffm.config.active import ActiveConfig
    from mffm.config.base import load

    settings = load(ActiveConfig, config, overrides or [])  # before the imports of seconds: a mistake is told at once
    place = folder or Path("runs/active") / settings.name

    from mffm.active import report
    from mffm.active.loop import Loop
    from mffm.distributed import tune_allocator
    from mffm.executor import handling_stops

    tune_allocator()

    def stop(*_: object) -> None:
        raise Stopped

    try:
        with handling_stops(stop), Stages() as shown:
            work = Loop(settings, config, place, _means(place, settings.name, workers, cluster, shown))
            paths = report.write(settings, work.run(), place)
    except Stopped:
        how = "" if cluster is None else "; what was submitted goes on without it"
        print(f"interrupted{how}; the same command goes on where it stopped", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    say(f"report: {', '.join([str(paths[0]), *(p.name for p in paths[1:])])}")


def _means(place: Path, name: str, workers: int, cluster: str | None, shown: Stages) -> "Means":
    """Return how the loop's work is done."""
    from launch.commands import CommandArray, refuse_under_way
    from mffm.active.loop import Means
    from mffm.executor import Executor, LocalExecutor

    if cluster is None:
        refuse_under_way(place)
        return Means(LocalExecutor(1), workers, None, say, shown)
    found = find_cluster(cluster)

    def labels(where: Path) -> tuple[Executor, int]:
        return CommandArray(where, f"label-{name}", found, say=say), TASKS

    return Means(CommandArray(place, name, found, say=say), found.cpus_per_task, labels, say, shown)
