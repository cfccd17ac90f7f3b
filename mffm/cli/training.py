"""Commands of training: train, resume, replay."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.table import Table

from mffm.cli.output import EXIT_INPUT, console
from mffm.errors import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from mffm.config.recipe import Recipe
    from mffm.training.loop import Outcome
    from mffm.training.preflight import Check


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
        finish(faults.process(run))


def resume(run: Annotated[Path, typer.Argument(help="folder of the run")]) -> None:
    """Go on with a run from its newest checkpoint."""
    from mffm.training import faults

    def go_on() -> "Outcome":
        from mffm.training import loop

        return loop.resume(run)

    finish(faults.process(go_on))


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


def finish(outcome: "Outcome") -> NoReturn:
    """Say how a run ended, and leave with its exit code."""
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
