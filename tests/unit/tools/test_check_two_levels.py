"""A plan of two levels against the committed grid of trainings: it says what came out, in intervals of some use."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[3]
STUDIES = ROOT / "docs" / "studies"


def test_trainings_with_more_labels_of_both_levels():
    spec = importlib.util.spec_from_file_location("check_two_levels", ROOT / "tools" / "check_two_levels.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    points = list(tool.predicted(STUDIES / "levels_low", STUDIES / "levels"))
    assert len(points) == 16
    assert {p.n_low for p in points} == {320, 640, 1298}
    assert sum(p.is_inside for p in points) >= 0.8 * len(points)
    assert sorted(p.high / p.low for p in points)[8] < 2.5
    assert all(0.6 < p.error / p.median < 1.4 for p in points)
