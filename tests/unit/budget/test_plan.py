"""Learning curves and the plan made of them: known laws are found, intervals cover, the budget goes where it should."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mffm.budget.costs import CostModel
from mffm.budget.curves import Curve, Point, posterior, read
from mffm.budget.plan import REFUSE, error_at, levels_of, propose
from mffm.cli import app
from mffm.errors import InputError

ROOT = Path(__file__).parents[3]
IDLE = ROOT / "docs" / "studies" / "idle" / "report.json"
COSTS = ROOT / "data" / "molecules_many.extxyz"


def curve(
    level: str, a: float, b: float, c: float, sizes=(25, 50, 100, 200, 400), noise: float = 0.0, seed: int = 0,
    below: float = 0.0,
):  # fmt: skip
    """a N^-b + c, on top of an error that the labels of lower levels leave."""
    rng = np.random.default_rng(seed)
    errors = [math.hypot(below, a * n**-b + c) * math.exp(noise * rng.normal()) for n in sizes]
    return Curve(level, "iid/energy", "m", tuple(Point(n, e, 3, 0.02) for n, e in zip(sizes, errors, strict=True)))


def cost(level: str, mean: float) -> CostModel:
    return CostModel(level, "atoms", 2.0, 1.0, 0.1, 50, 3, 12, mean, 2 * mean)


def levels(curves: dict[str, Curve], seconds: dict[str, float]):
    return levels_of(list(curves), {name: cost(name, s) for name, s in seconds.items()}, curves)


def test_a_law_without_noise_is_found():
    fitted = posterior(curve("pbe", 300, 0.6, 5.0))
    for n in (800, 1600):
        middle, low, high = fitted.interval(n)
        assert middle == pytest.approx(300 * n**-0.6 + 5, rel=0.06)
        assert low < 300 * n**-0.6 + 5 < high
    assert high / low < 1.7


def test_intervals_cover_what_they_say():
    """60 curves with exponents and floors of their own, 6 % noise, four sizes; the error at four times the last."""
    rng = np.random.default_rng(5)
    inside = 0
    for seed in range(60):
        b, floor = float(np.clip(rng.normal(0.45, 0.2), 0.1, 1.0)), float(rng.uniform(0, 8))
        known = curve("pbe", 200, b, floor, (50, 100, 200, 400), 0.06, seed)
        truth = (200 * 1600**-b + floor) * math.exp(0.06 * rng.normal())
        _, low, high = posterior(known).interval(1600)
        inside += low <= truth <= high
    assert 49 <= inside <= 60  # 90 % of 60 is 54; 49 is two standard deviations below


def test_an_outcome_narrows_the_interval():
    known = curve("pbe", 200, 0.5, 3.0, (25, 50, 100))
    before = posterior(known).interval(400)
    after = posterior(known.with_outcome(200, 200 * 200**-0.5 + 3.0)).interval(400)
    assert after[2] / after[1] < before[2] / before[1]
    with pytest.raises(InputError, match="the curve has 100 already"):
        known.with_outcome(100, 9.0)


def test_spends_are_in_the_proportion_that_is_stationary():
    """Of curves without floors spend_L / spend_H = b_L e_L² / (b_H e_H²) at the optimum, for labels bought anew."""
    curves = {"low": curve("low", 400, 0.5, 0.0), "high": curve("high", 90, 0.5, 0.0, below=20)}
    chosen = levels(curves, {"low": 1.0, "high": 30.0})
    plan = propose(chosen, 60_000)
    low, high = plan.shares
    grid = np.geomspace(1, 6_000, 4_000)  # the truth, searched finely: e² of the two laws on the line of the budget
    n_high = 400 + np.clip((60_000 - grid) / 30, 0, None)
    e2 = (400 * (400 + grid) ** -0.5) ** 2 + (90 * n_high**-0.5) ** 2
    best = float(np.sqrt(e2.min()))
    own = math.hypot(400 * (400 + low.buy) ** -0.5, 90 * (400 + high.buy) ** -0.5)
    assert own < 1.02 * best
    assert low.least <= low.buy <= low.most
    assert plan.error[1] < best < plan.error[2]
    now = math.hypot(20, 90 * 400**-0.5)
    assert plan.now[0] == pytest.approx(now, rel=0.05), "without new labels the error is the measured one"
    assert low.seconds + high.seconds + plan.unspent == pytest.approx(60_000)


def test_what_cheap_labels_brought_stays_when_the_plan_is_told_of_them():
    """Half of a purchase is made and told; what is expected of all of it stays, and is not counted twice."""
    curves = {"low": curve("low", 400, 0.5, 0.0), "high": curve("high", 90, 0.5, 0.0, below=20)}
    costs = {"low": cost("low", 1.0), "high": cost("high", 30.0)}
    before = levels_of(["low", "high"], costs, curves)
    expected = error_at(before, [2400, 0])[0]
    assert expected < 0.7 * error_at(before, [0, 0])[0]
    told = {"low": [(2800.0, 400 * 2800**-0.5)]}
    after = levels_of(["low", "high"], costs, curves, told)
    assert error_at(after, [0, 0])[0] == pytest.approx(expected, rel=0.1)
    truth = math.hypot(400 * 2800**-0.5, 90 * 800**-0.5)
    both = levels_of(["low", "high"], costs, curves, told | {"high": [(800.0, truth)]})
    assert error_at(both, [0, 0])[0] == pytest.approx(truth, rel=0.15)


def test_a_flat_level_gets_nothing_and_a_free_one_gets_all_it_may():
    curves = {
        "low": curve("low", 400, 0.6, 0.0),
        "flat": curve("flat", 1.0, 0.06, 20.0),
    }  # 11 meV/atom of the low level's own
    plan = propose(levels(curves, {"low": 1.0, "flat": 50.0}), 5_000)
    assert plan.shares[0].seconds > 0.9 * 5_000
    curves = {"cheap": curve("cheap", 400, 0.6, 0.0), "dear": curve("dear", 100, 0.6, 0.0, below=11)}
    plan = propose(levels(curves, {"cheap": 1e-3, "dear": 100.0}), 60_000)
    assert plan.shares[0].factor <= REFUSE
    assert any("cheap" in warning and "beyond 16 nothing" in warning for warning in plan.warnings)


def test_three_levels():
    below = {"gfn2": 0.0, "pbe": 20.0, "ccsdt": math.hypot(20, 6)}
    curves = {n: curve(n, a, 0.5, 0.0, below=below[n]) for n, a in (("gfn2", 400), ("pbe", 120), ("ccsdt", 60))}
    plan = propose(levels(curves, {"ccsdt": 60.0, "gfn2": 0.01, "pbe": 5.0}), 40_000)
    assert [share.level for share in plan.shares] == ["gfn2", "pbe", "ccsdt"]
    assert all(share.buy > 0 for share in plan.shares)
    assert plan.error[0] < plan.now[0]


def test_limits_of_a_plan():
    one = levels({"pbe": curve("pbe", 300, 0.6, 5.0)}, {"pbe": 10.0})
    assert not any("times" in w for w in propose(one, 10.0 * 400 * 2.9).warnings)
    (share,) = propose(one, 10.0 * 400 * 2.9).shares
    assert 0 < share.least < share.buy == share.most  # the last labels of all bring less than 5 %
    assert any("beyond 4 times" in w for w in propose(one, 10.0 * 400 * 3.5).warnings)
    with pytest.raises(InputError, match="more than 16 times the labels of every learning curve"):
        propose(one, 10.0 * 400 * 15.1)
    with pytest.raises(InputError, match=r"one label of the cheapest level costs 10 s"):
        propose(one, 9.0)
    with pytest.raises(InputError, match="expected a positive time"):
        propose(one, 0.0)
    with pytest.raises(InputError, match="level 'gfn2': no learning curve"):
        levels_of(["gfn2"], {"gfn2": cost("gfn2", 1.0)}, {"pbe": curve("pbe", 300, 0.6, 5.0)})


def test_reports_of_studies():
    found = read(IDLE, "iid/energy", "mffm")
    assert [point.n_labels for point in found.points] == [12, 50, 100, 228]
    assert found.points[0].error == pytest.approx(50.9, abs=0.1)
    assert found.unit == "meV/atom"
    assert read(IDLE.parent).panel == "iid/energy"
    for panel, method, message in (
        ("iid/stress", None, "no panel 'iid/stress'"), ("iid/energy", "nobody", "no method 'nobody'"),
        ("iid/energy", "idle", "idle has 2 numbers of labels"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            read(IDLE, panel, method)


def plan(folder: Path, *options: str, budget: str = "2h"):
    command = ["plan", "--budget", budget, "--levels", "pbe", "--costs", str(COSTS), "--out", str(folder / "plan.json")]
    return CliRunner().invoke(app, [*command, "--curve", f"pbe={IDLE}#mffm", *options])


def test_the_command_and_its_update(tmp_path: Path):
    done = plan(tmp_path)
    assert done.exit_code == 0, done.output
    first = json.loads((tmp_path / "plan.json").read_text())
    assert first["levels"]["pbe"]["buy"] == pytest.approx(7200 / first["costs"]["pbe"]["mean"], rel=0.01)
    assert first["error"]["low"] < first["error"]["median"] < first["error"]["high"] < first["error_now"]["high"]
    assert "Buy a third first" in done.output
    told = plan(tmp_path, "--outcome", "pbe=450:20.5", budget="80min")
    assert told.exit_code == 0, told.output
    assert "20.5 is inside" in " ".join(told.output.split())
    second = json.loads((tmp_path / "plan.json").read_text())
    assert second["curves"]["pbe"]["points"][-1]["n_labels"] == 450
    width = {k: v["error"]["high"] / v["error"]["low"] for k, v in (("first", first), ("second", second))}
    assert width["second"] < width["first"]
    bad = plan(tmp_path, "--outcome", "pbe=450:99")
    assert "99 is above" in " ".join(bad.output.split())


@pytest.mark.parametrize(
    ("options", "budget", "message"),
    [
        ([], "0h", "--budget 0: expected a positive time"),
        ([], "24", "expected a CPU time with its unit"),
        ([], "1s", "one label of the cheapest level costs"),
        ([], "99d", "more than 16 times"),
        (["--levels", "pbe,ccsdt"], "2h", "no costs of level 'ccsdt'"),
        (["--levels", "pbe,gfn2"], "2h", "level 'gfn2': no learning curve"),
        (["--curve", f"gfn2={IDLE}"], "2h", "a study of labels of 'pbe'"),
        (["--outcome", "pbe=300"], "2h", "expected LEVEL=LABELS:ERROR"),
        (["--curve", "pbe"], "2h", "expected LEVEL=REPORT.json"),
        (["--curve", f"pbe={COSTS}"], "2h", "no JSON"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, options: list[str], budget: str, message: str):
    found = plan(tmp_path, *options, budget=budget)
    assert isinstance(found.exception, InputError), found.output
    assert message in str(found.exception)
    assert not (tmp_path / "plan.json").exists()
