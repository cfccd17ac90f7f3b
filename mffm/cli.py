"""The command line. Heavy parts are imported by the command that needs them: ``mffm --help`` answers at once."""

import json
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from mffm import __version__
from mffm.errors import InputError, known, told

if TYPE_CHECKING:
    from mffm.config.base import Schema
    from mffm.config.cluster import ClusterConfig
    from mffm.config.recipe import Recipe
    from mffm.executor import Executor
    from mffm.training.loop import Outcome
    from mffm.training.preflight import Check

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train interatomic potentials on labels of several levels of theory.",
)
console = Console()

EXIT_INPUT = 2
EXIT_KEYBOARD = 130
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: saved, to be resumed

StoreArgument = Annotated[Path, typer.Argument(help="folder of a store")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="show the version")] = False) -> None:
    if version:
        typer.echo(f"mffm {__version__}")
        raise typer.Exit


@app.command()
def ingest(
    config: Annotated[Path, typer.Argument(help="data YAML")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.key=value")] = None,
    store: Annotated[Path | None, typer.Option(help="folder of the store, instead of the YAML's")] = None,
    add_labels: Annotated[
        str | None, typer.Option(help="add the YAML's labels as a layer of this name to a store that exists")
    ] = None,
) -> None:
    """Read labelled structures into a store of sharded LMDB."""
    from mffm.config.base import load
    from mffm.config.data import DataConfig
    from mffm.data import ingest as ingest_module
    from mffm.data import layers

    data = load(DataConfig, config, overrides or [])
    if add_labels is not None:
        numbers = layers.add_labels(store or Path(data.store), data, config.parent, add_labels, progress=True)
        shown = ", ".join(f"{n:,} {what}" for what, n in numbers.items())
        console.print(f"{store or data.store}: layer {add_labels}: {shown}", highlight=False)
        for warning in layers.warnings(store or Path(data.store), data):
            console.print(f"warning: {warning}", highlight=False, markup=False)
        return
    try:
        report = ingest_module.ingest(data, config.parent, store)
    except KeyboardInterrupt:
        print("interrupted; give the same command again to go on where it stopped", file=sys.stderr)
        raise typer.Exit(EXIT_KEYBOARD) from None
    if report.already_complete:
        console.print(f"{report.store}: complete already, with the same data and configuration", highlight=False)
    splits = [*report.split_frames, "all"]
    table = Table(
        "fidelity",
        "property",
        *splits,
        title=f"{report.store}: {report.n_frames:,} structures, {report.n_merged:,} frames merged into them, "
        f"{report.n_rejected:,} rejected",
    )
    for fidelity, properties in report.label_counts["all"].items():
        for prop in properties:
            counts = [report.label_counts.get(s, {}).get(fidelity, {}).get(prop, 0) for s in splits]
            table.add_row(fidelity, prop, *(f"{n:,}" for n in counts))
    console.print(table)
    for warning in report.warnings:
        console.print(f"warning: {warning}", highlight=False, markup=False)
    console.print(f"report: {report.path}", highlight=False)


@app.command()
def edges(
    store: StoreArgument,
    cutoff: Annotated[float, typer.Option(help="Å")],
    workers: Annotated[int, typer.Option(help="processes")] = 1,
) -> None:
    """Count the edges of every frame within a cutoff; a run needs the counts of its own."""
    from mffm.data.store import count_edges

    path = count_edges(store, cutoff, workers)
    console.print(f"edges within {cutoff:g} Å: {path}", highlight=False)


@app.command()
def difference(
    store: StoreArgument,
    high: Annotated[str, typer.Option(help="fidelity whose labels are subtracted from")],
    low: Annotated[str, typer.Option(help="fidelity whose labels are subtracted")],
    name: Annotated[str | None, typer.Option(help="of the new fidelity; <high>_minus_<low> where not given")] = None,
    layer: Annotated[str | None, typer.Option(help="of the label layer; the fidelity's name where not given")] = None,
) -> None:
    """Add the differences of two fidelities' labels as a third fidelity: what an explicit delta is trained on."""
    from mffm.data.differences import add_difference

    name = name or f"{high}_minus_{low}"
    counts = add_difference(store, high, low, name, layer or name)
    shown = ", ".join(f"{n:,} {p}" for p, n in counts.items()) or "complete already, nothing new"
    console.print(f"{store}: {name} = {high} − {low}: {shown}", highlight=False, markup=False)


@app.command()
def verify(store: StoreArgument) -> None:
    """Check every file of a store against its SHA-256."""
    from mffm.data.store import Store

    opened = Store(store)
    opened.verify()
    console.print(
        f"{store}: {opened.n_frames:,} frames, all files whole, fingerprint {opened.fingerprint}", highlight=False
    )


@app.command()
def references(
    store: StoreArgument,
    split: Annotated[str, typer.Option(help="split to fit on")] = "train",
    report: Annotated[bool, typer.Option("--report", help="with rank, condition and coverage")] = False,
    anchor: Annotated[str | None, typer.Option(help="fidelity that the paired fits build on")] = None,
) -> None:
    """Fit the element references of every fidelity and show how well they are determined."""
    import numpy as np
    from ase.data import chemical_symbols

    from mffm.config.recipe import ReferencesConfig
    from mffm.data import references as module
    from mffm.data.store import Store

    opened = Store(store)
    names = opened.fidelities.names
    rows = {name: opened.rows(split=split, fidelity=name) for name in names}
    fitted = module.fit(opened, names, rows, ReferencesConfig(anchor=anchor))
    if report:
        console.print(fitted.report_markdown(), highlight=False, markup=False)
        return
    table = Table("element", *names, title="element references, eV")
    values = fitted.array(names)
    for z in np.flatnonzero(~np.isnan(values).all(axis=0)):
        table.add_row(chemical_symbols[z], *("none" if np.isnan(v) else f"{v:.4f}" for v in values[:, z]))
    console.print(table)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="recipe YAML")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.key=value, e.g. train.steps=2000")] = None,
    preflight: Annotated[
        bool, typer.Option("--preflight", help="only check: ranks, network, disk, memory of the largest batch")
    ] = False,
) -> None:
    """Train a potential. On several ranks: torchrun --nproc-per-node N -m mffm train recipe.yaml"""
    from mffm.training import faults

    def loaded() -> "Recipe":
        from mffm.config.base import load
        from mffm.config.recipe import Recipe

        return load(Recipe, recipe, overrides or [])

    def check() -> "list[Check]":
        from mffm.training import preflight as module

        return module.only(loaded())

    def run() -> "Outcome":
        from mffm.training import loop

        return loop.train(loaded())

    if preflight:
        _show_checks(faults.process(check))
    else:
        _finish(faults.process(run))


