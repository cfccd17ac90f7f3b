"""CPS of every published row from its three parts."""

import pytest

from mffm.evaluate import published
from mffm.evaluate.matbench_discovery.scores import combined


def number(text: str) -> float | None:
    return float(text) if text else None


def test_cps_of_every_row_follows_from_its_parts():
    n = 0
    for row in published.matbench_discovery():
        found = combined(number(row["uniq_F1"]), number(row["κ_SRME"]), number(row["geo_rmsd"]))
        expected = number(row["CPS_recomputed"])
        assert (found is None) == (expected is None), row["model"]
        if expected is not None:
            assert found == pytest.approx(expected, abs=5.01e-5), row["model"]
            n += 1
    assert n == 52


@pytest.mark.parametrize(
    ("f1", "kappa", "rmsd", "expected"),
    [
        (1, 0, 0, 1),
        (0, 2, 0.15, 0),
        (0.5, 1, 0.3, 0.45),  # RMSD is clipped
        (None, 1, 0.1, None),
        (0.5, 2.1, 0.1, None),
        (0.5, float("nan"), 0.1, None),
    ],
)
def test_limits(f1: float | None, kappa: float, rmsd: float, expected: float | None):
    assert combined(f1, kappa, rmsd) == (None if expected is None else pytest.approx(expected))
