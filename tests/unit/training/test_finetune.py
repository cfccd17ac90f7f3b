"""Fine-tuning of a release: what each mode changes, where new fidelities and elements start, replay, step-0 parity."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from mffm.config.base import load as load_recipe
from mffm.config.recipe import Recipe
from mffm.data.pools import choose
from mffm.data.store import Store
from mffm.errors import InputError
from mffm.release import PotentialSpec, load, outputs, save
from mffm.training import finetune, forgetting, predicted, step_zero
from mffm.training.setup import prepare

MODES = {
    "full": {},
    "lora": {"mode": "lora", "rank": 2},
    "frozen": {"mode": "frozen"},
    "heads": {"mode": "heads"},
    "replay": {"replay": "predictions", "replay_frames": 12},
    "heads_first": {"heads_first": 0.5},
}
RUN_ALL = """
import sys
from mffm.training.finetune import recipe_of
from mffm.training.loop import train
for path in sys.argv[2:]:
    train(recipe_of(sys.argv[1], path))
"""
CC = {"fidelity": "ccsdt", "properties": ["energy"]}
PBE = {"fidelity": "pbe", "properties": ["energy", "forces"], "max_frames": 20}


def content(store: Path, run: Path, pools: list[dict], **sections: Any) -> dict[str, Any]:
    plan = {"pools": pools, "edge_budget": 600, "edges_per_microbatch": 300}
    return {
        "name": "tuned", "run": str(run),
        "data": {"store": str(store), "plan": plan, "validation_max_frames": 8},
        "train": {"steps": 6, "validate_every": 3, "save_every": 2, "log_every": 1, "threads": 1, "keep": 9},
        "optim": {"warmup_steps": 2}, "log": {"wandb": "disabled"}, **sections,
    }  # fmt: skip


@pytest.fixture
def make(molecule_store: Path, tmp_path: Path) -> Callable[..., Path]:
    def write(pools: list[dict], name: str = "tuned", store: Path = molecule_store, **sections: Any) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content(store, tmp_path / name, pools, **sections)))
        return path

    return write


@pytest.fixture(scope="module")
def runs(tiny_release: Path, molecule_store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each mode to a new fidelity, in one process."""
    folder = tmp_path_factory.mktemp("modes")
    for name, section in MODES.items():
        recipe = content(molecule_store, folder / name, [CC], fine_tune=section, train={
            "steps": 6, "validate_every": 3, "save_every": 2, "log_every": 1, "threads": 1, "keep": 9,
        })  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    recipes = [str(folder / f"{name}.yaml") for name in MODES]
    done = forked.run(["-c", RUN_ALL, str(tiny_release), *recipes])
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: folder / name for name in MODES}


def weights(run: Path, name: str = "raw") -> dict[str, torch.Tensor]:
    return load_file(run / "weights" / f"{name}.safetensors")


def changed(run: Path, release: Path) -> set[str]:
    """Return the tensors of a run that differ from the release's, in the rows that the release has."""
    mine, theirs = weights(run), load_file(release / "model.safetensors")
    assert set(mine) == set(theirs), "the run's weights are not plain ones"
    return {n for n, t in theirs.items() if not torch.equal(mine[n][: len(t)], t)}


def test_each_mode_changes_what_it_says(runs: dict[str, Path], tiny_release: Path):
    of = {name: changed(run, tiny_release) for name, run in runs.items()}
    backbone = {n for n in load_file(tiny_release / "model.safetensors") if ".backbone." in n}
    assert of["heads"] == set()
    assert of["frozen"]
    assert not of["frozen"] & backbone
    assert of["full"] > of["frozen"]
    assert any("elements" in n for n in of["full"])
    matrices = of["lora"] & backbone
    assert matrices
    assert not any("bias" in n or "norm." in n or "elements" in n for n in matrices)
    base = load_file(tiny_release / "model.safetensors")
    for name in matrices:  # no more than the rank, up to rounding
        values = torch.linalg.svdvals((weights(runs["lora"])[name] - base[name]).double())
        assert float(values[2:].max() if len(values) > 2 else 0) < 1e-5


