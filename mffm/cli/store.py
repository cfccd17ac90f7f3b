"""Commands on stores: merge, subset, split, stats, verify, stage."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from mffm.cli.data import verify
from mffm.cli.output import EXIT_KEYBOARD, StoreArgument, console, say
from mffm.errors import InputError

if TYPE_CHECKING:
    from mffm.data.statistics import Statistics

app = typer.Typer(no_args_is_help=True, help="Make stores of stores, and look at them.")
app.command()(verify)

OutArgument = Annotated[Path, typer.Argument(help="folder of the new store")]
_MOST_MOVES = 5  # structures in two splits that are shown


@app.command()
def merge(
    out: OutArgument,
    stores: Annotated[list[Path], typer.Argument(help="stores; where two have the same label, the earlier one counts")],
    workers: Annotated[int, typer.Option(min=1, help="processes")] = 1,
) -> None:
    """Make one store of several: every structure once, with its labels from all of them."""
    from mffm.data.merge import merge as merge_stores

    try:
        done = merge_stores(stores, out, workers)
    except KeyboardInterrupt:
        print("interrupted; give the same command again to go on where it stopped", file=sys.stderr)
        raise typer.Exit(EXIT_KEYBOARD) from None
    say(
        f"{out}: {done.n_frames:,} structures; {done.n_merged:,} were in an earlier store too, {done.n_rejected:,} of "
        f"these with labels that contradict it{' (rejected.jsonl)' if done.n_rejected else ''}"
    )
    if done.n_moves:
        shown = "; ".join(done.moves[:_MOST_MOVES])
        say(f"warning: {done.n_moves:,} structures are in another split of an earlier store and stay there: {shown}")
    say(f"fingerprint {done.fingerprint}")


@app.command()
def subset(
    store: StoreArgument,
    out: OutArgument,
    ids: Annotated[Path | None, typer.Option(help="file of frame ids, one a line (.txt), or of structures")] = None,
    fidelity: Annotated[list[str] | None, typer.Option(help="with a label of it; repeatable: of each")] = None,
    elements: Annotated[str | None, typer.Option(help="of these elements only: C,H,O")] = None,
    split: Annotated[str | None, typer.Option(help="of this split")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="this many of what the rest leaves")] = None,
    fraction: Annotated[float | None, typer.Option(help="this share of what the rest leaves")] = None,
    seed: Annotated[int, typer.Option(help="of count and fraction")] = 0,
) -> None:
    """Copy part of a store, with all labels of the structures that meet every condition."""
    from mffm.data import subset as module
    from mffm.data.store import Store

    opened = Store(store)
    symbols = [] if elements is None else [symbol.strip() for symbol in elements.split(",")]
    rows = module.chosen_rows(opened, ids, fidelity or (), symbols, split, count, fraction, seed)
    asked: dict[str, Any] = {
        "ids": None if ids is None else str(ids),
        "fidelities": fidelity or [],
        "elements": symbols,
        "split": split,
        "count": count,
        "fraction": fraction,
        "seed": seed,
    }
    made = module.subset(opened, rows, out, asked, progress=True)
    say(f"{out}: {made.n_frames:,} of {opened.n_frames:,} structures, fingerprint {made.fingerprint}")


@app.command()
def split(
    store: StoreArgument,
    out: OutArgument,
    fraction: Annotated[list[str] | None, typer.Option(help="name=share, repeatable; they sum to 1")] = None,
    by: Annotated[
        Literal["structure", "group", "composition"], typer.Option(help="what is never torn apart")
    ] = "structure",
    holdout: Annotated[list[str] | None, typer.Option(help="name=group: a group that is whole in a split")] = None,
    seed: Annotated[int, typer.Option(help="of the draw")] = 0,
) -> None:
    """Draw the splits of a store anew; its shards are linked where the file system can, else copied."""
    from mffm.config.base import validate
    from mffm.config.data import SplitSpec
    from mffm.data import subset as module
    from mffm.data.store import Store

    spec: dict[str, Any] = {"seed": seed, "holdout": {}}
    if fraction:
        spec["fractions"] = dict(_named(text, "--fraction", "train=0.8") for text in fraction)
    for text in holdout or ():
        name, group = _named(text, "--holdout", "ood=HCOOCH3")
        spec["holdout"].setdefault(name, []).append(group)
    made = module.split(Store(store), out, validate(SplitSpec, spec, "split"), by)
    counts = ", ".join(f"{name} {int((made.split == k).sum()):,}" for k, name in enumerate(made.split_names))
    say(f"{out}: {counts}; fingerprint {made.fingerprint}")


def _named(text: str, option: str, example: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise InputError(f"{option} {text}: expected a name, = and a value, as in {example}")
    return name, value


@app.command()
def stats(store: StoreArgument) -> None:
    """Show what a store has: sizes, elements, labels and how large they are, neighbors."""
    from ase.data import chemical_symbols

    from mffm.data import statistics
    from mffm.data.store import Store

    opened = Store(store)
    geometry, layers = statistics.of_store(opened)
    say(f"{store}: {geometry['frames']:,} structures, {geometry['atoms']:,} atoms, fingerprint {opened.fingerprint}")
    splits = {name: int((opened.split == k).sum()) for k, name in enumerate(opened.split_names)}
    say("splits: " + ", ".join(f"{name} {n:,}" for name, n in splits.items()))
    say("atoms a structure: " + _quantiles(geometry["sizes"]))
    elements = sorted(geometry["elements"].items(), key=lambda item: -item[1])
    say("structures with an element: " + ", ".join(f"{chemical_symbols[int(z)]} {n:,}" for z, n in elements))
    for cutoff, histogram in opened.neighbor_histograms().items():
        say(f"neighbors of an atom within {cutoff:g} Å, mean of a structure: {_quantiles(histogram)}")
    table = Table("layer", "fidelity", "property", "structures", "mean", "rms", "least", "most")
    for layer, by_fidelity in layers.items():
        for fidelity, by_property in by_fidelity.items():
            for prop, numbers in by_property.items():
                table.add_row(layer, fidelity, prop, f"{numbers['frames']:,}", *_numbers(prop, numbers))
    console.print(table)
    say("energy: eV per atom, rms about its mean; forces: eV/Å, stress: eV/Å³, of components; most: of absolute values")


def _numbers(prop: str, numbers: "Statistics") -> tuple[str, ...]:
    from mffm.data.statistics import rms

    if prop == "energy":
        shown = [numbers["mean"], rms(numbers), numbers["least"], numbers["most"]]
        return tuple(f"{value:.5g}" for value in shown)
    return "", f"{rms(numbers):.5g}", "", f"{numbers['largest']:.5g}"


def _quantiles(histogram: dict[str, int]) -> str:
    """Return least, median, mean, 99 % and most of a histogram value → how often, ascending."""
    import numpy as np

    values = np.array([int(value) for value in histogram])
    counts = np.array(list(histogram.values()))
    below = np.cumsum(counts)
    median, most_of = (int(values[np.searchsorted(below, share * below[-1])]) for share in (0.5, 0.99))
    mean = float(values @ counts / below[-1])
    return f"least {values[0]}, median {median}, mean {mean:.1f}, 99 % up to {most_of}, most {values[-1]}"


@app.command()
def stage(
    store: StoreArgument,
    out: Annotated[Path, typer.Argument(help="folder of the copy, on the node's own disk")],
) -> None:
    """Copy a store to a node's own disk, checked while it is copied; a copy that is there is kept."""
    from mffm.data.stage import stage as stage_store
    from mffm.data.store import Store

    done = stage_store(Store(store), out, progress=True)
    what = f"{done.n_bytes / 1e6:,.1f} MB copied and checked" if done.n_bytes else "there already"
    say(f"{out}: {what}, fingerprint {done.fingerprint}")
