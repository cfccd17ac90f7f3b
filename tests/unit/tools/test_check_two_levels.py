"""A plan of two levels against the committed grid of trainings: it says what came out, in intervals of some use."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]
STUDIES = ROOT / "docs" / "studies"


def points() -> list[Any]:
    spec = importlib.util.spec_from_file_location("check_two_levels", ROOT / "tools" / "check_two_levels.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return list(tool.predicted(STUDIES / "levels_low", STUDIES / "levels"))


def test_trainings_with_more_labels_of_both_levels():
    found = points()
    assert len(found) == 16
    assert {p.n_low for p in found} == {320, 640, 1298}
    assert sum(p.is_inside for p in found) >= 0.8 * len(found)
    assert sorted(p.high / p.low for p in found)[8] < 2.5
    assert all(0.6 < p.error / p.median < 1.4 for p in found)


def test_what_more_cheap_labels_bring_at_equal_expensive_ones():
    found = {(p.panel, p.n_low, p.n_high): p for p in points()}
    pairs = [
        (found[panel, 1298, n], found[panel, 320, n]) for panel in ("iid/energy", "ood/energy") for n in (100, 228)
    ]
    said = np.mean([math.log(more.median / less.median) for more, less in pairs])
    measured = np.mean([math.log(more.error / less.error) for more, less in pairs])
    assert measured < -0.05
    assert said == pytest.approx(measured, abs=0.05)
