"""A study YAML becomes ordinary recipes; mistakes are one clear error."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mffm.config.study import load_study
from mffm.data.records import Geometry
from mffm.data.store import Store
from mffm.errors import InputError
from mffm.study.gate import Gate, _require, compare, gates
from mffm.study.grid import Grid, expand

from .conftest import DELTAS, HIGH, content


def grid_of(path: Path, *overrides: str) -> Grid:
    return expand(load_study(path, overrides), path, path.parent / "out")


def test_every_cell_is_a_recipe_with_its_labels_and_seed(make_study: Callable[..., Path]):
    grid = grid_of(make_study())
    assert len(grid.cells) == 4 * 2 * 2
    assert len(grid.trainings) == 2 + 3 * 2 * 2, "a stage once a seed, no training for the refit"
    recipe = grid.trainings["methods/delta/n16-s1"].recipe
    low, high = recipe.data.plan.pools
    assert (high.max_frames, high.seed, low.max_frames, low.seed) == (16, 1, None, 0)
    assert (recipe.seed, recipe.train.threads, recipe.log.group) == (1, 1, "tiny")
    assert recipe.data.fingerprint == grid.store.fingerprint
    assert recipe.model.heads.kind == "delta"
    assert grid.trainings["methods/hf_only/n8-s0"].recipe.fidelities == ["pbe"]


def test_stages_are_shared_and_counted(make_study: Callable[..., Path]):
    grid = grid_of(make_study())
    for n in (8, 16):
        training = grid.trainings[f"methods/fine_tune/n{n}-s1"]
        assert training.after == "stages/low/s1"
        assert training.recipe.start_from == grid.trainings["stages/low/s1"].recipe.run
    cells = {c.name: c for c in grid.cells}
    assert grid.steps(cells["fine_tune/n8-s0"]) == 2 + 2
    assert grid.steps(cells["delta/n8-s0"]) == 4
    refit = cells["low_only/n8-s1"]
    assert (refit.training, refit.asked, refit.fidelity) == ("stages/low/s1", "gfn2", "pbe")
    assert refit.is_refit
    assert list(grid.trainings)[:2] == ["stages/low/s0", "stages/low/s1"]


def test_methods_draw_the_same_high_frames_and_more_contain_fewer(make_study: Callable[..., Path]):
    cells = {c.name: c for c in grid_of(make_study()).cells}
    for method in ("delta", "fine_tune", "low_only"):
        for point in ("n8-s0", "n16-s0", "n8-s1"):
            assert np.array_equal(cells[f"{method}/{point}"].high_rows, cells[f"hf_only/{point}"].high_rows)
    assert set(cells["delta/n8-s0"].high_rows) < set(cells["delta/n16-s0"].high_rows)
    assert set(cells["delta/n8-s0"].high_rows) != set(cells["delta/n8-s1"].high_rows)


def test_all_labels_and_a_method_with_numbers_of_its_own(make_study: Callable[..., Path]):
    methods = content()["methods"]
    methods["hf_only"]["n_high"] = ["all", 8]
    grid = grid_of(make_study(methods=methods))
    there = int((grid.store.has("pbe", "energy") & (grid.store.split == grid.store.split_index("train"))).sum())
    found = sorted({c.n_high for c in grid.cells if c.method == "hf_only"})
    assert found == [8, there]
    assert grid.trainings[f"methods/hf_only/n{there}-s0"].recipe.data.plan.pools[0].max_frames == there


def test_a_method_on_labels_of_its_own(make_study: Callable[..., Path]):
    own = {"data.plan.pools": [{"fidelity": "ccsdt", "properties": ["energy"]}], "model.heads": {"kind": "shared"}}
    method = {"fidelity": "ccsdt", "needs_lf_at_inference": True, "changes": own}
    grid = grid_of(make_study(methods={**content()["methods"], "exact": method}, properties=["energy"]))
    cells = {c.name: c for c in grid.cells}
    assert (cells["exact/n8-s1"].fidelity, cells["exact/n8-s1"].is_refit) == ("ccsdt", False)
    assert np.array_equal(cells["exact/n8-s1"].high_rows, cells["hf_only/n8-s1"].high_rows)
    (pool,) = grid.trainings["methods/exact/n8-s1"].recipe.data.plan.pools
    assert (pool.fidelity, pool.max_frames, pool.seed) == ("ccsdt", 8, 1)
    with pytest.raises(InputError, match=r"methods.exact.fidelity: iid split 'test' .* has no ccsdt forces labels"):
        grid_of(make_study(methods={**content()["methods"], "exact": method}))


def test_validation_frames_in_proportion_to_the_labels(make_study: Callable[..., Path]):
    trainings = grid_of(make_study(validation_share=0.3)).trainings
    found = {n: trainings[f"methods/delta/n{n}-s0"].recipe.data.validation_max_frames for n in (8, 16)}
    assert found == {8: 4, 16: 5}
    assert trainings["stages/low/s0"].recipe.data.validation_max_frames == 8, "a stage keeps the recipe's"


def deltas(store: Path, **changes: Any) -> dict[str, Any]:
    """Return the changes of a study YAML to one with methods on stored differences."""
    return {"methods": {**content()["methods"], **DELTAS}, "changes": {"data.store": str(store)}, **changes}


def test_a_difference_added_to_a_stage_is_judged_on_the_high_labels(
    make_study: Callable[..., Path], difference_store: Path
):
    grid = grid_of(make_study(**deltas(difference_store)))
    cells = {c.name: c for c in grid.cells}
    cell = cells["delta_ml/n8-s1"]
    assert (cell.fidelity, cell.asked, cell.is_refit) == ("pbe", "pbe_minus_gfn2", False)
    assert cell.judged == ["methods/delta_ml/n8-s1", "stages/low/s1"]
    assert cells["delta_exact/n8-s1"].fidelity == "pbe_minus_gfn2"
    assert np.array_equal(cell.high_rows, cells["hf_only/n8-s1"].high_rows)
    assert grid.trainings[cell.training].after is None, "it does not start from the stage"
    assert grid.steps(cell) == 4 + 2
    assert [g.low for g in gates(grid)] == ["gfn2"], "a difference is no low fidelity"


def test_a_stage_that_is_started_from_and_added_counts_once(make_study: Callable[..., Path], difference_store: Path):
    both = {**DELTAS["delta_ml"], "start_from": "low"}
    both["changes"] = {**both["changes"], "model.init_from": {"pbe_minus_gfn2": "gfn2"}, "train.steps": 3}
    grid = grid_of(make_study(**deltas(difference_store, methods={**content()["methods"], "delta_ml": both})))
    cell = next(c for c in grid.cells if c.method == "delta_ml")
    assert [stage.name for stage in grid.stages_of(cell)] == ["stages/low/s0"]
    assert grid.steps(cell) == 3 + 2


def test_a_layer_of_another_fidelity_changes_no_recipe(make_study: Callable[..., Path], difference_store: Path):
    before = grid_of(make_study())
    after = grid_of(make_study(**deltas(difference_store)))
    assert before.store.fingerprint != after.store.fingerprint
    for name, training in before.trainings.items():
        again = after.trainings[name].recipe
        assert again.data.layers == ["molecules"], name
        assert again.data.fingerprint == training.recipe.data.fingerprint == before.store.fingerprint
    assert after.trainings["methods/delta_ml/n8-s0"].recipe.data.layers == ["difference"]


def test_sums_that_are_none_are_refused(make_study: Callable[..., Path], difference_store: Path):
    other = {**DELTAS["delta_ml"], "fidelity": "ccsdt"}
    other["changes"] = {**other["changes"], "data.plan.pools": [{"fidelity": "ccsdt", "properties": ["energy"]}]}
    methods = {**content()["methods"], "delta_ml": other}
    with pytest.raises(InputError, match=r"methods.delta_ml.plus: energies of ccsdt and of gfn2.*do not add up to pbe"):
        grid_of(make_study(**deltas(difference_store, methods=methods)))
    with pytest.raises(InputError, match=r"'pbe_minus_gfn2' is not in the store.*`mffm difference`"):
        grid_of(make_study(methods={**content()["methods"], **DELTAS}))
    pools = [{"fidelity": name, "properties": ["energy"]} for name in ("gfn2", "ccsdt")]
    stages = {"low": {"changes": {**content()["stages"]["low"]["changes"], "data.plan.pools": pools}}}
    methods = {"hf_only": content()["methods"]["hf_only"], **DELTAS}
    with pytest.raises(InputError, match=r"methods.delta_ml.plus: stage 'low' trains gfn2, ccsdt; a stage of one"):
        grid_of(make_study(**deltas(difference_store, methods=methods, stages=stages, baselines=["hf_only"])))


def test_methods_keep_the_order_of_the_file(make_study: Callable[..., Path]):
    assert list(load_study(make_study(), ["methods.late.title=x"]).methods)[:2] == ["hf_only", "delta"]


TUNED = {"tune": {"optim.lr": [0.001, 0.004], "model.heads.hidden": [[8], [4]]}}


def test_every_cell_with_a_training_has_the_same_number_of_trials(make_study: Callable[..., Path]):
    methods = content()["methods"]
    methods["delta"]["tune"] = {"optim.lr": [0.001, 0.002, 0.003, 0.005]}
    grid = grid_of(make_study(methods=methods, **TUNED))
    assert len(grid.trainings) == 2 + 3 * 2 * 2 * 4, "stages are not tuned"
    cells = {c.name: c for c in grid.cells}
    cell = cells["hf_only/n8-s1"]
    assert cell.trials == tuple(f"methods/hf_only/n8-s1-t{k}" for k in range(4))
    recipes = [grid.trainings[name].recipe for name in cell.trials]
    assert [(r.model.heads.hidden, r.optim.lr) for r in recipes] == [
        ([8], 0.001), ([8], 0.004), ([4], 0.001), ([4], 0.004)
    ]  # fmt: skip
    assert recipes[3].name == "tiny-hf_only-n8-s1-t3"
    assert [grid.trainings[n].recipe.optim.lr for n in cells["delta/n8-s0"].trials] == [0.001, 0.002, 0.003, 0.005]
    assert cells["low_only/n8-s0"].trials == ("stages/low/s0",)
    assert grid.trainings["methods/fine_tune/n8-s0-t1"].after == "stages/low/s0"


def test_steps_of_all_trials_are_told(make_study: Callable[..., Path]):
    grid = grid_of(make_study(tune={"train.steps": [4, 6]}, methods={"delta": METHODS["delta"]}, stages={}, baselines=[
        "delta"
    ]))  # fmt: skip
    assert grid.steps_of("delta") == [4, 6]


def without(name: str) -> dict[str, Any]:
    return {k: v for k, v in content()["methods"].items() if k != name}


METHODS = content()["methods"]
STAGES = content()["stages"]
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"labels": [1]}, "labels: unknown key"),
    "unknown baseline": ({"baselines": ["best"]}, "baselines: no method 'best'; methods: hf_only, delta"),
    "unknown stage": (
        {"methods": {**METHODS, "x": {"start_from": "middle"}}}, "no stage 'middle'; stages: low"
    ),
    "unused stage": ({"stages": {**STAGES, "spare": {}}}, "stages.spare: no method"),
    "numbers twice": ({"n_high": [8, 8]}, "n_high: 8 is given twice"),
    "too many labels": ({"n_high": [8, 5000]}, "5000 frames with pbe labels are asked for, the training split has"),
    "fidelity not in the store": ({"high": "b3lyp"}, "'b3lyp' is not in the store"),
    "split not in the store": ({"ood": "ood"}, "ood: .*no split 'ood'; splits: .*test"),
    "fidelity of a pool not in the store": (
        {"methods": {**METHODS, "x": {"changes": {
            "data.plan.pools": [{"fidelity": "gfn9"}, *HIGH], "model.heads": {"kind": "shared"}}}}},
        "methods/x/n8-s0: .*unknown fidelity 'gfn9'; known fidelities: .*gfn2",
    ),
    "pool without labels": (
        {"methods": {**METHODS, "x": {"changes": {
            "data.plan.pools": [{"fidelity": "ccsdt", "properties": ["forces"]}, *HIGH],
            "model.heads": {"kind": "shared"}}}}},
        "methods/x/n8-s0: .*data.plan.pools.0: .*ccsdt",
    ),
    "property without labels": (
        {"high": "ccsdt", "properties": ["forces"]}, "has no ccsdt forces labels to judge by; it has .* energy"
    ),
    "own key changed": (
        {"methods": {**METHODS, "x": {"changes": {"seed": 3}}}}, "seed is set by the study itself"
    ),
    "wrong recipe value": (
        {"methods": {**METHODS, "x": {"changes": {"model.heads.kind": "many"}}}}, "methods.x: .*\n.*model.heads.kind"
    ),
    "no high pool": (
        {"methods": {**METHODS, "x": {"changes": {
            "data.plan.pools": [{"fidelity": "gfn2"}], "model.heads": {"kind": "shared"}}}}},
        "0 pools of 'pbe', one is needed",
    ),
    "high labels in a stage": (
        {"stages": {"low": {"changes": {"data.plan.pools": HIGH, "model.heads": {"kind": "shared"}}}}},
        "stages.low: has a pool of 'pbe'",
    ),
    "refit with changes": (
        {"methods": {**METHODS, "x": {"refit": "low", "changes": {"optim.lr": 1}}}}, "refit has no training of its own"
    ),
    "sum without a difference": (
        {"methods": {**METHODS, "x": {"plus": "low"}}}, "methods.x: .*plus: 'low' is added to a training on stored"
    ),
    "sum and a calculation": (
        {"methods": {**METHODS, "x": {**DELTAS["delta_ml"], "needs_lf_at_inference": True}}},
        "plus: 'low' takes the place of the low-fidelity calculation",
    ),
    "sum with an unknown stage": (
        {"methods": {**METHODS, "x": {**DELTAS["delta_ml"], "plus": "middle"}}}, "methods.x.plus: no stage 'middle'"
    ),
    "refit and a sum": ({"methods": {**METHODS, "x": {"refit": "low", "plus": "low"}}}, "leave out .*, plus and tune"),
    "another fidelity unmarked": (
        {"methods": {**METHODS, "x": {"fidelity": "ccsdt"}}}, "needs_lf_at_inference: true"
    ),
    "unknown candidate": ({"candidate": "best"}, "candidate: no method 'best'; methods: hf_only, delta"),
    "candidate with a calculation": (
        {"candidate": "x", "methods": {**METHODS, "x": {"needs_lf_at_inference": True}}},
        "candidate: 'x' needs a low-fidelity calculation at inference",
    ),
    "candidate alone": (
        {"candidate": "hf_only", "methods": {"hf_only": METHODS["hf_only"]}, "stages": {}, "baselines": ["hf_only"]},
        "candidate: no other method than 'hf_only'",
    ),
    "unequal trials": (
        {"tune": {"optim.lr": [0.1, 0.2]}, "methods": {**METHODS, "x": {"tune": {"optim.lr": [0.1]}}}},
        "methods.x.tune: has 1 trials, the study's has 2",
    ),
    "tuned and changed": (
        {"tune": {"optim.lr": [0.1, 0.2]}, "methods": {**METHODS, "x": {"changes": {"optim.lr": 0.3}}}},
        "methods.x.changes: optim.lr is tuned",
    ),
    "tuned labels": ({"tune": {"data.plan.pools.0.properties": [["energy"]]}}, "trials .* have the same labels"),
    "tuned metric": ({"tune": {"train.best": ["val/loss"]}}, "train.best: the trials .* the same validation"),
    "tuned seed": ({"tune": {"seed": [0, 1]}}, "tune: seed is set by the study itself"),
    "tuned value twice": ({"tune": {"optim.lr": [0.1, 0.1]}}, "tune.optim.lr: 0.1 is given twice"),
    "no value": ({"tune": {"optim.lr": []}}, "tune.optim.lr: "),
    "unknown tuned key": ({"tune": {"optim.rate": [0.1]}}, "methods.hf_only: .*\n.*optim.rate: unknown key"),
    "trials chosen by losses of their own": (
        {"tune": {"loss.energy.weight": [1.0, 2.0]}}, r"val/loss \(train.best\) cannot choose between them"
    ),
    "refit with trials": (
        {"methods": {**METHODS, "x": {"refit": "low", "tune": {"optim.lr": [1.0]}}}}, "plus and tune"
    ),
    "no base recipe": ({"recipe": "none.yaml"}, "none.yaml: no such file"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_error(make_study: Callable[..., Path], name: str):
    changes, message = MISTAKES[name]
    with pytest.raises(InputError, match=f"(?s){message}"):
        grid_of(make_study(**changes))


def test_splits_that_leak_are_refused_with_the_pairs(make_study: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    path = make_study()
    store = grid_of(path).store
    judged, trained = (store.rows(split=split)[:2].tolist() for split in ("test", "train"))
    true = Store.geometry

    def near(self: Store, row: int) -> Geometry:
        if row not in judged:
            return true(self, row)
        numbers, positions, cell, pbc = true(self, trained[judged.index(row)])
        return numbers, positions + 5e-4, cell, pbc

    monkeypatch.setattr(Store, "geometry", near)
    with pytest.raises(InputError, match=r"2 structures are in two splits: .* the same within 1e-3 Å") as raised:
        grid_of(path)
    for a, b in zip(judged, trained, strict=True):
        assert f"{store.frame_id(a)} (row {a}, test) and {store.frame_id(b)} (row {b}, train)" in str(raised.value)
    monkeypatch.undo()

    def twice(self: Store, *arguments: Any) -> None:
        opened(self, *arguments)
        self.geometry_hash = self.geometry_hash.copy()
        self.geometry_hash[judged] = self.geometry_hash[trained]

    opened = Store.__init__
    monkeypatch.setattr(Store, "__init__", twice)
    with pytest.raises(InputError, match=rf"2 structures are in two splits: .*row {judged[0]}, test.*ingest again"):
        grid_of(path)


def test_gate_of_a_related_low_fidelity(make_study: Callable[..., Path]):
    (gate,) = gates(grid_of(make_study()))
    assert gate.low == "gfn2"
    assert gate.r2 is not None
    assert 0.5 < gate.r2 < 1
    assert gate.force_cosine is not None
    assert 0.7 < gate.force_cosine < 1


def test_gate_refuses_what_is_unrelated(make_study: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    grid = grid_of(make_study())
    true = type(grid.store).energies
    rng = np.random.default_rng(0)

    def shuffled(store: Any, fidelity: str, rows: np.ndarray) -> np.ndarray:
        energies = true(store, fidelity, rows)
        return rng.permutation(energies) if fidelity == "gfn2" else energies

    monkeypatch.setattr(type(grid.store), "energies", shuffled)
    with pytest.raises(InputError, match="gfn2 says little of pbe"):
        gates(grid)
    monkeypatch.undo()
    assert compare(grid.store, "val", "gfn2", "pbe").n_frames < 40
    _require([Gate("gfn2", 3, None, None)], "pbe")  # too few frames say nothing
