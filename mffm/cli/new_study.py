"""A study of the user's own two files: study new."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from mffm.cli.output import console, say

if TYPE_CHECKING:
    from mffm.keys import Property

Key = Annotated[str | None, typer.Option(help="key of the label, where the guess is not to be trusted")]


def new(
    low: Annotated[Path, typer.Argument(help="structures with labels of the cheap level: extxyz, or what ASE reads")],
    high: Annotated[Path, typer.Argument(help="structures with labels of the expensive level; may be the same file")],
    folder: Annotated[Path | None, typer.Option(help="for the YAMLs; <high>_from_<low> where not given")] = None,
    low_name: Annotated[str | None, typer.Option(help="of the fidelity; the file's where not given")] = None,
    high_name: Annotated[str | None, typer.Option(help="of the fidelity; the file's where not given")] = None,
    low_energy: Key = None,
    low_forces: Key = None,
    low_stress: Key = None,
    high_energy: Key = None,
    high_forces: Key = None,
    high_stress: Key = None,
    steps: Annotated[int, typer.Option(min=1, help="optimiser steps of a training")] = 300,
    seeds: Annotated[int, typer.Option(min=1, help="trainings of each kind")] = 2,
) -> None:
    """Write data YAML, recipe and study YAML of two files: how many expensive labels, and which method?"""
    from mffm.study import new as module

    def keys(energy: str | None, forces: str | None, stress: str | None) -> "dict[Property, str]":
        named: dict[Property, str | None] = {"energy": energy, "forces": forces, "stress": stress}
        return {prop: key for prop, key in named.items() if key is not None}

    sides = (
        module.Side(low, "--low", low_name, keys(low_energy, low_forces, low_stress)),
        module.Side(high, "--high", high_name, keys(high_energy, high_forces, high_stress)),
    )
    place = folder or Path(f"{sides[1].fidelity}_from_{sides[0].fidelity}")
    made = module.new_study(*sides, place, steps, seeds)
    paths = module.write(made)
    table = Table("", "low", "high")
    for row in module.facts(made):
        table.add_row(*row)
    console.print(table)
    for note in module.notes(made):
        say(f"note: {note}")
    say(f"written: {', '.join(str(path) for path in paths)}")
    say(f"{module.n_trainings(made)} trainings of up to {steps} steps; next:")
    for command in made.commands:
        say(f"  {command}")
