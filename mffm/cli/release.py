"""Releases: release, inspect, diff."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from mffm.cli.output import console, say
from mffm.errors import InputError

if TYPE_CHECKING:
    from mffm.data.store import Store
    from mffm.release import Loaded
    from mffm.release.outputs import Difference

EXIT_DIFFERENT = 1
_DEFAULT_WEIGHTS = "best"


def release(
    source: Annotated[
        str, typer.Argument(help="a run, RUN/checkpoints/step-..., or a release; with --pull a hub's owner/name")
    ],
    target: Annotated[
        Path | None, typer.Argument(help="folder, or FILE.safetensors: all in one file (--pull: a folder)")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="of a run: best, best-<fidelity>, last (averaged), raw")
    ] = _DEFAULT_WEIGHTS,
    fidelity: Annotated[
        str | None, typer.Option(help="only this one: a plain potential that predicts the same, at no extra cost")
    ] = None,
    uncertainty: Annotated[
        bool, typer.Option("--uncertainty", help="fit a last-layer uncertainty of energies, on the training's store")
    ] = False,
    store: Annotated[
        Path | None, typer.Option(help="of --uncertainty; the one the run was trained on where not given")
    ] = None,
    push: Annotated[str | None, typer.Option(help="upload it to this owner/name of a model hub")] = None,
    pull: Annotated[bool, typer.Option("--pull", help="download SOURCE from a model hub into TARGET")] = False,
    revision: Annotated[str | None, typer.Option(help="of the hub's repository: branch, tag or commit")] = None,
    public: Annotated[bool, typer.Option("--public", help="a new repository of --push is public")] = False,
) -> None:
    """Write a release: safetensors, JSON and a card, and no pickle. Push it to a model hub, or pull one."""
    from mffm.release import hub, save

    changed = fidelity is not None or uncertainty or store is not None or weights != _DEFAULT_WEIGHTS
    if target is None and (pull or push is None):
        raise InputError(f"mffm release {source}: say where to write it: a folder, or FILE.safetensors")
    if pull:
        assert target is not None
        if push is not None or changed:
            raise InputError("--pull fetches a release as it is: give other options to a second command")
        path = hub.pull(source, target, revision)
    elif target is None:
        if changed:
            raise InputError(
                f"--push {push} of {source} as it is: with --fidelity, --uncertainty, --store or --weights name a "
                "TARGET to write first"
            )
        path = Path(source)
    else:
        path = save(source, target, weights, fidelity, _store_of(source, store, weights) if uncertainty else None)
    show_written(path)
    if push is not None:
        say(f"pushed: {hub.push(path, push, public, revision)}")


def _store_of(source: str, store: Path | None, weights: str) -> "Store":
    from mffm.data.store import Store
    from mffm.release import load

    data = load(source, weights).spec.provenance.get("recipe", {}).get("data", {})
    return Store(store or Path(data.get("store", "")), data.get("layers"))


def show_written(path: Path) -> None:
    """Say what a release consists of, after it was loaded once."""
    from mffm.release import NOT_CONSERVATIVE, load

    loaded = load(path)
    if not loaded.potential.is_conservative:
        console.print(NOT_CONSERVATIVE, highlight=False)
    files = [path] if path.is_file() else sorted(path.iterdir())
    size = sum(p.stat().st_size for p in files) / 1e6
    say(f"{path}: {size:.1f} MB, {', '.join(p.name for p in files)}")


def inspect(
    release: Annotated[Path, typer.Argument(help="a release, folder or file; a run")],
    weights: Annotated[str, typer.Option(help="of a run: best, best-<fidelity>, last, raw")] = "best",
    check: Annotated[
        bool, typer.Option("--check", help="compare predictions with all reference outputs, in float64 and float32")
    ] = False,
    device: Annotated[str, typer.Option(help="torch device of --check")] = "cpu",
) -> None:
    """Show what a release is: levels of theory, references, errors, data and licences, files."""
    from mffm.release import inspection, load

    loaded = load(release, weights)
    facts = Table("", "", title=str(release), show_header=False)
    for name, text in inspection.facts(loaded).items():
        _add(facts, name, text)
    console.print(facts, highlight=False)
    columns = ("fidelity", "level of theory", "code", "training labels", "references", "elements")
    fidelities = Table(*columns)
    for row in inspection.fidelity_rows(loaded):
        _add(fidelities, *row)
    console.print(fidelities, highlight=False)
    _show_errors(loaded)
    _show_files(loaded)
    if check:
        found = inspection.check(loaded, device)
        _show_check(found)
        inspection.require_within(found, loaded)


def _add(table: Table, *cells: str) -> None:
    table.add_row(*(Text(cell) for cell in cells))  # a list in brackets is no markup


def _show_errors(loaded: "Loaded") -> None:
    metrics = {} if loaded.contents is None else loaded.contents.documents.get("metrics.json", {})
    table = Table("split", "fidelity", "property", "MAE", "RMSE", "unit", "systems")
    for split, report in metrics.items():
        for row in report["rows"]:
            values = (f"{row['mae']:.1f}", f"{row['rmse']:.1f}", row["unit"], str(row["n_systems"]))
            _add(table, split, row["fidelity"], row["property"], *values)
    if table.row_count:
        console.print(table, highlight=False)


def _show_files(loaded: "Loaded") -> None:
    from mffm.release.container import extra_files

    contents = loaded.contents
    if contents is None:
        return
    if contents.manifest:
        table = Table("file", "bytes", "SHA-256", "")
        for name, entry in contents.manifest["files"].items():
            state = "changed since" if name in contents.changed else "whole"
            _add(table, name, f"{entry['size']:,}", entry["sha256"], state)
        console.print(table, highlight=False)
    extra = extra_files(contents)
    if extra and contents.manifest:
        say(f"not a part of it: {', '.join(extra)}")


def _show_check(found: "dict[str, list[Difference]]") -> None:
    table = Table("dtype", "fidelity", "quantity", "largest difference", "tolerance", "structure", "")
    for dtype, differences in found.items():
        for d in differences:
            values = (f"{d.value:.2e}", f"{d.tolerance:.2e}", str(d.structure), "ok" if d.is_within else "DIFFERS")
            _add(table, dtype, d.fidelity, d.quantity, *values)
    if table.row_count:
        console.print(table, highlight=False)


def diff(
    a: Annotated[Path, typer.Argument(help="a release or run")],
    b: Annotated[Path, typer.Argument(help="another")],
    weights: Annotated[str, typer.Option(help="of a run: best, best-<fidelity>, last, raw")] = "best",
) -> None:
    """Show all that two releases have differently: configuration, references, provenance, weights; exit code 1 then."""
    from mffm.release import inspection, load
    from mffm.release.container import is_release

    # Weights are chosen of a run; a release beside it has one set.
    only_one = is_release(a) != is_release(b)
    pair = [load(x, "best" if only_one and is_release(x) else weights) for x in (a, b)]
    found = inspection.changes(pair[0], pair[1])
    if not found:
        say(f"{a} and {b} hold the same")
        return
    table = Table("part", "where", str(a), str(b))
    for change in found:
        _add(table, change.part, change.where, change.a, change.b)
    console.print(table, highlight=False)
    raise typer.Exit(EXIT_DIFFERENT)
