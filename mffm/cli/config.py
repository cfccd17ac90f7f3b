"""Commands on the configuration: config schema, config show."""

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mffm.config.base import Schema

app = typer.Typer(no_args_is_help=True, help="Look at the configuration: every key, and every value of a recipe.")


class Kind(StrEnum):
    """Kinds of YAML."""

    recipe = "recipe"
    data = "data"
    cluster = "cluster"
    study = "study"


def _schema(kind: Kind) -> "type[Schema]":
    from mffm.config.cluster import ClusterConfig
    from mffm.config.data import DataConfig
    from mffm.config.recipe import Recipe
    from mffm.config.study import StudyConfig

    schemas: dict[Kind, type[Schema]] = {
        Kind.recipe: Recipe, Kind.data: DataConfig, Kind.cluster: ClusterConfig, Kind.study: StudyConfig
    }  # fmt: skip
    return schemas[kind]


@app.command("schema")
def schema(kind: Annotated[Kind, typer.Argument(help="which YAML")] = Kind.recipe) -> None:
    """Print the JSON schema of a YAML, for editors."""
    typer.echo(json.dumps(_schema(kind).model_json_schema(), indent=2, ensure_ascii=False))


@app.command("show")
def show(
    recipe: Annotated[Path, typer.Argument(help="YAML")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.key=value")] = None,
    kind: Annotated[Kind, typer.Option(help="which YAML")] = Kind.recipe,
) -> None:
    """Print every value of a YAML and where it came from: the file, the command line or the default."""
    from mffm.config.base import load, origins, read_yaml

    loaded = load(_schema(kind), recipe, overrides or [])
    for name, value, origin in origins(loaded, read_yaml(recipe), overrides or []):
        typer.echo(f"{name} = {json.dumps(value, ensure_ascii=False)}  # {origin}")
