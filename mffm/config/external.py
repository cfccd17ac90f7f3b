"""Schema of another code's results on a study's cells: what a tool writes and the report of the study draws."""

from typing import Any

from pydantic import Field, model_validator

from mffm.config.base import Schema
from mffm.config.study import Name


class ExternalCell(Schema):
    """One cell of the grid, trained by another code and judged as the study judges its own."""

    n_high: int = Field(ge=1, description="frames with high-fidelity labels")
    seed: int
    draw: str = Field(min_length=1, description="digest of these frames, as of the study's cells")
    errors: dict[str, list[dict[str, Any]]] = Field(description="kind of split → rows as of `mffm evaluate`")
    found: dict[str, Any] = Field(default_factory=dict, description="judge → what it found")
    cpu_seconds: float = Field(ge=0, description="of the training")
    steps: int = Field(ge=0, description="optimiser steps")


class ExternalResults(Schema):
    """What ``external/<name>.json`` in a study's folder holds."""

    name: Name
    title: str = Field(min_length=1, description="in the report")
    code: str = Field(min_length=1, description="program and version")
    settings: dict[str, Any] = Field(default_factory=dict, description="what decides the training, for the report")
    notes: list[str] = Field(default_factory=list, description="what is equal and what is not, a sentence each")
    fingerprint: str = Field(min_length=1, description="of the store with the labels that are judged")
    splits: dict[str, str] = Field(description="kind of split → split of the store")
    judges: dict[str, str] = Field(default_factory=dict, description="judge → its digest")
    machine: str = Field(min_length=1)
    date: str = Field(min_length=1)
    cells: list[ExternalCell]

    @model_validator(mode="after")
    def _checks(self) -> "ExternalResults":
        places = [(cell.n_high, cell.seed) for cell in self.cells]
        twice = next((place for place in places if places.count(place) > 1), None)
        if twice is not None:
            raise ValueError(f"cells: {twice[0]} frames with seed {twice[1]} are there twice")
        return self