@app.command()
def resume(run: Annotated[Path, typer.Argument(help="folder of the run")]) -> None:
    """Go on with a run from its newest checkpoint."""
    from mffm.training import faults

    def go_on() -> "Outcome":
        from mffm.training import loop

        return loop.resume(run)

    _finish(faults.process(go_on))


@app.command()
def replay(
    bundle: Annotated[Path, typer.Argument(help="RUN/quarantine/step-...")],
    worst: Annotated[int, typer.Option(help="how many systems to show")] = 10,
) -> None:
    """Run the systems of a quarantined step one by one, on one process, and name the worst."""
    from mffm.training.quarantine import replay as run_bundle

    reason, systems = run_bundle(bundle)
    console.print(f"{bundle}: {reason}; {len(systems)} systems, {sum(not s.is_finite for s in systems)} not finite")
    table = Table(
        "row",
        "frame",
        "fidelity",
        "atoms",
        "loss",
        "energy error, meV/atom",
        "force error, meV/Å",
        "force label, meV/Å",
    )
    for s in systems[:worst]:
        values = (s.loss, s.energy_error, s.force_error, s.force_label)
        table.add_row(str(s.row), s.frame_id, s.fidelity, str(s.n_atoms), *(f"{v:.4g}" for v in values))
    console.print(table)


def _show_checks(checks: "list[Check]") -> None:
    from mffm.distributed import ranks_from_environment, stop

    stop()
    problems = [check for check in checks if check.problem]
    if ranks_from_environment().is_main:
        table = Table("check", "", "seconds", "found", title="preflight")
        for check in checks:
            table.add_row(check.name, "problem" if check.problem else "ok", f"{check.seconds:.2f}", check.value)
        console.print(table)
        for check in problems:
            print(f"problem: {check.name}: {check.problem}", file=sys.stderr, flush=True)
    if problems:
        raise typer.Exit(EXIT_INPUT)


