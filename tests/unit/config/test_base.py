import pytest
import yaml

from mffm.config.base import apply_overrides, dump, load, origins, validate
from mffm.config.cluster import ClusterConfig
from mffm.config.data import DataConfig
from mffm.config.recipe import Recipe
from mffm.errors import InputError

MINIMAL = {
    "name": "a",
    "data": {"store": "s", "plan": {"pools": [{"fidelity": "pbe"}], "edge_budget": 100}},
    "train": {"steps": 10},
}


def recipe(**changes):
    return validate(Recipe, {**MINIMAL, **changes}, "recipe.yaml")


def test_unknown_key_names_it_and_its_neighbours():
    with pytest.raises(InputError, match=r"optim.learning_rate: unknown key; known keys here: .*\blr\b"):
        recipe(optim={"learning_rate": 1.0})


def test_every_fault_is_listed_at_once():
    with pytest.raises(InputError) as caught:
        recipe(optim={"lr": -1}, train={"steps": 0})
    assert "2 fault(s)" in str(caught.value)
    assert "optim.lr" in str(caught.value)
    assert "train.steps" in str(caught.value)


def test_missing_key_is_named():
    with pytest.raises(InputError, match="train: required"):
        validate(Recipe, {k: v for k, v in MINIMAL.items() if k != "train"}, "recipe.yaml")


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": {"weights": {"scan": {"energy": 1}}}},
        {"references": {"given": {"scan": {"H": 1.0}}}},
        {"references": {"anchor": "scan"}},
        {"model": {"heads": {"kind": "delta", "base": "scan"}}},
        {"model": {"heads": {"kind": "independent", "init_from": {"pbe": "scan"}}}},
    ],
)
def test_fidelity_that_no_pool_has(changes):
    with pytest.raises(InputError, match=r"'scan', which no pool has; pools have: pbe"):
        recipe(**changes)


def test_overrides_reach_into_lists_and_keep_types():
    content = apply_overrides(
        MINIMAL, ["train.steps=25", "data.plan.pools.0.weight=2.5", "optim.betas=[0.8, 0.9]", "start_from=null"]
    )
    loaded = validate(Recipe, content, "x")
    assert (loaded.train.steps, loaded.data.plan.pools[0].weight, loaded.optim.betas) == (25, 2.5, (0.8, 0.9))
    assert MINIMAL["train"]["steps"] == 10


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "expected key.key=value"),
        ("name.x=1", "not a group of keys"),
        ("data.plan.pools.7.weight=1", "not an index into a list of 1"),
    ],
)
def test_bad_override(override, message):
    with pytest.raises(InputError, match=message):
        apply_overrides(MINIMAL, [override])


def test_files(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load(Recipe, tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1,")
    with pytest.raises(InputError, match="not valid YAML"):
        load(Recipe, tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(InputError, match="expected a mapping"):
        load(Recipe, tmp_path / "list.yaml")


def test_resolved_config_round_trips():
    loaded = recipe(loss={"weights": {"pbe": {"forces": 2.0}}})
    assert validate(Recipe, yaml.safe_load(dump(loaded)), "x") == loaded


def test_data_config_checks_fidelities_and_fractions():
    base = {"store": "s", "fidelities": {"pbe": {"level_of_theory": "PBE"}}}
    source = {"name": "a", "path": "x", "licence": "MIT", "labels": {"scan": {"energy": "e"}}}
    with pytest.raises(InputError, match="'scan', which is not declared"):
        validate(DataConfig, {**base, "sources": [source]}, "x")
    source["labels"] = {"pbe": {"energy": "e"}}
    with pytest.raises(InputError, match="sum to 1"):
        validate(DataConfig, {**base, "sources": [source], "splits": {"fractions": {"train": 0.5}}}, "x")


def test_every_value_says_where_it_came_from():
    overrides = ["optim.lr=0.5"]
    loaded = validate(Recipe, apply_overrides(MINIMAL, overrides), "x")
    rows = {name: (value, origin) for name, value, origin in origins(loaded, MINIMAL, overrides)}
    assert rows["optim.lr"] == (0.5, "command line")
    assert rows["train.steps"] == (10, "file")
    assert rows["data.plan.pools.0.fidelity"] == ("pbe", "file")
    assert rows["data.plan.pools.0.split"] == ("train", "default")
    assert rows["optim.betas"] == (None, "default")


def test_schema_of_every_yaml_is_json_schema():
    for schema in (Recipe, DataConfig, ClusterConfig):
        described = schema.model_json_schema()
        assert described["additionalProperties"] is False
        assert described["properties"]
