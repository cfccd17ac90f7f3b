"""Comparisons of methods: study, study new."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from mffm.cli.cluster import find_cluster
from mffm.cli.new_study import new
from mffm.cli.output import complain, say
from mffm.errors import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from mffm.executor import Executor


class _RunUnlessNamed(TyperGroup):
    """`mffm study x.yaml` is `mffm study run x.yaml`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = not args or args[0] in self.commands or args[0] == "--help"
        return super().parse_args(ctx, args if named else ["run", *args])


app = typer.Typer(
    cls=_RunUnlessNamed,
    no_args_is_help=True,
    help="Compare methods over numbers of high-fidelity labels and seeds: mffm study STUDY.yaml.",
)
app.command("new")(new)


@app.command("run")
def study(
    config: Annotated[Path, typer.Argument(help="study YAML, e.g. one of configs/studies")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.key=value of the study YAML")] = None,
    folder: Annotated[Path | None, typer.Option(help="runs/studies/<name> where not given")] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="trainings at a time: 1, on a cluster as many as it starts, where not given"),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="cluster YAML, or the name of one in configs/clusters: trainings are tasks of SLURM arrays"),
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="train nothing; report the cells that are finished")
    ] = False,
) -> None:
    """Compare methods by a study YAML; the same command goes on after a kill. "run" may be left out."""
    from mffm.config.study import load_study

    settings = load_study(config, overrides or [])  # before the imports of seconds: a mistake is told at once

    place = folder or Path("runs/studies") / settings.name
    executor = _executor(place, settings.name, cluster, workers, report_only)

    from mffm.distributed import tune_allocator
    from mffm.study import external, grid, report
    from mffm.study.gate import gates
    from mffm.study.run import Stopped, StudyRun

    tune_allocator()
    expanded = grid.expand(settings, config, place)
    compared = gates(expanded)
    others = external.read(expanded, place)
    work = StudyRun(expanded, place, executor, say)
    try:
        failed = {} if report_only else work.train()
    except Stopped:
        how = " and saved" if cluster is None else "; jobs that were submitted go on without it"
        print(f"interrupted{how}; the same command goes on", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    summary = report.summarise(expanded, work.judge(), compared, failed, others)
    paths = report.write(expanded, summary, place)
    for line in summary["advice"]:
        say(line)
    say(f"report: {', '.join([str(paths[0]), *(p.name for p in paths[1:])])}")
    if failed:
        complain(f"{len(failed)} of the trainings failed; the same command tries them again", code=1)


def _executor(folder: Path, name: str, cluster: str | None, workers: int | None, report_only: bool) -> "Executor":
    """Return what runs the trainings of a study in a folder."""
    from launch.arrays import ArrayExecutor, refuse_under_way
    from mffm.executor import LocalExecutor

    if cluster is not None:
        return ArrayExecutor(folder, name, find_cluster(cluster), workers, say)
    if not report_only:
        refuse_under_way(folder)
    return LocalExecutor(workers or 1)