def _finish(outcome: "Outcome") -> NoReturn:
    from mffm.distributed import ranks_from_environment, stop
    from mffm.training.faults import leave

    stop()
    if ranks_from_environment().is_main:
        for metric, best in outcome.best.items():
            console.print(f"best {metric}: {best['value']:.4f} at step {int(best['step'])}", highlight=False)
        if outcome.ended == "interrupted":
            console.print(f"interrupted and saved; go on with: mffm resume {outcome.run}", highlight=False)
        else:
            console.print(f"run: {outcome.run}", highlight=False)
    # DeepSpeed's threads now and then abort the interpreter's own way out, after all work is done.
    leave(EXIT_INTERRUPTED if outcome.ended == "interrupted" else 0)


@app.command()
def evaluate(
    potential: Annotated[Path, typer.Argument(help="folder of a run or a release")],
    split: Annotated[str, typer.Option(help="split of the store")] = "test",
    store: Annotated[Path | None, typer.Option(help="store; the one the run was trained on where not given")] = None,
    fidelity: Annotated[
        list[str] | None, typer.Option(help="fidelity to compare with; may be given several times")
    ] = None,
    weights: Annotated[str, typer.Option(help="of a run: best, best-<fidelity>, last, raw")] = "best",
    output: Annotated[
        Path | None, typer.Option(help="folder for the JSON and the plot; the run's or release's own where not given")
    ] = None,
) -> None:
    """Measure errors per fidelity and property on a split; write JSON and a parity plot."""
    from mffm.data.store import Store
    from mffm.distributed import tune_allocator
    from mffm.evaluate import parity
    from mffm.release import NOT_CONSERVATIVE, load

    tune_allocator()
    loaded = load(potential, weights)
    path = store or Path(loaded.spec.provenance.get("recipe", {}).get("data", {}).get("store", ""))
    opened = Store(path)
    result = parity.evaluate(loaded, opened, split, fidelity)
    report, figure = parity.write(result, loaded, opened, output or potential)
    console.print(_errors_table(f"{potential} on {split}", result.rows()))
    for name, count in result.unreferenced.items():
        console.print(
            f"{name}: {count} energies left out, their elements have no references at this fidelity", highlight=False
        )
    if result.without_stress:
        console.print(
            f"{result.without_stress} stresses left out: direct forces without a stress head", highlight=False
        )
    if not loaded.potential.is_conservative:
        console.print(NOT_CONSERVATIVE, highlight=False)
    console.print(f"{report}\n{figure}", highlight=False)


def _errors_table(title: str, rows: "list[dict]") -> Table:
    table = Table("fidelity", "property", "MAE", "RMSE", "R²", "unit", "systems", title=title)
    for row in rows:
        r2 = "" if row["r2"] is None else f"{row['r2']:.4f}"
        table.add_row(
            row["fidelity"],
            row["property"],
            f"{row['mae']:.1f}",
            f"{row['rmse']:.1f}",
            r2,
            row["unit"],
            str(row["n_systems"]),
        )
    return table


