"""Labels needed at equal error, on curves made by hand."""

import math

import pytest

from mffm.study.curves import Bounded, factor, factor_at_best, factors_of_seeds, labels_needed, mean_curve

POWER = [(10.0, 100.0), (100.0, 10.0), (1000.0, 1.0)]  # error = 1000 / labels


def test_interpolates_in_logarithms():
    needed = labels_needed(POWER, math.sqrt(1000.0))
    assert needed.bound == "="
    assert needed.value == pytest.approx(math.sqrt(1000.0))  # a line in labels and error would give 68.4
    assert labels_needed(POWER, 10.0).value == pytest.approx(100.0)


def test_bounds_where_the_curve_does_not_reach():
    assert labels_needed(POWER, 0.9) == Bounded(1000.0, ">")
    assert labels_needed(POWER, 101.0) == Bounded(10.0, "<=")
    assert labels_needed(POWER, 100.0) == Bounded(10.0, "=")
    assert labels_needed(POWER, 1.0).bound == "="
    assert labels_needed([(50.0, 3.0)], 2.0) == Bounded(50.0, ">")


def test_a_curve_that_goes_up_and_down_counts_from_its_first_crossing():
    wavy = [(10.0, 100.0), (100.0, 10.0), (1000.0, 50.0), (10000.0, 5.0)]
    needed = labels_needed(wavy, 30.0)
    assert needed.bound == "="
    assert 10 < needed.value < 100
    assert labels_needed(wavy, 7.0).value > 1000
    rising = [(10.0, 5.0), (100.0, 8.0)]
    assert labels_needed(rising, 4.0) == Bounded(100.0, ">")
    assert labels_needed(rising, 6.0) == Bounded(10.0, "<=")


def test_a_flat_piece_and_an_exact_zero_do_not_divide_by_zero():
    assert labels_needed([(10.0, 5.0), (100.0, 5.0), (1000.0, 1.0)], 5.0) == Bounded(10.0, "=")
    assert labels_needed([(10.0, 5.0), (100.0, 0.0)], 0.0).value == pytest.approx(100.0)


def test_factor_and_its_bounds():
    k = factor(POWER, 20.0, 10.0)
    assert k.value == pytest.approx(5.0)
    assert factor(POWER, 20.0, 0.5) == Bounded(50.0, ">")
    assert factor(POWER, 20.0, 200.0) == Bounded(0.5, "<=")


def test_factor_at_the_best_of_the_baseline():
    assert factor_at_best(POWER, [(10.0, 4.0), (40.0, 1.0)]).value == pytest.approx(25.0)
    assert factor_at_best(POWER, [(10.0, 0.5), (40.0, 0.2)]) == Bounded(100.0, ">=")
    assert factor_at_best(POWER, [(10.0, 9.0), (40.0, 3.0)]) == Bounded(25.0, "<")


def test_seeds_are_compared_with_their_own_curve():
    baseline = {10: {0: 100.0, 1: 200.0}, 100: {0: 10.0, 1: 20.0}}
    found = factors_of_seeds(baseline, {0: 10.0, 1: 200.0, 2: 1.0}, 10)
    assert found[0].value == pytest.approx(10.0)
    assert found[1] == Bounded(1.0, "=")
    assert 2 not in found, "the baseline has no such seed"
    assert mean_curve(baseline)[0] == (10.0, pytest.approx(math.sqrt(20000.0)))


def test_text_says_the_bound():
    assert [Bounded(3.44).text(), Bounded(8.0, ">").text(), Bounded(0.5, "<=").text()] == ["3.4", "> 8", "≤ 0.5"]