def test_heads_leave_other_fidelities_to_the_last_bit(runs: dict[str, Path], tiny_release: Path):
    before, after = load(tiny_release), load(runs["heads"], "raw")
    structures = outputs.make_structures(before.spec)
    for name in ("gfn2", "pbe"):
        for a, b in zip(
            *(outputs.predict(x.potential, x.spec, structures, name) for x in (before, after)), strict=True
        ):
            assert a.energy == b.energy
            assert np.array_equal(a.forces, b.forces)
    (new, old) = (outputs.predict(after.potential, after.spec, structures, n)[0] for n in ("ccsdt", "pbe"))
    assert new.interaction_energy != old.interaction_energy


def test_what_fidelities_share_waits_for_heads_first(runs: dict[str, Path], tiny_release: Path):
    own = load(tiny_release).potential.per_fidelity()
    saved = {k: load_file(runs["heads_first"] / f"checkpoints/step-{k:08d}" / "model.safetensors") for k in (2, 4)}
    release = load_file(tiny_release / "model.safetensors")
    moved = {k: {n for n, t in release.items() if not torch.equal(saved[k][n][: len(t)], t)} for k in saved}
    assert moved[2] <= own
    assert any(not torch.equal(saved[4][n], saved[2][n]) for n in own)
    assert any((saved[2][n][-1] != saved[2][n][0]).any() for n in own), "nothing of the new fidelity was trained"
    assert moved[4] - own, "what fidelities share was never trained"


def test_lora_leaves_no_trace_in_a_release_and_predicts_what_was_trained(runs: dict[str, Path], tmp_path: Path):
    run = runs["lora"]
    checkpoint = run / "checkpoints" / "step-00000006"
    held = load_file(checkpoint / "model.safetensors")
    assert any("/down" in name for name in held)
    release = load(save(checkpoint, tmp_path / "lora", "raw"))
    assert not any("adapter" in name for name in release.potential.state_dict())
    assert all(torch.equal(t, weights(run)[n]) for n, t in release.potential.state_dict().items())
    # The module that was trained: frozen weights and updates together.
    recipe = load_recipe(Recipe, run / "recipe.yaml")
    trained = prepare(recipe, PotentialSpec.read(run / "potential")).potential
    trained.load_state_dict(held)
    from mffm.models.adapter import merged

    structures = outputs.make_structures(release.spec)
    plain = release.spec.build().eval()
    plain.load_state_dict(merged(trained.state_dict()))
    a, b = (outputs.predict(p, release.spec, structures, "ccsdt") for p in (plain, release.potential))
    assert all(np.array_equal(x.forces, y.forces) and x.energy == y.energy for x, y in zip(a, b, strict=True))


def test_only_what_is_trained_is_in_the_optimiser(runs: dict[str, Path]):
    held = {name: load_file(run / "checkpoints/step-00000006/optimizer.safetensors") for name, run in runs.items()}
    assert all("adapter." in name for name in held["heads"])
    assert not any(".backbone." in name and "adapter." not in name for name in held["lora"])
    assert not any(".backbone." in name for name in held["frozen"])
    assert len(held["full"]) > len(held["frozen"]) > 0


def test_report_has_old_and_new_before_and_after(runs: dict[str, Path], tiny_release: Path, molecule_store: Path):
    content = json.loads((runs["full"] / "finetune.json").read_text())
    keys = {(r["split"], r["fidelity"], r["property"]) for r in content["rows"]}
    assert {("val", "gfn2", "forces"), ("val", "pbe", "energy"), ("test", "ccsdt", "energy")} <= keys
    assert content["new"]["ccsdt"]["parent"] in ("gfn2", "pbe")
    assert set(content["new"]["ccsdt"]["tried"]) == {"gfn2", "pbe"}
    store = Store(molecule_store)
    chosen = choose(store, store.rows(split="val", fidelity="gfn2"), 0, 8)
    for kind, loaded in (("before", load(tiny_release)), ("after", load(runs["full"]))):
        table = loaded.spec.references.array(["gfn2"])[0]
        expected = finetune.errors(loaded, store, chosen, "gfn2", "gfn2", table)
        rows = [r for r in content["rows"] if (r["split"], r["fidelity"]) == ("val", "gfn2")]
        assert {r["property"]: r[kind] / 1e3 for r in rows} == pytest.approx(expected, rel=1e-5)
    recipe = load_recipe(Recipe, runs["full"] / "recipe.yaml")
    assert recipe.fine_tune.fidelities == ["gfn2", "pbe"]
    assert recipe.model.init_from == {"ccsdt": content["new"]["ccsdt"]["parent"]}
    heads = json.loads((runs["heads"] / "finetune.json").read_text())
    for row in heads["rows"]:
        assert row["is_new"] or row["after"] == row["before"]
    text = (runs["heads"] / "finetune.md").read_text()
    assert "| val | gfn2 | old | forces |" in text


