"""Commands on data: ingest, doctor, edges, difference, verify, references."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from mffm.cli.output import EXIT_KEYBOARD, StoreArgument, console, say

if TYPE_CHECKING:
    from mffm.keys import Property

EXIT_FOUND = 1  # of doctor, where it found what misleads a training


def ingest(
    config: Annotated[Path, typer.Argument(help="data YAML")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.key=value")] = None,
    store: Annotated[Path | None, typer.Option(help="folder of the store, instead of the YAML's")] = None,
    add_labels: Annotated[
        str | None, typer.Option(help="add the YAML's labels as a layer of this name to a store that exists")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="processes, instead of the YAML's number")] = None,
) -> None:
    """Read labelled structures into a store of sharded LMDB."""
    from mffm.config.base import load
    from mffm.config.data import DataConfig
    from mffm.data import ingest as ingest_module
    from mffm.data import layers

    data = load(DataConfig, config, overrides or [])
    if workers is not None:
        data = data.model_copy(update={"workers": workers})
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


def doctor(
    paths: Annotated[list[Path], typer.Argument(help="stores, data YAMLs, files of structures; examined together")],
    against: Annotated[
        list[Path] | None,
        typer.Option(help="benchmark set (store, data YAML or file) to share nothing with; repeatable"),
    ] = None,
    out: Annotated[Path, typer.Option(help="folder of doctor.md, doctor.json and plots")] = Path("doctor"),
    strict: Annotated[bool, typer.Option("--strict", help="exit with 1 for warnings too")] = False,
    energy: Annotated[str | None, typer.Option(help="key of the energy in plain files")] = None,
    forces: Annotated[str | None, typer.Option(help="key of the forces in plain files")] = None,
    stress: Annotated[str | None, typer.Option(help="key of the stress in plain files")] = None,
    workers: Annotated[int, typer.Option(min=1, help="processes that read")] = 1,
    plots: Annotated[bool, typer.Option(help="draw histograms of energies, forces and structures")] = True,
) -> None:
    """Look for what misleads a training: duplicates, leaks, conflicts, outliers, wrong units and signs, mixed levels.

    Exit code 1 where a finding is an error (with --strict: or a warning), 2 for bad input, else 0.
    """
    from mffm.data.doctor import examine

    named: dict[Property, str | None] = {"energy": energy, "forces": forces, "stress": stress}
    keys = {prop: key for prop, key in named.items() if key is not None}
    try:
        diagnosis = examine(paths, against or (), keys, out, plots, workers, progress=True)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        raise typer.Exit(EXIT_KEYBOARD) from None
    for finding in diagnosis.findings:
        say(f"{finding.severity}: {finding.check}: {finding}")
        for place, what in finding.evidence[:2]:
            say(f"    {place}: {what}")
    errors, warnings = diagnosis.count("error"), diagnosis.count("warning")
    say(
        f"{diagnosis.n_frames:,} frames: {errors} errors, {warnings} warnings, {diagnosis.count('note')} notes; "
        f"report: {out / 'doctor.md'}"
    )
    if errors or (strict and warnings):
        raise typer.Exit(EXIT_FOUND)


def edges(
    store: StoreArgument,
    cutoff: Annotated[float, typer.Option(help="Å")],
    workers: Annotated[int, typer.Option(help="processes")] = 1,
) -> None:
    """Count the edges of every frame within a cutoff; a run needs the counts of its own."""
    from mffm.data.store import count_edges

    path = count_edges(store, cutoff, workers)
    console.print(f"edges within {cutoff:g} Å: {path}", highlight=False)


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


def verify(store: StoreArgument) -> None:
    """Check every file of a store against its SHA-256."""
    from mffm.data.store import Store

    opened = Store(store)
    opened.verify()
    console.print(
        f"{store}: {opened.n_frames:,} frames, all files whole, fingerprint {opened.fingerprint}", highlight=False
    )


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
