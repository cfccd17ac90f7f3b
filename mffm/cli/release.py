"""Releases: release."""

from pathlib import Path
from typing import Annotated

import typer

from mffm.cli.output import console


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
