"""Active learning: active."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mffm.cli.cluster import find_cluster
from mffm.cli.label import TASKS, Stopped
from mffm.cli.output import EXIT_INTERRUPTED, say

if TYPE_CHECKING:
    from mffm.active.loop import Means

PLAIN_LINE_SECONDS = 30.0


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
        with handling_stops(stop), _Progress() as shown:
            work = Loop(settings, config, place, _means(place, settings.name, workers, cluster, shown))
            paths = report.write(settings, work.run(), place)
    except Stopped:
        how = "" if cluster is None else "; what was submitted goes on without it"
        print(f"interrupted{how}; the same command goes on where it stopped", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    say(f"report: {', '.join([str(paths[0]), *(p.name for p in paths[1:])])}")


def _means(place: Path, name: str, workers: int, cluster: str | None, shown: "_Progress") -> "Means":
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


class _Progress:
    """A bar for each stage on a terminal; elsewhere a line now and then, with the rate and the time that is left."""

    def __init__(self) -> None:
        from mffm.cli.deployed import bar

        self._bar = bar()
        self._task: Any = None
        self._what = ""
        self._first = 0
        self._started = self._last = time.monotonic()

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, what: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._first, self._started, self._last = what, done, now, now
            self._task = self._bar.add_task(what, total=total)
        self._bar.update(self._task, completed=done, total=total)
        if not self._bar.disable or now - self._last < PLAIN_LINE_SECONDS:
            return
        self._last = now
        rate = (done - self._first) / (now - self._started)
        left = f", {rate:.3g} a second, {(total - done) / rate / 60:.1f} min left" if rate and total else ""
        print(f"{what}: {done}{f' of {total}' if total else ''}{left}", file=sys.stderr, flush=True)
