"""Labels from calculators: label."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mffm.cli.cluster import find_cluster
from mffm.cli.output import say
from mffm.cli.progress import Stages
from mffm.errors import EXIT_INTERRUPTED, InputError

if TYPE_CHECKING:
    from mffm.executor import Executor
    from mffm.label.publish import Summary

TASKS = 16  # parts of an array where --tasks does not say


class Stopped(BaseException):
    """SIGINT or SIGTERM."""


def label(
    sources: Annotated[list[Path], typer.Argument(help="a store, or files with structures; any that ASE reads")],
    level: Annotated[
        str,
        typer.Option(
            help="gfn1, gfn2, spgfn1, spgfn2, pbe, r2scan, wb97x, ccsdt, ccsdt_ae, gpaw_pbe, gpaw_r2scan, "
            "ase:package.module:factory, release:FOLDER@fidelity, or store:FOLDER@fidelity"
        ),
    ],
    fidelity: Annotated[
        str | None, typer.Option(help="name of the labels' fidelity; the level's where not given")
    ] = None,
    layer: Annotated[str | None, typer.Option(help="of a store: name of the label layer; the fidelity's")] = None,
    out: Annotated[Path | None, typer.Option(help="of files: extxyz to write; <first file>_<fidelity>.extxyz")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="processes: 1; with --cluster of a task, its cpus_per_task")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="cluster YAML, or the name of one in configs/clusters: an array of SLURM")
    ] = None,
    tasks: Annotated[int, typer.Option(min=1, help="with --cluster: tasks of the array")] = TASKS,
    time_limit: Annotated[float | None, typer.Option(min=0.1, help="seconds that a structure may take")] = None,
    memory_limit: Annotated[float | None, typer.Option(min=0.1, help="GB that its process may use")] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="label a random subset of this size")] = None,
    seed: Annotated[int, typer.Option(help="of the subset; a larger one of the same seed contains it")] = 0,
    only: Annotated[
        Path | None, typer.Option(help="of a store: label the structures of this file alone, as mffm select writes it")
    ] = None,
) -> None:
    """Compute the labels of another level of theory for structures; the same command goes on after a kill."""
    from mffm.data.named import rows_in
    from mffm.data.store import Store
    from mffm.executor import handling_stops
    from mffm.label import levels, run
    from mffm.label.journal import Limits
    from mffm.label.structures import Source
    from mffm.label.work import Request

    source = Source.of(sources)
    name = levels.find(level, fidelity).fidelity.name
    if source.store is None:
        _refuse_option("--layer", layer, "a store")
        _refuse_option("--only", only, "a store")
        out = out or Path(f"{sources[0].stem}_{name}.extxyz")
    else:
        _refuse_option("--out", out, "files")
    rows = None if only is None or source.store is None else tuple(rows_in(Store(source.store), only).tolist())
    request = Request(source, level, fidelity, n, seed, rows)
    where = layer or name
    place = run.place_of(request, where, out).resolve()
    executor, workers = _executor(place, name, cluster, workers)
    shown = Stages()

    def stop(*_: object) -> None:
        raise Stopped

    def progress(labels: int, failures: int, total: int) -> None:
        shown(f"{name} labels", labels + failures, total, f"{failures} failed")

    try:
        with handling_stops(stop), shown:
            limits = Limits(time_limit, memory_limit)
            on = None if executor is None else (executor, tasks)
            done = run.label(request, where, out, workers, limits, progress, on)
    except Stopped:
        how = "" if executor is None else "; tasks that were submitted go on without it"
        print(f"interrupted; the same command goes on where it stopped{how}", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if isinstance(done, str):
        say(done)
    else:
        _tell(done, name, shown)


def _refuse_option(option: str, value: object, of: str) -> None:
    if value is not None:
        raise InputError(f"{option} {value}: is for {of}; leave it out")


def _executor(place: Path, name: str, cluster: str | None, workers: int | None) -> "tuple[Executor | None, int]":
    """Return what runs the tasks on a cluster, None for this machine, and the workers of a task or here."""
    from launch.commands import CommandArray, refuse_under_way

    if cluster is None:
        refuse_under_way(place)
        return None, workers or 1
    found = find_cluster(cluster)
    return CommandArray(place, f"label-{name}", found, say=say), workers or found.cpus_per_task


def _tell(done: "Summary", name: str, shown: Stages) -> None:
    properties = ", ".join(f"{count:,} {prop}" for prop, count in done.properties.items())
    say(f"{done.written}: {done.n_labels:,} structures labelled at {name} ({properties}), {done.n_failed:,} failed")
    if shown.done_now:
        say(f"{shown.rate:.3g} structures a second; all labels took {done.cpu_seconds:.3g} CPU seconds")
    for kind, count in sorted(done.failures.items()):
        say(f"  {count:,} {kind}")
    for frame_id, reason in done.examples:
        say(f"  e.g. {frame_id}: {reason}")
    if done.n_doubtful:
        say(f"  {done.n_doubtful:,} labels have a T1 diagnostic above 0.02: one reference is doubtful there")
    if done.data_yaml is not None:
        say(f"data YAML: {done.data_yaml}; correct its licence, then: mffm ingest {done.data_yaml}")
