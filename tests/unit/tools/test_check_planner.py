"""The planner's hold-out on the committed studies: enough points, and the 90 % intervals hold about as many."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_held_out_points_of_the_committed_studies():
    spec = importlib.util.spec_from_file_location("check_planner", ROOT / "tools" / "check_planner.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    points = list(tool.held_out(ROOT / "docs" / "studies" / "crystals", set()))
    assert len(points) >= 10
    assert all(p.n_labels > p.most for p in points)
    assert sum(p.is_inside for p in points) >= 0.75 * len(points)
    assert all(p.high / p.low < 5 for p in points)
    assert any(p.high / p.low < 2 for p in points)
