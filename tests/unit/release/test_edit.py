"""Fidelities of a release are added, copied, renamed and dropped; what remains predicts what it did."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mffm.cli import app
from mffm.config.base import load as load_recipe
from mffm.config.recipe import Recipe
from mffm.errors import InputError
from mffm.fidelity import Fidelity
from mffm.release import edit, inspection, load, outputs, save
from mffm.training.setup import prepare

SCAN = Fidelity("scan", "SCAN/def2-SVP")
KINDS = {
    "delta and one-hot": {},
    "independent": {"conditioning": {"kind": "none"}, "heads": {"kind": "independent", "hidden": [8]}},
    "nothing of its own": {"conditioning": {"kind": "none"}, "heads": {"kind": "shared", "hidden": [8]}},
    "film": {"conditioning": {"kind": "film", "dim": 4}, "heads": {"kind": "shared", "hidden": []}},
}


@pytest.fixture(params=KINDS, scope="module")
def loaded(request: pytest.FixtureRequest, tiny_recipe, molecule_store: Path, tmp_path_factory, tiny_release: Path):
    """A potential of two fidelities with random numbers in all of its weights."""
    if not KINDS[request.param]:
        return load(tiny_release)
    import yaml

    folder = tmp_path_factory.mktemp("kinds")
    recipe = tiny_recipe(molecule_store, folder / "run")
    recipe["model"] = {**recipe["model"], **KINDS[request.param]}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    setup = prepare(load_recipe(Recipe, path))
    with torch.no_grad():
        for p in setup.potential.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return replace(
        load(tiny_release), spec=setup.spec, potential=setup.potential.eval().requires_grad_(False), contents=None
    )


def predictions(one, fidelity: str) -> list[outputs.Values]:
    structures = outputs.make_structures(one.spec)
    found = outputs.predict(one.potential.double(), one.spec, structures, fidelity)
    one.potential.float()
    return found


def same(a: list[outputs.Values], b: list[outputs.Values]) -> bool:
    return all(x.energy == y.energy and np.array_equal(x.forces, y.forces) for x, y in zip(a, b, strict=True))


def test_each_edit_leaves_the_others_as_they_are(loaded):
    names = {n: n for n in ("gfn2", "pbe")}
    added = edit.add(loaded, SCAN, "pbe")
    edit.require_same(loaded, added, {**names, "scan": "pbe"})
    assert added.fidelities.names == ("gfn2", "pbe", "scan")
    assert edit.tells_apart(added.spec.model), "a new fidelity must be able to become another one"
    copied = edit.copy(loaded, "gfn2", "second")
    edit.require_same(loaded, copied, {**names, "second": "gfn2"})
    assert copied.fidelities["second"].level_of_theory == "GFN2-xTB"
    assert copied.spec.label_counts["second"] == loaded.spec.label_counts["gfn2"]
    renamed = edit.rename(loaded, "gfn2", "xtb")
    edit.require_same(loaded, renamed, {"xtb": "gfn2", "pbe": "pbe"})
    dropped = edit.drop(loaded, "pbe")
    edit.require_same(loaded, dropped, {"gfn2": "gfn2"})
    assert loaded.fidelities.names == ("gfn2", "pbe"), "what was given has changed"


def test_references_of_its_own_shift_energies_alone(tiny_release: Path):
    loaded = load(tiny_release)
    shifted = loaded.spec.references.array(["pbe"])[0] + 1.0
    added = edit.add(loaded, SCAN, "pbe", shifted, "shifted by one")
    for a, b in zip(predictions(loaded, "pbe"), predictions(added, "scan"), strict=True):
        assert np.array_equal(a.forces, b.forces)
        assert b.energy - a.energy == pytest.approx(len(a.forces))
    assert added.spec.references.report["scan"]["reason"] == "shifted by one"


def test_an_edit_that_changes_predictions_is_refused(tiny_release: Path, tmp_path: Path):
    loaded = load(tiny_release)
    after = edit.drop(loaded, "pbe")
    with torch.no_grad():
        next(p for n, p in after.potential.named_parameters() if n.endswith("send.weights.0")).add_(1e-3)
    with pytest.raises(InputError, match="predictions differ from the reference outputs"):
        edit.save_edited(loaded, after, tmp_path / "new", "dropped 'pbe'")
    assert not (tmp_path / "new").exists()


def test_impossible_edits_are_told(tiny_release: Path, tmp_path: Path):
    loaded = load(tiny_release)
    for function, arguments, message in (
        (edit.drop, ("gfn2",), "base of its delta heads"),
        (edit.drop, ("scan",), "unknown fidelity 'scan'"),
        (edit.rename, ("pbe", "gfn2"), "has a fidelity 'gfn2' already"),
        (edit.copy, ("pbe", "gfn2"), "has a fidelity 'gfn2' already"),
        (edit.add, (SCAN, "b3lyp"), "unknown fidelity 'b3lyp'"),
    ):
        with pytest.raises(InputError, match=message):
            function(loaded, *arguments)
    single = load(save(tiny_release, tmp_path / "pbe", fidelity="pbe"))
    with pytest.raises(InputError, match="only fidelity"):
        edit.drop(single, "pbe")


def test_the_command_line_writes_releases(
    tiny_release: Path, molecule_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    before = load(tiny_release)
    steps = [
        ("add", tiny_release, "ccsdt", "--from", "pbe", "--store", molecule_store, "--output", "a"),
        ("rename", "a", "gfn2", "xtb", "--output", "b.safetensors"),
        ("copy", "b.safetensors", "ccsdt", "cc", "--output", "c"),
        ("drop", "c", "ccsdt", "--output", "d"),
    ]
    for step in steps:
        done = CliRunner().invoke(app, ["fidelity", *map(str, step)])
        assert done.exit_code == 0, done.exception
    after = load("d")
    assert after.fidelities.names == ("xtb", "pbe", "cc")
    assert after.fidelities["cc"].level_of_theory == "CCSD(T)/cc-pVDZ"
    assert after.spec.model.heads.base == "xtb"
    assert same(predictions(before, "gfn2"), predictions(after, "xtb"))
    assert [e.split()[0] for e in after.spec.provenance["release"]["edits"]] == [
        "added",
        "renamed",
        "copied",
        "dropped",
    ]
    inspection.require_within(inspection.check(after), after)
    refitted = after.spec.references
    assert refitted.report["cc"]["method"] == "refitted"
    assert abs(refitted.value("cc", "C") - before.spec.references.value("pbe", "C")) > 0.01
    refused = CliRunner().invoke(app, ["fidelity", "add", "d", "scan", "--from", "pbe", "--output", "e"])
    assert isinstance(refused.exception, InputError)
    assert "--store STORE" in str(refused.exception)
