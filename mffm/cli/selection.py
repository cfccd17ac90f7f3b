"""Which structures deserve a label: select."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from mffm.cli.deployed import DeviceOption, FidelityOption, PotentialArgument, WeightsOption
from mffm.cli.output import EXIT_KEYBOARD, say
from mffm.cli.progress import Stages


def select(
    potential: PotentialArgument,
    pool: Annotated[list[Path], typer.Argument(help="what to choose from: stores, and files that ASE reads")],
    fidelity: FidelityOption,
    by: Annotated[str, typer.Option(help="random, fps, lcmd, maxdet, uncertainty or disagreement")] = "lcmd",
    n: Annotated[int | None, typer.Option("--n", min=1, help="how many")] = None,
    labelled: Annotated[
        list[Path] | None, typer.Option(help="store or file of what is labelled already; may be given several times")
    ] = None,
    high: Annotated[
        str | None, typer.Option(help="of stores: frames with a label of this level are labelled already")
    ] = None,
    split: Annotated[str, typer.Option(help="of a store to choose from; all: any")] = "train",
    against: Annotated[str | None, typer.Option(help="of disagreement: the level to compare with")] = None,
    cost: Annotated[
        str | None, typer.Option(help="atoms^p, e.g. atoms^2.4, or a file with a number for each structure of the pool")
    ] = None,
    budget: Annotated[float | None, typer.Option(help="sum of the costs, at most")] = None,
    max_per_formula: Annotated[int | None, typer.Option(min=1, help="of one composition, at most")] = None,
    elements: Annotated[str | None, typer.Option(help="only structures of these: H,C,O")] = None,
    compositions_first: Annotated[
        bool, typer.Option(help="first new elements and new ratios of them, which element references need")
    ] = True,
    max_std: Annotated[
        float | None, typer.Option(help="meV/atom; what is less certain is never chosen: often it is broken")
    ] = None,
    ensemble: Annotated[
        list[Path] | None,
        typer.Option(help="another member, whose spread is the uncertainty; may be given several times"),
    ] = None,
    seed: Annotated[int, typer.Option(help="of random")] = 0,
    out: Annotated[Path, typer.Option(help="folder of the structures, the JSON and the plot")] = Path("selection"),
    device: DeviceOption = "cpu",
    weights: WeightsOption = "best",
) -> None:
    """Choose structures that deserve an expensive label: diverse, unlike what is labelled, for their cost."""
    from mffm.select import report, run

    options = run.Options(
        by, n, fidelity, against, budget, cost, labelled or [], high, split,
        [e.strip() for e in elements.split(",")] if elements else [], compositions_first, None, max_per_formula,
        max_std, ensemble or [], seed, device, weights,
    )  # fmt: skip
    try:
        with Stages() as shown:
            found = run.select(potential, pool, options, out, shown)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        raise typer.Exit(EXIT_KEYBOARD) from None
    paths = report.write(found, out)
    for reason, count in found.left_out.items():
        if count:
            say(f"{count:,} of {len(found.pool.all):,} structures not considered: {reason}")
    for rank, pick in enumerate(found.picks[:5], 1):
        index = int(found.candidates[pick.index])
        say(f"{rank}. {found.pool.all[index].formula}, {found.pool.place(index)}: {report.reason(found, pick)}")
    say(f"{paths[0]}: {len(found.picks)} of {len(found.candidates):,} structures, by {by}; {paths[1]}, {paths[2]}")