def test_replay_trains_on_what_the_release_predicts(runs: dict[str, Path], tiny_release: Path, molecule_store: Path):
    run, release = runs["replay"], load(tiny_release)
    store = predicted.opened(Store(molecule_store), run / predicted.FOLDER)
    for name in ("gfn2", "pbe"):
        rows = store.rows(split="train", source=predicted.SOURCE, fidelity=name)
        assert len(rows) == 12
        numbers, positions, cell, pbc = store.geometry(int(rows[0]))
        structure = outputs.Structure(numbers.astype(np.int64), positions, cell, pbc)
        (expected,) = outputs.predict(release.potential, release.spec, [structure], name)
        labels = store.labels(int(rows[0]), name)
        assert float(labels["energy"]) == pytest.approx(expected.energy, abs=1e-4)
        assert np.allclose(labels["forces"], expected.forces, atol=1e-5)
    assert [p.name for p in (molecule_store / "layers").iterdir()] == ["molecules"], "the store was touched"
    pools = load_recipe(Recipe, run / "recipe.yaml").data.plan.pools
    assert [(p.fidelity, p.source, p.weight) for p in pools] == [
        ("ccsdt", None, 0.5), ("gfn2", predicted.SOURCE, 0.25), ("pbe", predicted.SOURCE, 0.25),
    ]  # fmt: skip
    spec = PotentialSpec.read(run / "potential")
    assert spec.label_counts["gfn2"] == release.spec.label_counts["gfn2"], "predictions are no labels"
    assert set(spec.label_counts["ccsdt"]) == {"energy"}


@pytest.mark.slow
def test_a_replay_goes_on_with_the_labels_it_began_with(
    runs: dict[str, Path], tmp_path: Path, run_mffm: Callable[..., subprocess.CompletedProcess]
):
    run = tmp_path / "replay"
    shutil.copytree(runs["replay"], run)
    recipe = (run / "recipe.yaml").read_text().replace(str(runs["replay"]), str(run))
    (run / "recipe.yaml").write_text(recipe)
    expected = bytes_of(run, 6)
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    (run / "checkpoints" / "latest").write_text("step-00000002\n")
    resumed = run_mffm("resume", str(run))
    assert resumed.returncode == 0, resumed.stderr
    assert bytes_of(run, 6) == expected
    shutil.rmtree(run / predicted.FOLDER)
    refused = run_mffm("resume", str(run))
    assert refused.returncode == 2
    assert "the labels of the replay are gone" in refused.stderr


