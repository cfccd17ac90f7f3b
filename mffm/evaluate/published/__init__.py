"""Leaderboard rows as published, shipped as data; README.md beside it gives source, date and licence."""

import csv
import json
from functools import lru_cache
from importlib.resources import files
from typing import Any

MATBENCH_DISCOVERY = "janosh/matbench-discovery 2c7f9fc, 2026-07-16"
LAMBENCH = "deepmodeling/LAMBench c20f07d, 2026-04-07"


def _text(name: str) -> str:
    return (files("mffm.evaluate.published") / name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def matbench_discovery() -> tuple[dict[str, str], ...]:
    """Return one row a model, as strings; an empty string is not published."""
    return tuple(csv.DictReader(_text("matbench_discovery.csv").splitlines()))


@lru_cache(maxsize=1)
def kappa_103() -> dict[str, Any]:
    """Return model key → label, κ in W/(m K) and SRME by material; ``_reference`` has ids, formulas and κ of DFT."""
    return json.loads(_text("kappa_103.json"))["models"]


@lru_cache(maxsize=1)
def lambench() -> dict[str, Any]:
    """Return model → aggregates and metrics by task, in the units of the suite."""
    return json.loads(_text("lambench.json"))["models"]
