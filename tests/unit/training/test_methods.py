"""Every published method is a recipe that trains: what it draws, which labels it uses, what it leaves out."""

import json
from collections.abc import Callable
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import yaml
from ase.calculators.calculator import PropertyNotImplementedError
from safetensors.torch import load_file

LF = {"fidelity": "gfn2", "properties": ["energy", "forces"]}
HF = {"fidelity": "pbe", "properties": ["energy", "forces"], "max_frames": 20}
HF_ENERGY = {"fidelity": "ccsdt", "properties": ["energy"]}
METHODS = {
    "idle": ([LF, HF], "none", {"kind": "independent", "hidden": [8]}, {}),
    "idle_from_lf_head": ([LF, HF], "none", {"kind": "independent", "hidden": [8], "init_from": {"pbe": "gfn2"}}, {}),
    "lf_forces_hf_energies": ([LF, HF_ENERGY], "none", {"kind": "independent", "hidden": []}, {}),
    "lf_forces_only": ([{**LF, "properties": ["forces"]}, HF_ENERGY], "none", {"kind": "shared", "hidden": [8]}, {}),
    "sevennet_mf": ([LF, HF], "onehot", {"kind": "shared", "hidden": [8]}, {}),
    "delta": ([LF, HF], "none", {"kind": "delta", "base": "gfn2", "hidden": [8]}, {}),
    "embedding": ([LF, HF], "embedding", {"kind": "shared", "hidden": [8]}, {"normalisation": "per_fidelity"}),
    "film": ([LF, HF], "film", {"kind": "independent", "hidden": [8]}, {"normalisation": "expected"}),
}
TRAINING = {"activation_checkpointing": {"activation_checkpointing": True}, "bfloat16": {"precision": "bfloat16"}}
METHODS |= dict.fromkeys([*TRAINING, "escn"], METHODS["sevennet_mf"])
METHODS |= dict.fromkeys(["direct", "conservative_after_direct"], METHODS["idle"])
METHODS["d3"] = METHODS["idle"]
METHODS["finish"] = METHODS["idle_from_lf_head"]
ESCN = {"kind": "escn", "cutoff": 4.0, "sphere_channels": 8, "hidden_channels": 8, "edge_channels": 8, "n_radial": 8}
D3 = {"pbe": {"functional": "pbe"}}
RUN_ALL = """
import sys
from mffm.config.base import load
from mffm.config.recipe import Recipe
from mffm.training.loop import train
for path in sys.argv[1:]:
    train(load(Recipe, path))
"""


@pytest.fixture(scope="module")
def runs(
    molecule_store: Path, tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Callable[..., dict]
) -> dict[str, Path]:
    """All methods trained for ten steps, in one process that imports torch once."""
    folder = tmp_path_factory.mktemp("methods")
    recipes = []
    for name, (pools, conditioning, heads, loss) in METHODS.items():
        recipe = tiny_recipe(molecule_store, folder / name)
        recipe["name"] = name
        recipe["data"]["plan"]["pools"] = pools
        recipe["data"]["plan"]["paired"] = name == "delta"
        recipe["model"] = {**recipe["model"], "conditioning": {"kind": conditioning}, "heads": heads}
        if name == "escn":
            recipe["model"]["backbone"] = ESCN
        if name == "d3":
            recipe["model"]["d3"] = D3
        if name == "direct":
            recipe["model"]["forces"] = "direct"
        if name == "conservative_after_direct":
            recipe["start_from"] = str(folder / "direct")
        recipe["loss"] = loss
        recipe["references"] = {"anchor": pools[0]["fidelity"]} if "energy" in pools[0]["properties"] else {}
        recipe["train"] = {"steps": 10, "validate_every": 5, "save_every": 10, "log_every": 1, "threads": 1}
        recipe["train"] |= TRAINING.get(name, {})
        if name == "finish":
            recipe["data"]["plan"]["finish"] = {"fidelities": ["pbe"], "part": 0.3}
            recipe["train"] |= {"patience": 1, "best": "val/pbe/loss"}
        recipes.append(folder / f"{name}.yaml")
        recipes[-1].write_text(yaml.safe_dump(recipe))
    done = forked.run(["-c", RUN_ALL, *map(str, recipes)])
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: folder / name for name in METHODS}


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", METHODS)
def test_method_trains(runs: dict[str, Path], name: str):
    losses = [r["train/loss"] for r in rows(runs[name]) if "train/loss" in r]
    assert len(losses) == 10
    validations = [r["val/loss"] for r in rows(runs[name]) if "val/loss" in r]
    assert validations[-1] < validations[0], "ten steps must lower the validation loss"


