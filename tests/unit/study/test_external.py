"""Another code's results stand in curves, factors and tables of the report, marked, and in no advice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mffm.config.study import load_study
from mffm.errors import InputError
from mffm.evaluate.parity import FrameErrors
from mffm.keys import REPORT_UNITS
from mffm.study import external, report
from mffm.study.compare import not_worse
from mffm.study.grid import Cell, Grid, expand
from mffm.study.page import markdown
from mffm.study.run import Judged, write_frames


def grid_of(path: Path) -> Grid:
    return expand(load_study(path), path, path.parent / "out")


def rows(energy: float, forces: float) -> list[dict[str, Any]]:
    return [
        {"fidelity": "pbe", "property": prop, "mae": mae, "rmse": mae, "bias": 0.0, "r2": 0.5, "n_systems": 9,
         "unit": REPORT_UNITS[prop][0]}
        for prop, mae in (("energy", energy), ("forces", forces))
    ]  # fmt: skip


def frames(grid: Grid, energy: float) -> dict[tuple[str, str], FrameErrors]:
    """Return errors of every test frame that are the same for all."""
    there = grid.store.rows(split="test", fidelity="pbe")
    return {("iid", "energy"): FrameErrors(there, np.full(len(there), energy), np.ones(len(there), np.int64))}


def judged(grid: Grid, cell: Cell, energy: float, forces: float) -> Judged:
    errors = {("iid", "energy"): energy, ("iid", "forces"): forces}
    of_frames = frames(grid, energy)
    return Judged(cell, errors, {"iid": rows(energy, forces)}, {}, 60.0, 0.0, 4, "plan", of_frames, ["a laptop"])


@pytest.fixture
def written(make_study: Callable[..., Path]) -> tuple[Grid, Path, dict[str, Any]]:
    """A grid, its folder, and results of another code on one method's cells that are half the errors of hf_only."""
    path = make_study(seeds=[0], candidate="hf_only")
    grid, folder = grid_of(path), path.parent / "out"
    cells = [cell for cell in grid.cells if cell.method == "delta"]
    content = {
        "name": "other", "title": "Another code", "code": "other 1.2.3", "settings": {"preset": "small"},
        "notes": ["CPU time: that of delta head."], "fingerprint": external.fingerprint(grid),
        "splits": {"iid": "test"}, "judges": {}, "machine": "a laptop", "date": "2026-11-26",
        "cells": [
            {"n_high": c.n_high, "seed": c.seed, "draw": c.draw, "errors": {"iid": rows(40 / c.n_high, 400 / c.n_high)},
             "cpu_seconds": 90.0, "steps": 33}
            for c in cells
        ],
    }  # fmt: skip
    (folder / "external").mkdir(parents=True)
    (folder / "external" / "other.json").write_text(json.dumps(content))
    return grid, folder, content


def test_results_are_drawn_beside_the_methods(written: tuple[Grid, Path, dict[str, Any]]):
    grid, folder, _ = written
    ours = [judged(grid, c, 80 / c.n_high, 800 / c.n_high) for c in grid.cells if c.method == "hf_only"]
    others = external.read(grid, folder)
    summary = report.summarise(grid, ours, [], {}, others)
    assert [p["mean"] for p in summary["curves"]["iid/energy"]["other"]] == pytest.approx([5.0, 2.5])
    (first, _) = summary["factors"]["iid/energy"]["hf_only"]["other"]["points"]
    assert (first["k"], first["bound"]) == (pytest.approx(2.0), "=")
    assert summary["cpu_minutes"]["other"] == {"own": 1.5, "stage": 0.0}
    assert not any("Another code" in line for line in summary["advice"])
    assert "other" not in summary["fairness"]["steps"]
    page = markdown(summary)
    for text in (
        "| Another code ‡ | 5 | 2.5 |", "‡ is another code's training", "| Another code ‡ | 33 | 1.5 | 0 |",
        "Another code ‡: trained by other 1.2.3, 2026-11-26 on a laptop", "CPU time: that of delta head.",
        "none of ours: other 1.2.3<br>`preset: \"small\"`",
    ):  # fmt: skip
        assert text in page, text
    report.write(grid, summary, folder)
    assert (folder / "learning_curves.png").stat().st_size > 10_000
    assert "‡" not in markdown(report.summarise(grid, ours, [], {}))


def test_the_candidate_is_compared_with_it(written: tuple[Grid, Path, dict[str, Any]]):
    grid, folder, content = written
    (cell, _) = content["cells"]
    content = {**content, "cells": [{**cell, "errors": {"iid": rows(40 / 8, 400 / 8)[:1]}}]}
    (folder / "external" / "other.json").write_text(json.dumps(content))
    write_frames(external.frames_path(folder, "other", 8, 0), frames(grid, 40 / 8))
    (other,) = external.read(grid, folder)
    ours = [judged(grid, c, 80 / c.n_high, 800 / c.n_high) for c in grid.cells if c.method == "hf_only"]
    found = not_worse(grid, ours, [other])
    assert found is not None
    (point,) = found["panels"]["iid/energy"]["other"]
    assert (point["n_high"], point["ratio"]) == (8, pytest.approx(2.0))
    assert "Another code, iid energy, 8 frames" in found["verdict"][0]


def test_results_of_other_frames_are_refused(written: tuple[Grid, Path, dict[str, Any]]):
    grid, folder, content = written

    def refused(**changes: Any) -> str:
        (folder / "external" / "other.json").write_text(json.dumps({**content, **changes}))
        with pytest.raises(InputError) as raised:
            external.read(grid, folder)
        return str(raised.value)

    (cell, *rest) = content["cells"]
    assert "frames of seed 0 (123): the study's cells have others; run the tool" in refused(
        cells=[{**cell, "draw": "123"}, *rest]
    )
    assert "the study has no such cell" in refused(cells=[{**cell, "n_high": 7}, *rest])
    assert "made with other labels (old)" in refused(fingerprint="old")
    assert "made with other splits" in refused(splits={"iid": "val"})
    assert "must be the file's, and none of the study's methods" in refused(name="delta")
    assert "are there twice" in refused(cells=[cell, cell])
