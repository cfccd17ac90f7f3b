"""Errors of a potential: evaluate."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from mffm.cli.output import console, say
from mffm.errors import InputError, known

if TYPE_CHECKING:
    from mffm.evaluate.calibration import Calibration


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
    ensemble: Annotated[
        list[Path] | None,
        typer.Option(
            help="another member: errors of the mean, and the spread as uncertainty; may be given several times"
        ),
    ] = None,
) -> None:
    """Measure errors per fidelity and property on a split; write JSON and a parity plot."""
    if ensemble and output is None:
        raise InputError("--ensemble: give --output too, a folder for what is the ensemble's")
    from mffm.data.store import Store
    from mffm.distributed import tune_allocator
    from mffm.evaluate import parity
    from mffm.keys import ENERGY
    from mffm.release import NOT_CONSERVATIVE, load

    tune_allocator()
    loaded = load(potential, weights)
    path = store or Path(loaded.spec.provenance.get("recipe", {}).get("data", {}).get("store", ""))
    opened = Store(path)
    spread: dict[str, Calibration] = {}
    others = [load(path, weights) for path in ensemble or []]
    if others:
        from mffm.evaluate import ensemble as together

        result, spread = together.evaluate([loaded, *others], opened, split, fidelity)
    else:
        result = parity.evaluate(loaded, opened, split, fidelity)
    folder = output or (potential.parent if potential.is_file() else potential)
    report, figure = parity.write(result, loaded, opened, folder, others)
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
    if spread:
        from mffm.evaluate import calibration

        paths = calibration.write(spread, loaded, opened, split, folder)
        _show_calibration(spread)
        console.print(f"{paths[0]}\n{paths[1]}", highlight=False)
    elif loaded.contents is not None and loaded.contents.uncertainty:
        from mffm.evaluate import calibration

        fitted = [name.removesuffix(".factor") for name in loaded.contents.uncertainty]
        judged = [name for name, prop in result.labels if prop == ENERGY and name in fitted]
        if not judged:
            say(f"uncertainty not compared: it is of {known(fitted)}, and no energy of these is among the labels above")
            return
        found = calibration.calibrate(loaded, opened, split, judged)
        paths = calibration.write(found, loaded, opened, split, folder)
        _show_calibration(found)
        console.print(f"{paths[0]}\n{paths[1]}", highlight=False)


def _show_calibration(found: "dict[str, Calibration]") -> None:
    columns = ("fidelity", "MAE", "mean σ", "unit", "rms of error/σ", "inside 68 %", "inside 95 %", "rank correlation")
    table = Table(*columns, title="uncertainty")
    for name, one in found.items():
        row = one.row()
        rank = "" if row["rank_correlation"] is None else f"{row['rank_correlation']:.2f}"
        inside = [f"{100 * row['coverage'][level]:.0f} %" for level in ("0.68", "0.95")]
        values = (f"{row['mae']:.1f}", f"{row['mean_std']:.1f}", row["unit"], f"{row['rms_of_residual_over_std']:.2f}")
        table.add_row(name, *values, *inside, rank)
    console.print(table)


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