@app.command()
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
    """Compare methods over numbers of high-fidelity labels and seeds; the same command goes on after a kill."""
    from mffm.config.study import load_study

    settings = load_study(config, overrides or [])  # before the imports of seconds: a mistake is told at once

    place = folder or Path("runs/studies") / settings.name
    executor = _executor(place, settings.name, cluster, workers, report_only)

    from mffm.distributed import tune_allocator
    from mffm.study import grid, report
    from mffm.study.gate import gates
    from mffm.study.run import Stopped, StudyRun

    tune_allocator()
    expanded = grid.expand(settings, config, place)
    compared = gates(expanded)
    work = StudyRun(expanded, place, executor, _say)
    try:
        failed = {} if report_only else work.train()
    except Stopped:
        how = " and saved" if cluster is None else "; jobs that were submitted go on without it"
        print(f"interrupted{how}; the same command goes on", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    summary = report.summarise(expanded, work.judge(), compared, failed)
    paths = report.write(expanded, summary, place)
    for line in summary["advice"]:
        _say(line)
    _say(f"report: {', '.join([str(paths[0]), *(p.name for p in paths[1:])])}")
    if failed:
        _complain(f"{len(failed)} of the trainings failed; the same command tries them again", code=1)


def _executor(folder: Path, name: str, cluster: str | None, workers: int | None, report_only: bool) -> "Executor":
    """Return what runs the trainings of a study in a folder."""
    from launch.arrays import ArrayExecutor, refuse_under_way
    from mffm.executor import LocalExecutor

    if cluster is not None:
        return ArrayExecutor(folder, name, _cluster(cluster), workers, _say)
    if not report_only:
        refuse_under_way(folder)
    return LocalExecutor(workers or 1)


@app.command()
def release(
    run: Annotated[Path, typer.Argument(help="folder of the run")],
    folder: Annotated[Path, typer.Argument(help="folder of the release")],
    weights: Annotated[str, typer.Option(help="best, best-<fidelity>, last, raw")] = "best",
) -> None:
    """Write a release: safetensors, JSON and a card."""
    from mffm.release import NOT_CONSERVATIVE, PotentialSpec, save

    path = save(run, folder, weights)
    if PotentialSpec.read(path)[0].model.forces == "direct":
        console.print(NOT_CONSERVATIVE, highlight=False)
    size = sum(p.stat().st_size for p in path.iterdir()) / 1e6
    console.print(f"{path}: {size:.1f} MB, {', '.join(sorted(p.name for p in path.iterdir()))}", highlight=False)


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="a folder with runs, or a run")] = Path("runs"),
) -> None:
    """Show how the runs in a folder stand: state, step, time left, best metric, job id."""
    from launch.runs import show

    show(folder, console)


@app.command()
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
    machine = Machine(_cluster(cluster), ranks)
    test = Selftest(machine, folder, quick, lambda line: typer.echo(line, err=True))
    report = test.run()
    paths = report.write(test.folder)
    console.print(report.table())
    for line in report.expect:
        console.print(f"expect: {line}", highlight=False, markup=False)
    console.print(f"report: {paths[1]}, {paths[0].name}", highlight=False)
    if report.failed:
        raise typer.Exit(1)


def _cluster(name: str | None) -> "ClusterConfig":
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


config_app = typer.Typer(
    no_args_is_help=True, help="Look at the configuration: every key, and every value of a recipe."
)
app.add_typer(config_app, name="config")


class Kind(StrEnum):
    """Kinds of YAML."""

    recipe = "recipe"
    data = "data"
    cluster = "cluster"
    study = "study"


def _schema(kind: Kind) -> "type[Schema]":
    from mffm.config.cluster import ClusterConfig
    from mffm.config.data import DataConfig
    from mffm.config.recipe import Recipe
    from mffm.config.study import StudyConfig

    schemas: dict[Kind, type[Schema]] = {
        Kind.recipe: Recipe, Kind.data: DataConfig, Kind.cluster: ClusterConfig, Kind.study: StudyConfig
    }  # fmt: skip
    return schemas[kind]


@config_app.command("schema")
def config_schema(kind: Annotated[Kind, typer.Argument(help="which YAML")] = Kind.recipe) -> None:
    """Print the JSON schema of a YAML, for editors."""
    typer.echo(json.dumps(_schema(kind).model_json_schema(), indent=2, ensure_ascii=False))


@config_app.command("show")
def config_show(
    recipe: Annotated[Path, typer.Argument(help="YAML")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.key=value")] = None,
    kind: Annotated[Kind, typer.Option(help="which YAML")] = Kind.recipe,
) -> None:
    """Print every value of a YAML and where it came from: the file, the command line or the default."""
    from mffm.config.base import load, origins, read_yaml

    loaded = load(_schema(kind), recipe, overrides or [])
    for name, value, origin in origins(loaded, read_yaml(recipe), overrides or []):
        typer.echo(f"{name} = {json.dumps(value, ensure_ascii=False)}  # {origin}")


def main() -> None:
    """Run the command line; bad input is one message and exit code 2."""
    try:
        app()
    except (InputError, UnicodeDecodeError, OSError) as error:
        message = told(error)
        if message is None:
            raise
        _complain(message)


def _say(line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _complain(message: str, code: int = EXIT_INPUT) -> None:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
