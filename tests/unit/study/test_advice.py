"""What a study advises, and what its page says, from errors made by hand."""

import math
from typing import Any

import pytest

from mffm.config.base import validate
from mffm.config.study import StudyConfig
from mffm.study import curves
from mffm.study.advice import advice, rank
from mffm.study.grid import Grid
from mffm.study.page import table
from mffm.study.report import _factors

from .conftest import content

Errors = dict[tuple[str, str], dict[str, dict[int, dict[int, float]]]]


def grid(**changes: Any) -> Grid:
    study = validate(StudyConfig, content(**changes), "test")
    return Grid(study, None, {}, [])  # type: ignore[arg-type]


def errors(**methods: dict[int, list[float]]) -> Errors:
    """Return two panels, the second with twice the errors of the first; a value per seed 0, 1, ..."""
    return {
        ("iid", prop): {
            name: {n: {s: scale * v for s, v in enumerate(values)} for n, values in labels.items()}
            for name, labels in methods.items()
        }
        for prop, scale in (("energy", 1.0), ("forces", 2.0))
    }


HF = {8: [100.0, 110.0], 16: [50.0, 55.0]}


def test_names_the_best_and_what_is_as_good_within_the_seeds():
    found = errors(hf_only=HF, delta={8: [20.0, 22.0], 16: [10.0, 11.0]}, fine_tune={8: [19.9, 30.0], 16: [20.0, 22.0]})
    lines = advice(grid(), found)
    assert lines[0].startswith("Use delta head: ")
    assert "With 8 frames with pbe labels: delta head (iid energy 21 meV/atom, iid forces 42 meV/Å)" in lines[1]
    assert "0.20 times those of PBE alone" in lines[1]
    assert "As good within the spread: fine_tune." in lines[1], "fine_tune is better with one of two seeds"
    assert "As good" not in lines[2]
    assert (
        "From 8 to 16 frames the errors of delta head change by a factor 0.50: more pbe labels still pay." in lines[3]
    )
    assert len(lines) == 4


def test_no_method_is_named_for_all_numbers_where_none_is():
    found = errors(hf_only={8: [90.0, 90.0], 16: [10.0, 10.0]}, delta={8: [20.0, 20.0], 16: [19.0, 19.0]})
    lines = advice(grid(), found)
    assert not any(line.startswith("Use ") for line in lines)
    assert "delta head (" in lines[0]
    assert "PBE alone (" in lines[1]


def test_more_labels_that_hardly_help_are_said_to():
    found = errors(hf_only=HF, delta={8: [20.0, 20.0], 16: [19.0, 19.5]})
    assert "labels hardly help" in advice(grid(), found)[-1]


def test_methods_with_a_calculation_at_inference_are_ranked_apart():
    methods = content()["methods"]
    methods["exact"] = {"title": "exact delta", "needs_lf_at_inference": True}
    found = errors(hf_only=HF, delta={8: [20.0, 22.0]}, exact={8: [2.0, 2.2]})
    lines = advice(grid(methods=methods), found)
    assert "delta head (" in lines[0]
    assert "exact delta" not in lines[0]
    assert (
        "may include a low-fidelity calculation, with 8 frames: exact delta, 0.10 times the errors of delta head"
        in (lines[1])
    )


def test_a_method_without_all_panels_is_not_ranked():
    found = errors(hf_only=HF, delta={8: [1.0, 1.0]})
    del found["iid", "forces"]["delta"]
    assert [name for name, _, _ in rank(found, ["hf_only", "delta"], 8)] == ["hf_only"]
    assert rank(found, ["hf_only", "delta"], 12) == []
    assert "no advice yet" in advice(grid(), errors())[0]


def test_factors_say_their_bounds():
    found = _factors(grid(), errors(hf_only=HF, delta={8: [20.0, 22.0], 16: [75.0, 82.5]})["iid", "energy"])
    (low, high) = found["hf_only"]["delta"]["points"]
    assert (low["k"], low["bound"]) == (2.0, ">"), "16 labels of the baseline are not enough: more than 16 / 8"
    assert set(low["seeds"]) == {0, 1}
    labels = 8 * 2 ** (math.log(100 / 75) / math.log(2))
    assert high["bound"] == "="
    assert high["k"] == pytest.approx(labels / 16)
    assert found["hf_only"]["delta"]["at_best"] == {"k": 2.0, "bound": ">="}
    assert "hf_only" not in found["hf_only"]


def test_at_best_does_not_reward_a_baseline_that_more_labels_harm():
    assert curves.factor_at_best([(8, 10.0), (16, 20.0)], [(8, 12.0), (16, 10.0)]).value == pytest.approx(0.5)


def test_table():
    assert table(["a", "b"], [["1", "2"]]) == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]
