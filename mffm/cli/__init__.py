"""The command line, a file for each group of commands.

Heavy parts are imported by the command that needs them: ``mffm --help`` answers at once.
"""

from typing import Annotated

import typer

from mffm import __version__
from mffm.cli import (
    active,
    benchmark,
    budget,
    cluster,
    config,
    convert,
    data,
    evaluation,
    export,
    fidelity,
    finetune,
    label,
    predict,
    properties,
    release,
    selection,
    store,
    study,
    training,
)
from mffm.cli.output import complain
from mffm.errors import InputError, told

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train interatomic potentials on labels of several levels of theory.",
)

COMMANDS = (  # in the order of ``mffm --help``
    data.ingest,
    data.doctor,
    data.edges,
    data.difference,
    data.verify,
    data.references,
    label.label,
    training.train,
    finetune.finetune,
    training.resume,
    training.replay,
    evaluation.evaluate,
    benchmark.benchmark,
    convert.convert,
    release.release,
    release.inspect,
    release.diff,
    predict.predict,
    selection.select,
    budget.plan,
    active.active,
    export.export,
    properties.relax,
    properties.md,
    properties.phonons,
    properties.elastic,
    properties.eos,
    cluster.runs,
    cluster.selftest,
)
for command in COMMANDS:
    app.command()(command)
app.add_typer(fidelity.app, name="fidelity")
app.add_typer(store.app, name="store")
app.add_typer(study.app, name="study")
app.add_typer(config.app, name="config")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="show the version")] = False) -> None:
    if version:
        typer.echo(f"mffm {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; bad input is one message and exit code 2."""
    try:
        app()
    except (InputError, UnicodeDecodeError, OSError) as error:
        message = told(error)
        if message is None:
            raise
        complain(message)