def bytes_of(run: Path, step: int) -> dict[str, bytes]:
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {
        name: (folder / name).read_bytes() for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
    }


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora", "heads"])
def test_kill_and_resume_is_bit_identical(
    runs: dict[str, Path], tiny_release: Path, make: Callable[..., Path], tmp_path: Path, mode: str, run_mffm: Callable
):
    run = tmp_path / "tuned"
    recipe = make([CC], fine_tune=MODES[mode])
    process = subprocess.Popen(
        [sys.executable, "-m", "mffm", "finetune", str(tiny_release), str(recipe), "train.steps=6"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 180
    try:
        while (
            time.monotonic() < deadline and process.poll() is None and not (run / "checkpoints/step-00000002").is_dir()
        ):
            time.sleep(0.003)
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL, "the run ended before it could be killed"
    finally:
        process.kill()
    assert not (run / "weights" / "raw.safetensors").exists(), "the run ended before it could be killed"
    resumed = run_mffm("resume", str(run))
    assert resumed.returncode == 0, resumed.stderr
    assert bytes_of(run, 6) == bytes_of(runs[mode], 6)
    mine, whole = (json.loads((r / "finetune.json").read_text()) for r in (run, runs[mode]))
    assert mine["rows"] == whole["rows"]


def setup_of(release: Path, recipe: Path, *overrides: str):
    return prepare(finetune.recipe_of(release, recipe, overrides))


def test_a_release_of_one_head_gets_one_for_each_fidelity(
    tiny_release: Path, make: Callable[..., Path], tmp_path: Path
):
    single = save(tiny_release, tmp_path / "single", fidelity="gfn2")
    setup = setup_of(single, make([PBE]))
    assert setup.start.split_heads
    assert setup.spec.model.heads.kind == "independent"
    assert setup.recipe.model.init_from == {"pbe": "gfn2"}
    again = prepare(load_recipe(Recipe, _written(setup.recipe, tmp_path)))  # killed before its first checkpoint
    assert again.recipe == setup.recipe
    assert all(
        torch.equal(a, b) for a, b in zip(again.potential.parameters(), setup.potential.parameters(), strict=True)
    )
    alone = setup_of(single, make([{**PBE, "fidelity": "gfn2"}]))  # one fidelity stays one
    assert alone.spec.model.heads.kind == "shared"
    assert alone.fidelities.names == ("gfn2",)


@pytest.mark.parametrize("replay", ["data", "predictions"])
def test_a_start_from_the_resolved_recipe_is_the_same_start(
    tiny_release: Path, make: Callable[..., Path], tmp_path: Path, replay: str
):
    setup = setup_of(tiny_release, make([CC], fine_tune={"replay": replay, "replay_frames": 8}))
    assert [(p.fidelity, p.weight) for p in setup.recipe.data.plan.pools] == [
        ("ccsdt", 0.5), ("gfn2", 0.25), ("pbe", 0.25),
    ]  # fmt: skip
    later = setup_of(
        tiny_release, make([CC], name="later", fine_tune={"replay": replay, "replay_frames": 8, "heads_first": 0.5})
    )
    assert [p.weight for p in later.recipe.data.plan.pools] == [0.5, {0: 0.0, 3: 0.25}, {0: 0.0, 3: 0.25}]
    again = prepare(load_recipe(Recipe, _written(setup.recipe, tmp_path)))
    assert again.recipe == setup.recipe
    assert again.plan.fingerprint == setup.plan.fingerprint


def _written(recipe: Recipe, folder: Path) -> Path:
    from mffm.config.base import dump

    path = folder / "resolved.yaml"
    path.write_text(dump(recipe))
    return path


def test_the_parent_is_the_nearest_or_the_named_one(tiny_release: Path, make: Callable[..., Path]):
    setup = setup_of(tiny_release, make([CC]))
    tried = setup.start.candidates["ccsdt"]
    parent = setup.recipe.model.init_from["ccsdt"]
    assert tried[parent]["energy"] == min(e["energy"] for e in tried.values())
    other = "gfn2" if parent == "pbe" else "pbe"
    named = setup_of(tiny_release, make([CC]), f"model.init_from={{ccsdt: {other}}}")
    assert named.recipe.model.init_from == {"ccsdt": other}
    assert named.start.candidates == {}


TAMPERED = {
    "backbone": ("receive.weights.0", slice(None), r"reference outputs, .*backbone tensor .*receive\.weights\.0"),
    "old head": ("heads.correction.weights.1", 1, r"reference outputs, .*head row of 'pbe'"),
    "old conditioning": ("conditioning.table", 0, r"reference outputs, .*conditioning row of 'gfn2'"),
    "new head": ("heads.correction.weights.1", 2, r"'ccsdt' is worse than .*head row of 'ccsdt'"),
}


@pytest.mark.parametrize("case", [*TAMPERED, "old references", "new references"])
def test_step_zero_stops_and_names_what_differs(tiny_release: Path, make: Callable[..., Path], case: str):
    setup = setup_of(tiny_release, make([CC]), "model.init_from={ccsdt: pbe}")
    step_zero.require(setup, setup.start.base)
    if case == "old references":
        setup.spec.references.table["gfn2"] = setup.spec.references.table["gfn2"] + 0.5
        message = r"energy differs by 0\.5 eV/atom.*references of 'gfn2' \(H"
    elif case == "new references":
        setup.spec.references.table["ccsdt"] = setup.spec.references.table["ccsdt"] + 0.5
        message = "'ccsdt' with its element references is worse than 'pbe' with refitted ones.*references of 'ccsdt'"
    else:
        name, rows, message = TAMPERED[case]
        with torch.no_grad():
            parameter = next(p for n, p in setup.potential.named_parameters() if n.endswith(name))
            parameter[rows] += 1.0
    with pytest.raises(InputError, match=message):
        step_zero.require(setup, setup.start.base)


def without(molecule_store: Path, old: str, new: str, folder: Path, build_store: Callable) -> Path:
    """Return a store of the shipped molecules with one element called another: labels that nobody calculated."""
    lines = (molecule_store.parent / "molecules.extxyz").read_text().splitlines()
    text = "\n".join(f"{new} {line[2:]}" if line.startswith(f"{old} ") else line for line in lines) + "\n"
    return build_store(folder, text)


def test_new_elements_are_refused_with_names_or_mapped(
    tiny_release: Path, make: Callable[..., Path], molecule_store: Path, tmp_path: Path, build_store: Callable
):
    store = without(molecule_store, "O", "S", tmp_path / "sulfur", build_store)
    recipe = make([CC], store=store, fine_tune={"mode": "heads"})
    with pytest.raises(
        InputError, match=r"does not know S \(\d+ structures\); it knows: H C N O\..*fine_tune\.elements"
    ):
        setup_of(tiny_release, recipe)
    for mapping, message in (
        ("{S: P}", "does not know P"), ("{S: O, N: C}", "knows N already"), ("{Q: O}", "'Q' is not an element symbol"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            setup_of(tiny_release, recipe, f"fine_tune.elements={mapping}")
    setup = setup_of(tiny_release, recipe, "fine_tune.elements={S: O}")
    embedding = setup.potential.learned.backbone.elements.weight
    assert torch.equal(embedding[16], embedding[8])
    assert "adapter.terms/learned/backbone/elements/weight/row-16" in dict(setup.potential.named_parameters())
    table = setup.spec.references
    assert table.value("ccsdt", "S") is not None
    assert table.value("gfn2", "S") is None, "the old fidelities have learned nothing of it"
    structures = outputs.make_structures(load(tiny_release).spec)
    oxide = next(s for s in structures if len(s.numbers) > 2 and 8 in s.numbers)
    called = replace(oxide, numbers=np.where(oxide.numbers == 8, 16, oxide.numbers))
    release = load(tiny_release)
    (expected,) = outputs.predict(release.potential, release.spec, [oxide], "gfn2")
    plain = setup.start.base
    (found,) = outputs.predict(plain.potential, plain.spec, [called], "gfn2")
    assert np.array_equal(found.forces, expected.forces), "sulfur starts as oxygen"


def test_a_known_fidelity_learns_the_reference_of_a_new_element(
    tiny_release: Path, make: Callable[..., Path], molecule_store: Path, tmp_path: Path, build_store: Callable
):
    store = without(molecule_store, "O", "S", tmp_path / "sulfur", build_store)
    setup = setup_of(tiny_release, make([PBE], store=store, fine_tune={"elements": {"S": "O"}}))
    kept, own = load(tiny_release).spec.references, setup.spec.references
    assert all(own.value("pbe", s) == kept.value("pbe", s) for s in "HCNO")
    assert own.value("pbe", "S") == pytest.approx(kept.value("pbe", "O"), abs=1.0)


def test_refusals(tiny_release: Path, tiny_run: Path, make: Callable[..., Path], molecule_store: Path, tmp_path: Path):
    for overrides, message in (
        (["model.backbone.channels=8"], "model.backbone: a fine-tuning has the model of its release"),
        (["fine_tune.mode=frozen", "fine_tune.rank=4"], "rank: 4 is of mode: lora"),
        (["fine_tune.replay_share=0.2"], "replay_share: 0.2 is of replay"),
        (["fine_tune.heads_first=1"], "fine_tune.heads_first: Input should be less than 1"),
        (
            ["model.init_from={ccsdt: b3lyp}"],
            r"model\.init_from\.ccsdt: 'b3lyp' is not a fidelity of .*; it has: gfn2, pbe",
        ),
    ):
        with pytest.raises(InputError, match=message):
            setup_of(tiny_release, make([CC]), *overrides)
    pure = save(_without_conditioning(tiny_run, tmp_path), tmp_path / "pure")
    with pytest.raises(InputError, match="head of 'gfn2' is in the predictions of all fidelities"):
        setup_of(pure, make([{**PBE, "fidelity": "gfn2"}]), "fine_tune.mode=heads")


def _without_conditioning(run: Path, folder: Path) -> Path:
    """Return a copy of a run whose conditioning, at zero or not, is taken away."""
    copy = folder / "pure-run"
    shutil.copytree(run, copy)
    config = json.loads((copy / "potential" / "config.json").read_text())
    config["model"]["conditioning"] = {"kind": "none"}
    (copy / "potential" / "config.json").write_text(json.dumps(config))
    path = copy / "weights" / "best.safetensors"
    from safetensors.torch import save_file

    save_file({n: t for n, t in load_file(path).items() if ".conditioning." not in n}, path)
    return copy


def test_another_level_of_theory_under_a_known_name_is_refused(
    tiny_release: Path, make: Callable[..., Path], molecule_store: Path, tmp_path: Path
):
    store = tmp_path / "store"
    shutil.copytree(molecule_store, store)
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["fidelities"][1]["level_of_theory"] = "PBE0"
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"fidelity 'pbe' is 'PBE0' in .* and 'PBE/def2-SVP' in"):
        setup_of(tiny_release, make([PBE], store=store))


@pytest.mark.slow
def test_a_fidelity_that_the_store_does_not_know_is_kept_and_its_drift_told(
    tiny_release: Path, make: Callable[..., Path], molecule_store: Path, tmp_path: Path, run_mffm: Callable
):
    renamed = tmp_path / "renamed"
    assert run_mffm("fidelity", "rename", str(tiny_release), "gfn2", "xtb", "--output", str(renamed)).returncode == 0
    recipe = make([PBE], fine_tune={"replay": "predictions", "replay_frames": 10})
    done = run_mffm("finetune", str(renamed), str(recipe))
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "tuned" / "finetune.json").read_text())
    assert {r["fidelity"] for r in content["drift"]} == {"xtb"}
    assert all(r["mad"] > 0 for r in content["drift"])
    released = load(save(tmp_path / "tuned", tmp_path / "new"))
    assert released.fidelities.names == ("xtb", "pbe")
    assert run_mffm("resume", str(tmp_path / "tuned")).returncode == 0  # at its end


def test_markdown_of_an_empty_split_is_whole():
    content = {
        "release": "r", "mode": "full", "rank": None, "n_trained": 1, "n_parameters": 1, "replay": "none",
        "weights": "best", "pools": [], "new": {}, "rows": [], "drift": [], "not_replayed": [],
    }  # fmt: skip
    assert "# Fine-tuning of r" in forgetting.markdown(content)


def test_errors_compare_what_is_asked_for(tiny_release: Path, molecule_store: Path):
    from mffm.evaluate import parity

    loaded, store = load(tiny_release), Store(molecule_store)
    rows = store.rows(split="val", fidelity="pbe")
    table = loaded.spec.references.array(["pbe"])[0]
    found = finetune.errors(loaded, store, rows, "pbe", "pbe", table)
    expected = {r["property"]: r["mae"] / 1e3 for r in parity.evaluate(loaded, store, "val", ["pbe"]).rows()}
    assert found == pytest.approx(expected, rel=1e-5)
    shifted = replace(loaded, spec=replace(loaded.spec))
    assert finetune.refitted_errors(shifted, store, rows, "pbe", "gfn2")["energy"] <= found["energy"] * 2
