"""What a recipe refuses, with the reason."""

import pytest

from mffm.config.base import validate
from mffm.config.model import DensityConfig, ModelConfig
from mffm.config.recipe import DeepSpeedSection, OptimConfig, Recipe
from mffm.errors import InputError


@pytest.mark.parametrize(
    ("stage", "offload", "reason"),
    [
        (0, "optimizer", "needs zero_stage 1, 2 or 3"),
        (2, "optimizer_and_parameters", "needs zero_stage 3: at 2 every rank holds all weights"),
    ],
)
def test_offloading_that_deepspeed_does_not_do(stage: int, offload: str, reason: str):
    with pytest.raises(InputError, match=reason):
        validate(DeepSpeedSection, {"zero_stage": stage, "offload": offload}, "test")


def test_offloading_that_it_does():
    for stage, offload in ((0, "none"), (1, "optimizer"), (3, "optimizer"), (3, "optimizer_and_parameters")):
        validate(DeepSpeedSection, {"zero_stage": stage, "offload": offload}, "test")


def test_soap_is_refused_where_weights_are_sharded():
    recipe = {
        "name": "x",
        "data": {"store": "s", "plan": {"pools": [{"fidelity": "a"}], "edge_budget": 1}},
        "train": {"steps": 1},
        "optim": {"kind": "soap"},
    }
    validate(Recipe, recipe, "test")
    for stage in (1, 2, 3):
        with pytest.raises(InputError, match=rf"optim.kind: soap needs deepspeed.zero_stage: 0 \(now {stage}\)"):
            validate(Recipe, {**recipe, "deepspeed": {"zero_stage": stage}}, "test")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"precondition_every": 5}, "precondition_every: 5 is of kind: soap"),
        ({"max_precondition_dim": 64}, "max_precondition_dim: 64 is of kind: soap"),
    ],
)
def test_key_of_another_optimiser_is_refused(section: dict, message: str):
    with pytest.raises(InputError, match=message):
        validate(OptimConfig, section, "test")


@pytest.mark.parametrize(
    ("pools", "model", "loss", "reason"),
    [
        ({"a": ["energy"]}, {}, {}, "a head for forces, but nothing trains it"),
        ({"a": ["energy", "forces"]}, {}, {"forces": {"weight": 0}}, r"and loss\.forces a weight"),
        (
            {"a": ["energy", "forces"], "b": ["energy"]},
            {"heads": {"kind": "independent"}},
            {},
            "a head for forces of each fidelity, but nothing trains it at 'b'",
        ),
        ({"a": ["energy", "forces"]}, {"direct": {"stress": True}}, {}, "a head for stress, but nothing trains it"),
        ({"a": ["energy", "forces", "stress"]}, {}, {}, r"set model\.direct\.stress: true, or take"),
        ({"a": ["energy", "forces"], "b": ["energy"]}, {}, {}, None),
        ({"a": ["energy", "forces", "stress"]}, {"direct": {"stress": True}}, {}, None),
    ],
)
def test_direct_heads_need_labels(pools: dict, model: dict, loss: dict, reason: str | None):
    content = {
        "name": "test",
        "data": {
            "store": "store",
            "plan": {"pools": [{"fidelity": f, "properties": p} for f, p in pools.items()], "edge_budget": 10},
        },
        "model": {"forces": "direct", **model},
        "loss": loss,
        "train": {"steps": 1},
    }
    if reason is None:
        validate(Recipe, content, "test")
        return
    with pytest.raises(InputError, match=reason):
        validate(Recipe, content, "test")


def test_named_size_is_resolved_and_stays_what_it_says():
    """What a run writes down reads as the same; a name never stands beside the values of another."""
    small = validate(DensityConfig, {"size": "S"}, "test")
    assert (small.size, small.channels, small.edge_channels, small.layers) == ("S", 96, 32, 2)
    wide = validate(DensityConfig, {"size": "S", "channels": 128}, "test")
    assert (wide.size, wide.channels, wide.edge_channels) == (None, 128, 32)
    for config in (small, wide):
        assert validate(DensityConfig, config.model_dump(), "test") == config
    with pytest.raises(InputError, match=r"size M names nothing: channels: 96, .* are given"):
        validate(DensityConfig, {**small.model_dump(), "size": "M"}, "test")
    with pytest.raises(InputError, match="size: unknown key"):
        validate(ModelConfig, {"backbone": {"kind": "escn", "size": "S"}}, "test")


def test_unknown_key_of_a_backbone_lists_that_ones_keys():
    recipe = {
        "name": "x",
        "data": {"store": "s", "plan": {"pools": [{"fidelity": "a"}], "edge_budget": 1}},
        "train": {"steps": 1},
        "model": {"backbone": {"kind": "escn", "size": "S"}},
    }
    with pytest.raises(InputError, match=r"model\.backbone\.escn\.size: unknown key; .*sphere_channels"):
        validate(Recipe, recipe, "test")


def test_a_pool_that_no_step_draws_from_is_refused(tiny_recipe, tmp_path):
    recipe = tiny_recipe(tmp_path / "store", tmp_path / "run")
    weights = recipe["data"]["plan"]["pools"]
    weights[0]["weight"], weights[1]["weight"] = 1.0, {0: 0, 5: 1}
    validate(Recipe, recipe, "recipe")  # the last of 6 steps
    weights[1]["weight"] = {0: 0, 6: 1}
    with pytest.raises(InputError, match=r"data\.plan\.pools\.1: 'pbe' has no weight above 0 in any of the 6 steps"):
        validate(Recipe, recipe, "recipe")
    for wrong in (float("inf"), float("nan"), {0: float("nan")}, -1.0):
        weights[1]["weight"] = wrong
        with pytest.raises(InputError, match="weight"):
            validate(Recipe, recipe, "recipe")
