"""Releases of what other packages trained: convert."""

from pathlib import Path
from typing import Annotated

import typer

from mffm.cli.output import say
from mffm.errors import InputError


def convert(
    source: Annotated[
        str, typer.Argument(help="sevennet:7net-0, 7net-l3i5 or 7net-mf-0, or sevennet:FILE.pth (a pickle)")
    ],
    target: Annotated[Path, typer.Argument(help="folder, or FILE.safetensors: all in one file")],
    fidelity: Annotated[
        list[str] | None,
        typer.Option(help="NAME=LEVEL OF THEORY, for each of the checkpoint, in its order; known for shipped ones"),
    ] = None,
    conditioning: Annotated[
        str | None,
        typer.Option(help="onehot or embedding: fine-tuning can add levels of theory; none. Default: the checkpoint's"),
    ] = None,
    heads: Annotated[str, typer.Option(help="shared, or independent: a linear head for each fidelity")] = "shared",
    licence: Annotated[str, typer.Option(help="of a checkpoint that is not shipped")] = "",
) -> None:
    """Make a release of a checkpoint of another package: the same predictions, ready for fine-tuning and deployment."""
    from mffm.cli.release import show_written
    from mffm.release.convert import convert as converted

    chosen = [_fidelity(text) for text in fidelity or []]
    path, differences = converted(source, target, chosen, conditioning, heads, licence)
    show_written(path)
    say(
        f"largest differences from the package's own calculator, float32: {differences['energy']:.1e} eV/atom, "
        f"{differences['forces']:.1e} eV/Å, {differences['stress']:.1e} eV/Å³"
    )


def _fidelity(text: str) -> tuple[str, str]:
    name, _, level = text.partition("=")
    if not name or not level:
        raise InputError(f"--fidelity {text}: give NAME=LEVEL OF THEORY, as in --fidelity pbe_mp='PBE, VASP'")
    return name, level
