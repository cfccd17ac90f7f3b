"""Runs in folders and on clusters: runs, selftest."""

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mffm.cli.output import console
from mffm.errors import InputError, known

if TYPE_CHECKING:
    from mffm.config.cluster import ClusterConfig


def runs(
    folder: Annotated[Path, typer.Argument(help="a folder with runs, or a run")] = Path("runs"),
) -> None:
    """Show how the runs in a folder stand: state, step, time left, best metric, job id."""
    from launch.runs import show

    show(folder, console)


def selftest(
    cluster: Annotated[
        str | None,
        typer.Option(help="cluster YAML, or the name of one in configs/clusters; this machine where not given"),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="instead of the cluster YAML's; without a YAML one a GPU, or 2 on CPUs")
    ] = None,
    folder: Annotated[Path, typer.Option(help="for the runs and the report; emptied first")] = Path("runs/selftest"),
    quick: Annotated[bool, typer.Option("--quick", help="fewer cases and shorter runs")] = False,
) -> None:
    """Verify training, kill and resume, preemption and network on a cluster, and say what throughput to expect."""
    from launch.machine import Machine
    from mffm.selftest.checks import Selftest

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that its jobs are ended too
    machine = Machine(find_cluster(cluster), ranks)
    test = Selftest(machine, folder, quick, lambda line: typer.echo(line, err=True))
    report = test.run()
    paths = report.write(test.folder)
    console.print(report.table())
    for line in report.expect:
        console.print(f"expect: {line}", highlight=False, markup=False)
    console.print(f"report: {paths[1]}, {paths[0].name}", highlight=False)
    if report.failed:
        raise typer.Exit(1)


def find_cluster(name: str | None) -> "ClusterConfig":
    """Return the cluster of a path, of a name in configs/clusters, or this machine."""
    from mffm.config.base import load, validate
    from mffm.config.cluster import ClusterConfig

    if name is None:
        import torch

        gpus = torch.cuda.device_count()
        content = {"executor": "local", "gpus_per_node": gpus, "tasks_per_node": gpus or 2}
        return validate(ClusterConfig, content, "this machine")
    clusters = Path("configs/clusters")
    path = Path(name)
    if not path.is_file() and (clusters / f"{name}.yaml").is_file():
        path = clusters / f"{name}.yaml"
    if not path.is_file():
        there = known(p.stem for p in clusters.glob("*.yaml"))
        raise InputError(f"--cluster {name}: no such file, and not one of {clusters} in this folder: {there}")
    return load(ClusterConfig, path)
