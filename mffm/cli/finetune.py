"""Fine-tuning of a release: finetune."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from mffm.cli.output import console
from mffm.cli.training import finish

if TYPE_CHECKING:
    from mffm.training.loop import Outcome


def finetune(
    release: Annotated[Path, typer.Argument(help="release, or the folder of a run; stays as it is")],
    recipe: Annotated[Path, typer.Argument(help="recipe YAML without a model, e.g. configs/finetune.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.key=value, e.g. fine_tune.mode=lora fine_tune.replay=predictions")
    ] = None,
) -> None:
    """Fine-tune a release on new labels, of its own or of new levels of theory; says what was learned and forgotten."""
    from mffm.training import faults

    def run() -> "Outcome":
        from mffm.training import finetune as module
        from mffm.training import loop

        return loop.train(module.recipe_of(release, recipe, overrides or []))

    outcome = faults.process(run)
    from mffm.distributed import ranks_from_environment

    if ranks_from_environment().is_main and outcome.ended != "interrupted":
        _show(outcome.run)
    finish(outcome)


def _show(run: Path) -> None:
    from mffm.release import read_json

    table = Table("split", "fidelity", "", "property", "MAE before", "after", "unit", title="before and after")
    for row in read_json(run / "finetune.json")["rows"]:
        kind = "new" if row["is_new"] else "old"
        numbers = f"{row['before']:.4g}", f"{row['after']:.4g}", row["unit"]
        table.add_row(row["split"], row["fidelity"], kind, row["property"], *numbers)
    console.print(table, highlight=False)
    console.print(f"{run / 'finetune.md'}", highlight=False)