def test_activation_checkpointing_trains_alike_and_bfloat16_nearly(runs: dict[str, Path]):
    def losses(name: str) -> list[float]:
        return [r["train/loss"] for r in rows(runs[name]) if "train/loss" in r]

    assert losses("activation_checkpointing") == pytest.approx(losses("sevennet_mf"), rel=1e-4)
    assert losses("bfloat16") == pytest.approx(losses("sevennet_mf"), rel=0.05)
    assert losses("bfloat16") != pytest.approx(losses("sevennet_mf"), rel=1e-5)


def test_direct_forces_then_conservative_ones(runs: dict[str, Path], tmp_path: Path):
    """Everything that a user sees of the first says "not conservative"; the second keeps weights and references."""
    from ase.build import molecule

    from mffm.deploy.ase import Calculator
    from mffm.release import load, save

    first, second = load(runs["direct"]), load(runs["conservative_after_direct"])
    assert not first.potential.is_conservative
    assert second.potential.is_conservative
    dropped = second.spec.provenance["start_from"]["dropped"]
    assert set(dropped) == set(first.potential.state_dict()) - set(second.potential.state_dict())
    assert second.spec.references.to_dict()["references"] == first.spec.references.to_dict()["references"]
    assert "val/gfn2/forces_mae" in next(r for r in rows(runs["direct"]) if "val/loss" in r)
    at_start = [next(r["train/loss"] for r in rows(runs[n]) if "train/loss" in r) for n in ("idle", second.path.name)]
    assert at_start[1] < at_start[0]
    assert "Not conservative" in (save(runs["direct"], tmp_path / "a") / "README.md").read_text()
    assert "conservative" not in (save(second.path, tmp_path / "b") / "README.md").read_text()
    with pytest.warns(UserWarning, match="not conservative: forces and stress come from direct heads"):
        calculator = Calculator(tmp_path / "a", fidelity="gfn2")
    assert not calculator.is_conservative
    atoms = molecule("CH4", cell=[9, 9, 9], pbc=True, calculator=calculator)
    atoms.rattle(0.1)
    assert abs(atoms.get_forces()).max() > 0
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_stress()


def test_references_are_fitted_with_dispersion_taken_off(runs: dict[str, Path], molecule_store: Path, tmp_path: Path):
    """As if they were fitted on labels less DFT-D3; another DFT-D3 on these weights is refused; the card names it."""
    from mffm.config.base import load as load_recipe
    from mffm.config.model import D3Config
    from mffm.config.recipe import Recipe
    from mffm.data.store import Store
    from mffm.errors import InputError
    from mffm.models.d3 import dispersion
    from mffm.release import load, save
    from mffm.training.setup import prepare

    store, plain, with_d3 = Store(molecule_store), load(runs["idle"]), load(runs["d3"])
    rows = store.rows(split="train", fidelity="gfn2")
    composition = store.composition(rows)
    d3 = [dispersion(D3Config(functional="pbe"), "", *store.geometry(int(r))).atom_energies.sum() for r in rows]
    a, b = (
        np.nan_to_num(x.spec.references.array(["gfn2", "pbe"])) @ composition.T.astype(float) for x in (plain, with_d3)
    )
    assert np.allclose(a[0], b[0])
    mean = np.mean(np.array(d3) / composition.sum(1))
    assert mean < -5e-3
    fractions = composition / composition.sum(1, keepdims=True)
    residual = (a[1] - b[1] - d3) / composition.sum(1)
    assert np.abs(fractions.T @ residual).max() < 1e-8 * len(rows)  # the optimum of least squares
    assert "less a fit of DFT-D3" in (runs["d3"] / "references.md").read_text()
    assert "DFT-D3(bj) of pbe is a part of pbe" in (save(runs["d3"], tmp_path / "a") / "README.md").read_text()
    recipe = load_recipe(Recipe, runs["d3"] / "recipe.yaml", ["model.d3={}", f"start_from={runs['d3']}"])
    with pytest.raises(InputError, match=r"model\.d3\.pbe is none, but the weights in .* were trained with"):
        prepare(recipe)


def test_only_the_recipes_labels_are_used(runs: dict[str, Path]):
    row = rows(runs["lf_forces_hf_energies"])[0]
    assert {k for k in row if k.startswith("labels/")} == {
        "labels/gfn2/energy",
        "labels/gfn2/forces",
        "labels/ccsdt/energy",
    }
    assert row["labels/ccsdt/energy"] > 0
    row = rows(runs["lf_forces_only"])[0]
    assert {k for k in row if k.startswith("labels/")} == {"labels/gfn2/forces", "labels/ccsdt/energy"}


