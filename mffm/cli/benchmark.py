"""Benchmark suites: benchmark."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mffm.cli.output import console
from mffm.errors import InputError

if TYPE_CHECKING:
    from mffm.evaluate.benchmark.run import Outcome, Settings


def benchmark(
    potential: Annotated[
        str | None, typer.Argument(help="folder of a release or run, or ase:package.module:factory")
    ] = None,
    suite: Annotated[str, typer.Option(help="matbench-discovery, lambench or all")] = "all",
    task: Annotated[list[str] | None, typer.Option(help="only this task, e.g. lambench/elastic; several times")] = None,
    data: Annotated[Path | None, typer.Option(envvar="MFFM_DATA", help="folder of the suites' data")] = None,
    output: Annotated[Path | None, typer.Option(help="runs/benchmarks/<name of the potential> where not given")] = None,
    fidelity: Annotated[
        list[str] | None, typer.Option(help="of a release; several times: the suite at each, side by side")
    ] = None,
    fidelity_map: Annotated[
        list[str] | None, typer.Option(help="task=fidelity for one task or suite; several times")
    ] = None,
    arguments: Annotated[
        list[str] | None, typer.Option("--with", help="name=value for the factory or calculator; several times")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="processes of one thread; all CPUs where not given")
    ] = None,
    time_limit: Annotated[float, typer.Option(help="seconds a structure")] = 3600.0,
    limit: Annotated[
        int | None, typer.Option(min=1, help="structures of each task; a larger number contains a smaller")
    ] = None,
    structure: Annotated[list[str] | None, typer.Option(help="only this one, by its id; several times")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="compute again what failed")] = False,
    corrected_energies: Annotated[
        bool, typer.Option("--corrected-energies", help="trained on MP2020-corrected energies, as CHGNet")
    ] = False,
    kappa_displacement: Annotated[float, typer.Option(help="Å, of the force constants for κ")] = 0.03,
    submission: Annotated[
        Path | None, typer.Option(help="YAML with what only the authors know, for Matbench Discovery's model YAML")
    ] = None,
    check_data: Annotated[
        Path | None, typer.Option(help="only say which data of this folder are present, absent or damaged")
    ] = None,
) -> None:
    """Judge a potential by Matbench Discovery and LAMBench; the same command goes on after a kill."""
    from mffm.evaluate.benchmark import suites

    names = task or suites.of_suite(suite)
    for name in names:
        suites.task(name)
    if check_data is not None:
        _show_data(check_data, names)
        return
    if potential is None or data is None:
        missing = "the potential" if potential is None else "--data (or MFFM_DATA), the folder of the suites' data"
        raise InputError(f"benchmark: give {missing}; --check-data DIR says what a folder lacks")

    from mffm.evaluate.benchmark import report, run, source, submit
    from mffm.evaluate.benchmark.task import Options

    settings = run.Settings(
        data,
        workers or len(os.sched_getaffinity(0)),
        time_limit,
        limit,
        structure or (),
        retry_failed,
        Options(corrected_energies, kappa_displacement),
    )
    mapped = source.parse_map(fidelity_map or [], list(suites.TASKS))
    _refuse_fidelity_of_factory(potential, fidelity or [], fidelity_map or [])
    keywords = source.parse_arguments(arguments or [])
    _require_folder(data)
    folder = output or Path("runs/benchmarks") / Path(potential.replace(":", "-")).name
    labels: list[str | None] = [*fidelity] if fidelity else [None]
    runs: dict[str, list[Outcome]] = {}
    for label in labels:
        place = folder / label if label and len(labels) > 1 else folder
        sources = {n: source.Source(potential, source.fidelity_of(n, label, mapped), keywords) for n in names}
        runs[label or "potential"] = _run(sources, settings, place)
    path = report.write(folder, potential, runs)
    for label, outcomes in runs.items():
        submit.write(folder / label if len(runs) > 1 else folder, outcomes, settings.options, submission)
        _show(label, outcomes)
    console.print(f"report: {path}", highlight=False)


def _refuse_fidelity_of_factory(potential: str, fidelity: "list[str]", fidelity_map: "list[str]") -> None:
    from mffm.evaluate.benchmark.source import FOREIGN

    if potential.startswith(FOREIGN) and (fidelity or fidelity_map):
        option = "--fidelity" if fidelity else "--fidelity-map"
        raise InputError(
            f"{option} {[*fidelity, *fidelity_map][0]!r} with {potential}: a factory has none; give its own argument "
            "by --with, e.g. --with modal=r2scan"
        )


def _run(sources: "dict", settings: "Settings", folder: Path) -> "list[Outcome]":
    from mffm.evaluate.benchmark import run

    outcomes = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        for name, source in sources.items():
            bar = bars.add_task(name, total=None)

            def progress(_: str, done: int, total: int, bar: int = bar) -> None:
                bars.update(bar, completed=done, total=total)  # type: ignore[arg-type]

            outcomes.append(run.run_task(source, name, settings, folder, progress))
            bars.remove_task(bar)
    return outcomes


def _show(label: str, outcomes: "list[Outcome]") -> None:
    from mffm.evaluate.benchmark.report import number
    from mffm.evaluate.benchmark.run import NotRun
    from mffm.evaluate.benchmark.task import name_of

    table = Table("task", "metrics", "unit", "structures", "failed", title=label)
    for outcome in outcomes:
        if isinstance(outcome, NotRun):
            table.add_row(name_of(outcome.task), "not run: data are missing", "", "", "")
            continue
        score = outcome.score
        metrics = ", ".join(f"{k} {number(v)}" for k, v in list(score.metrics.items())[:4])
        asked = f"{score.n}" if outcome.is_whole else f"{score.n} of {outcome.n_of_set}"
        table.add_row(name_of(outcome.task), metrics, score.unit, asked, str(score.n_failed))
    console.print(table)


def _require_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")


def _show_data(folder: Path, names: list[str]) -> None:
    from mffm.evaluate.benchmark import suites

    _require_folder(folder)
    table = Table("task", "file", "state", "published", "layout", title=str(folder))
    for name, file, state in suites.check_data(folder, names):
        table.add_row(name, file.path, state, *(("", "") if state == "present" else (file.published, file.layout)))
    console.print(table)
