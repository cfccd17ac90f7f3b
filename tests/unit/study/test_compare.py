"""Not worse than the others: ratios and bounds of errors made by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mffm.config.base import validate
from mffm.config.study import StudyConfig
from mffm.data.store import Store
from mffm.evaluate.parity import FrameErrors
from mffm.study.compare import LEVEL, _draws, not_worse, paired, ratio_and_bound, units_of
from mffm.study.grid import Cell, Grid
from mffm.study.run import Judged

from .conftest import content

RNG = np.random.default_rng(0)
DIFFICULTY = np.exp(RNG.normal(size=100))


def noisy(rng: np.random.Generator, n_seeds: int, n_frames: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Return sums of two methods that are equally good but for luck with seeds and frames."""
    shape = (n_seeds, n_frames)
    frames = np.exp(rng.normal(size=n_frames))
    luck = np.exp(0.1 * rng.normal(size=(n_seeds, 1)))
    return frames * luck * np.exp(0.3 * rng.normal(size=shape)), frames * np.exp(0.3 * rng.normal(size=shape))


def test_a_known_ratio_without_noise_is_its_own_bound():
    for n_seeds in (1, 3):
        other = np.tile(DIFFICULTY, (n_seeds, 1))
        assert ratio_and_bound(0.5 * other, other) == pytest.approx((0.5, 0.5))
    assert ratio_and_bound(np.zeros((2, 100)), np.zeros((2, 100))) == pytest.approx((1, 1))


def test_the_ratio_is_a_geometric_mean_over_seeds_and_the_worst_of_three_bounds_it():
    other = np.tile(DIFFICULTY, (3, 1))
    ratio, upper = ratio_and_bound(other * np.array([[0.8], [1.0], [1.25]]), other)
    assert ratio == pytest.approx(1.0)
    assert upper == pytest.approx(1.25), "two draws of three seeds are both the worst in 1 of 9"


def test_pairing_makes_the_bound_narrow():
    ours, theirs = noisy(np.random.default_rng(1), 3, 100)
    _, narrow = ratio_and_bound(ours, theirs)
    ratio, wide = ratio_and_bound(ours, np.random.default_rng(2).permuted(theirs, axis=1))
    assert ratio < narrow < wide
    assert np.log(wide / ratio) > 1.5 * np.log(narrow / ratio)


def test_bounds_are_the_same_each_time():
    ours, theirs = noisy(np.random.default_rng(3), 3)
    first = ratio_and_bound(ours, theirs)
    _draws.cache_clear()
    assert ratio_and_bound(ours, theirs) == first


@pytest.mark.parametrize("n_seeds", [2, 3])
def test_the_bound_holds_about_as_often_as_it_says(n_seeds: int):
    rng = np.random.default_rng(4)
    holds = np.mean([ratio_and_bound(*noisy(rng, n_seeds))[1] >= 1 for _ in range(300)])
    assert LEVEL - 0.06 < holds < 0.98


def test_one_seed_resamples_frames_alone():
    ours, theirs = noisy(np.random.default_rng(5), 1)
    ratio, upper = ratio_and_bound(ours, theirs)
    draws = _draws(60)
    by_hand = np.quantile((draws @ ours[0]) / (draws @ theirs[0]), LEVEL)
    assert ratio == pytest.approx(ours.sum() / theirs.sum())
    assert upper == pytest.approx(by_hand)
    assert set(draws.sum(1)) == {59}


def test_frames_that_one_lacks_are_left_out_of_both():
    whole = FrameErrors(np.array([1, 3, 5, 8]), np.array([1.0, 2.0, 3.0, 4.0]), np.ones(4, int))
    part = FrameErrors(np.array([3, 8, 9]), np.array([20.0, 40.0, 50.0]), np.ones(3, int))
    sums, rows = paired([whole, part])
    assert rows.tolist() == [3, 8]
    assert sums.tolist() == [[2, 4], [20, 40]]


def test_units_are_groups_where_there_are_eight():
    names = ["", *"abcdefgh"]
    units, unit = units_of(np.array([1, 1, *range(1, 9)]), names)
    assert (unit, len(set(units)), units[0]) == ("groups", 8, units[1])
    units, unit = units_of(np.array([1, 1, *range(1, 8)]), names)
    assert (unit, units.tolist()) == ("frames", list(range(9)))
    assert units_of(np.zeros(20, int), names)[1] == "frames", "frames without a group are not one"
    assert len(set(units_of(np.array([0] * 10 + [1, 1]), names)[0])) == 11


@pytest.fixture
def compared(molecule_store: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that compares delta with the others, from the factor of each cell's errors to PBE alone's."""
    store = Store(molecule_store)
    rows = store.rows(split="test", fidelity="pbe")
    difficulty = 10 * np.exp(np.random.default_rng(6).normal(size=len(rows)))

    def compare(factors: dict[tuple[str, int, int], float], absent: int = 0, **changes: Any) -> dict[str, Any]:
        study = validate(StudyConfig, content(candidate="delta", **changes), "test")
        cells = [
            Cell(m, n, s, "", "pbe", "pbe", rows, ("",)) for m in study.methods
            for n in study.methods[m].n_high or study.n_high for s in study.seeds
        ]  # fmt: skip
        judged = []
        for cell in cells[: len(cells) - absent]:
            factor = factors.get((cell.method, cell.n_high, cell.seed), 1.0)
            frames = FrameErrors(rows, factor * difficulty, np.ones(len(rows), int))
            both = {("iid", "energy"): frames, ("iid", "forces"): frames}
            judged.append(Judged(cell, {}, {}, {}, 0.0, 0.0, 4, "", both, []))
        found = not_worse(Grid(study, store, {}, cells), judged)
        assert found is not None
        return found

    return compare


def test_a_verdict_names_the_largest_bound(compared: Callable[..., dict[str, Any]]):
    found = compared({})
    assert [line.split(",")[0] for line in found["verdict"]] == [
        f"Within {limit}: delta head is not worse than any of the 3 methods compared; all 12 bounds hold"
        for limit in (1.05, 1.15)
    ]
    assert found["missing"] == []
    assert list(found["panels"]["iid/forces"]) == ["hf_only", "fine_tune", "low_only"]
    worse = {("fine_tune", 16, seed): 0.9 for seed in (0, 1)}
    one, other = compared(worse)["verdict"]
    assert one == (
        "Within 1.05: not shown; 2 of 12 bounds are above it, the largest is 1.11 (fine_tune, iid forces, 16 frames)."
    )
    assert other.startswith("Within 1.15: delta head is not worse")


def test_what_is_missing_is_named(compared: Callable[..., dict[str, Any]]):
    found = compared({}, absent=1)
    assert found["missing"] == ["low_only at 16 frames"], "one of two seeds"
    assert found["panels"]["iid/energy"]["low_only"][1]["seeds"] == [0]
    assert "Of what is finished only." in found["verdict"][0]
    assert "no verdict yet" in compared({}, absent=16)["verdict"][0]


def test_methods_with_a_calculation_or_other_numbers_are_left_out(compared: Callable[..., dict[str, Any]]):
    methods = content()["methods"]
    methods["exact"] = {"needs_lf_at_inference": True}
    methods["most"] = {"n_high": [30]}
    found = compared({}, methods=methods)
    assert "exact" not in found["panels"]["iid/energy"]
    assert found["without_common_number"] == ["most"]
    assert found["missing"] == []
