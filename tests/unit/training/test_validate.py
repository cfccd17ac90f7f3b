"""Validation's parity plot: its points are those that the metrics are made of, bounded in number."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mffm.config.base import load
from mffm.config.recipe import Recipe
from mffm.distributed import Ranks
from mffm.training import validate
from mffm.training.loop import _validator
from mffm.training.setup import prepare


def test_points_of_the_parity_plot(make_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    setup = prepare(load(Recipe, make_recipe()))
    table = setup.spec.reference_table()
    potential = setup.potential.requires_grad_(False)
    whole = _validator(setup, table, Ranks())
    assert not whole.draw(tmp_path / "none.png", "before the first validation")
    metrics = whole(potential)
    panels = {title: (label, value) for title, _, label, value in whole._points.panels(setup.fidelities, table.device)}
    for name in ("gfn2", "pbe"):
        for prop in ("energy", "forces"):
            label, value = panels[f"{name} {prop}"]
            assert np.abs(value - label).mean() * 1e3 == pytest.approx(metrics[f"val/{name}/{prop}_mae"], rel=1e-5)
    whole(potential)  # a later validation starts anew
    again = {title: value for title, _, _, value in whole._points.panels(setup.fidelities, table.device)}
    assert {t: v.tolist() for t, v in again.items()} == {t: v.tolist() for t, (_, v) in panels.items()}

    monkeypatch.setattr(validate, "PLOTTED", 20)
    bounded = _validator(setup, table, Ranks())
    bounded(potential)
    for title, _, label, value in bounded._points.panels(setup.fidelities, table.device):
        name = title.split(",")[0]
        everything = list(zip(*(x.tolist() for x in panels[name]), strict=True))
        assert 0 < len(label) <= 20
        if len(everything) > 20:
            assert title == f"{name}, {len(label)} of {len(everything):,} points"
        assert set(zip(label.tolist(), value.tolist(), strict=True)) <= set(everything)
    assert bounded.draw(tmp_path / "plots" / "validation.png", "title")
    assert (tmp_path / "plots" / "validation.png").stat().st_size > 5000