def test_a_fidelity_trained_without_energies_has_none(runs: dict[str, Path]):
    """Its energies have no element references: they are not judged, and not predicted."""
    from ase.build import molecule

    from mffm.deploy.ase import Calculator
    from mffm.errors import InputError

    validation = next(r for r in rows(runs["lf_forces_only"]) if "val/loss" in r)
    assert "val/gfn2/forces_mae" in validation
    assert "val/gfn2/energy_mae" not in validation
    atoms = molecule("CH4", calculator=Calculator(runs["lf_forces_only"], fidelity="gfn2"))
    with pytest.raises(InputError, match="trained without energies"):
        atoms.get_potential_energy()
    atoms.calc = Calculator(runs["lf_forces_only"], fidelity="ccsdt")
    assert atoms.get_potential_energy() < -1000


def test_a_run_that_finishes_on_one_fidelity_has_its_best_weights_from_there(runs: dict[str, Path]):
    found = rows(runs["finish"])
    assert [r["step"] for r in found if r.get("labels/gfn2/energy")] == [1, 2, 3, 4, 5, 6, 7]
    rates, usual = ({r["step"]: r["lr"] for r in rows(runs[n]) if "lr" in r} for n in ("finish", "idle_from_lf_head"))
    assert [rates[step] / usual[step] for step in rates] == pytest.approx([1.0] * 7 + [0.4] * 3)
    losses = {r["step"]: r["val/pbe/loss"] for r in found if "val/loss" in r}
    assert list(losses) == [5, 7, 10], "where the last part begins is validated too"
    assert [r["best"] for r in found if "best" in r] == list(losses.values())
    state = json.loads((runs["finish"] / "checkpoints" / "step-00000010" / "state.json").read_text())["state"]
    assert state["best"]["val/pbe/loss"] == {"value": losses[10], "step": 10}


def test_paired_draws_a_frame_at_all_its_fidelities(runs: dict[str, Path]):
    for row in rows(runs["delta"]):
        if "labels/pbe/energy" in row:
            assert row["labels/gfn2/energy"] >= row["labels/pbe/energy"]


def test_fine_tune_starts_as_its_parent_with_refitted_references(
    runs: dict[str, Path], make_recipe: Callable[..., Path]
):
    """A new fidelity from a release: step 0 is no worse than the parent; other heads are refused with the reason."""
    base = yaml.safe_load(make_recipe("base").read_text())
    data = {**base["data"], "plan": {"pools": [{**HF, "max_frames": 30}], "edge_budget": 600}}
    model = {"conditioning": {"kind": "none"}, "heads": {"kind": "shared", "hidden": [8]}, "init_from": {"pbe": "gfn2"}}
    bad = make_recipe("bad", data=data, model=model, start_from=str(runs["idle"]))
    refused = forked.run(["-m", "mffm", "train", str(bad)])
    assert refused.returncode == 2, refused.stderr
    assert "heads" in refused.stderr

    model = {
        "conditioning": {"kind": "onehot"},
        "heads": {"kind": "shared", "hidden": [8]},
        "init_from": {"pbe": "gfn2"},
    }
    optim = {"lr": 1e-9, "ema_decay": 0.0, "warmup_steps": 0}
    recipe = make_recipe("good", data=data, model=model, start_from=str(runs["sevennet_mf"]), optim=optim)
    done = forked.run(["-m", "mffm", "train", str(recipe)])
    assert done.returncode == 0, done.stderr
    run = Path(yaml.safe_load(recipe.read_text())["run"])
    at_start = next(r for r in rows(run) if "val/pbe/energy_mae" in r)
    assert at_start["val/pbe/energy_mae"] < 500, "a composition-linear offset would be thousands of meV/atom"
    assert "refitted" in (run / "references.md").read_text()


def test_where_a_run_starts_is_a_candidate_for_its_best_weights(
    runs: dict[str, Path], make_recipe: Callable[..., Path], run_mffm: Callable
):
    base = yaml.safe_load((runs["sevennet_mf"] / "recipe.yaml").read_text())
    recipe = make_recipe(data=base["data"], model=base["model"], start_from=str(runs["sevennet_mf"]), optim={"lr": 0.3})
    done = run_mffm("train", str(recipe))
    assert done.returncode == 0, done.stderr
    assert "best val/loss" in done.stdout
    run = Path(yaml.safe_load(recipe.read_text())["run"])
    start, best = (load_file(path / "weights" / "best.safetensors") for path in (runs["sevennet_mf"], run))
    assert all(torch.equal(start[name], best[name]) for name in start)
    assert next(row["step"] for row in rows(run) if "val/loss" in row) == 0
