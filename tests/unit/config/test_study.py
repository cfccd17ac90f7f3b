"""Every study YAML in configs/studies holds, with the base recipe that it names."""

from pathlib import Path

import pytest

from mffm.config.base import apply_overrides, as_overrides, read_yaml, validate
from mffm.config.recipe import Recipe
from mffm.config.study import load_study

ROOT = Path(__file__).parents[3]
YAMLS = sorted((ROOT / "configs" / "studies").glob("*.yaml"))


def test_there_are_some() -> None:
    assert {path.stem for path in YAMLS} >= {"molecules_small"}


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_loads_with_every_method(path: Path) -> None:
    study = load_study(path)
    base = apply_overrides(read_yaml(path.parent / study.recipe), as_overrides(study.changes))
    for name, method in study.methods.items():
        changes = as_overrides(method.changes) + (["start_from=stage"] if method.start_from else [])
        validate(Recipe, apply_overrides(base, changes), name)
    for name, stage in study.stages.items():
        recipe = validate(Recipe, apply_overrides(base, as_overrides(stage.changes)), name)
        assert study.high not in recipe.fidelities


def test_as_overrides_keeps_values() -> None:
    values = {"a.b": 1e-05, "c": [{"d": None, "e": "x: y"}], "f": "12", "g": True, "h": 3}
    content = apply_overrides({}, as_overrides(values))
    assert content == {"a": {"b": 1e-05}, "c": [{"d": None, "e": "x: y"}], "f": "12", "g": True, "h": 3}
