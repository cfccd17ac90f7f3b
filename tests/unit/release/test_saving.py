"""A release holds what its run had: weights, references, provenance; from checkpoints, folded, and written anew."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from mffm.data.store import Store
from mffm.errors import InputError
from mffm.evaluate import parity
from mffm.release import container, licence_chain, load, outputs, save

GOLDEN = Path(__file__).parents[2] / "golden"


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(v, b[k]) for k, v in a.items())


def test_round_trip_keeps_every_weight_and_reference(tiny_run: Path, tiny_release: Path):
    run, release = load(tiny_run), load(tiny_release)
    assert same_weights(run.potential.state_dict(), release.potential.state_dict())
    torch.testing.assert_close(
        run.spec.reference_table(), release.spec.reference_table(), rtol=0, atol=0, equal_nan=True
    )
    assert release.fidelities.names == ("gfn2", "pbe")
    assert same_weights(load_file(tiny_run / "weights" / "best.safetensors"), release.potential.state_dict())
    assert run.spec.documents()["fidelities.json"] == release.spec.documents()["fidelities.json"]


def test_no_pickle_and_everything_a_user_needs(tiny_release: Path):
    assert {p.name for p in tiny_release.iterdir()} == {
        "model.safetensors", "config.json", "fidelities.json", "provenance.json", "metrics.json", "outputs.json",
        "manifest.json", "README.md",
    }  # fmt: skip
    provenance = json.loads((tiny_release / "provenance.json").read_text())
    assert provenance["store_fingerprint"]
    assert provenance["sources"][0]["licence"] == "MIT"
    assert provenance["recipe"]["train"]["steps"] == 6
    assert len(provenance["mffm_source_sha256"]) == len(provenance["release"]["training_log_sha256"]) == 64
    (gfn2, pbe) = json.loads((tiny_release / "fidelities.json").read_text())["fidelities"]
    assert gfn2["references_report"]["method"] == "fit"
    assert set(pbe["references"]) == set(pbe["references_report"]["elements"])
    assert pbe["label_counts"] == {"energy": 20}
    card = (tiny_release / "README.md").read_text()
    for text in ("gfn2", "PBE/def2-SVP", "MIT", provenance["store_fingerprint"], "| C |", "no default fidelity"):
        assert text in card


def test_weights_of_a_run_are_chosen_by_name(tiny_run: Path):
    assert load(tiny_run, "raw").weights == "raw"
    with pytest.raises(InputError, match=r"no weights 'median'; it has: best, best-gfn2, best-pbe, last, raw"):
        load(tiny_run, "median")


def test_weights_that_are_not_there_are_not_replaced_by_others(tiny_run: Path, tiny_release: Path, tmp_path: Path):
    step = tiny_run / "checkpoints" / "step-00000003"
    assert load(step).weights == "last"
    with pytest.raises(InputError, match=r"a checkpoint has no weights 'best-pbe'; it has: last, raw"):
        load(step, "best-pbe")
    with pytest.raises(InputError, match=r"a release of the weights 'best', it has no 'raw'"):
        save(tiny_release, tmp_path / "raw", "raw")
    assert load(save(tiny_run, tmp_path / "raw", "raw"), "raw").weights == "raw"


@pytest.mark.parametrize(("weights", "file"), [("raw", "model"), ("last", "ema")])
def test_a_checkpoint_is_released_as_it_stands(tiny_run: Path, tmp_path: Path, weights: str, file: str):
    """What a killed run leaves: no weights/ of its end, a checkpoint of raw and averaged weights."""
    step = tiny_run / "checkpoints" / "step-00000003"
    release = load(save(step, tmp_path / weights, weights))
    assert same_weights(load_file(step / f"{file}.safetensors"), release.potential.state_dict())
    assert release.spec.provenance["release"]["from"] == "run/step-00000003"
    assert (release.weights, load(tmp_path / weights).weights) == (weights, weights)


def test_a_damaged_checkpoint_is_not_released(tiny_run: Path, tmp_path: Path):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    file = run / "checkpoints" / "step-00000003" / "ema.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"ema.safetensors: damaged"):
        save(file.parent, tmp_path / "release")


def test_card_holds_the_errors_of_its_own_weights_only(tiny_run: Path, tmp_path: Path, molecule_store: Path):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    store = Store(molecule_store)
    for weights, split in (("best", "test"), ("raw", "val")):
        loaded = load(run, weights)
        parity.write(parity.evaluate(loaded, store, split), loaded, store, run)
    metrics = json.loads((save(run, tmp_path / "release") / "metrics.json").read_text())
    assert set(metrics) == {"test"}
    assert set(json.loads((save(run, tmp_path / "raw", "raw") / "metrics.json").read_text())) == {"val"}
    (one,) = json.loads((save(run, tmp_path / "pbe", fidelity="pbe") / "metrics.json").read_text()).values()
    assert {row["fidelity"] for row in one["rows"]} == {"pbe"}


def test_licences_of_what_it_was_fine_tuned_from_are_listed():
    base = {"sources": [{"name": "a", "licence": "CC-BY-4.0"}]}
    tuned = {"sources": [{"name": "b", "licence": "MIT"}], "start_from": {"provenance": base}}
    assert [s["name"] for s in licence_chain({"sources": [], "start_from": {"provenance": tuned}})] == ["b", "a"]


def test_existing_target_is_not_overwritten(tiny_run: Path, tiny_release: Path):
    with pytest.raises(InputError, match="exists and is not empty"):
        save(tiny_run, tiny_release)


@pytest.mark.parametrize("fidelity", ["gfn2", "pbe"])
def test_folded_to_one_fidelity_it_predicts_the_same_for_less(tiny_release: Path, tmp_path: Path, fidelity: str):
    whole, one = load(tiny_release), load(save(tiny_release, tmp_path / fidelity, fidelity=fidelity))
    assert one.fidelities.names == (fidelity,)
    assert (one.spec.model.conditioning.kind, one.spec.model.heads.kind) == ("none", "shared")
    assert one.potential.n_parameters < whole.potential.n_parameters
    record = one.spec.provenance["release"]["folded"]
    assert record["largest_difference"] < 1e-12
    structures = outputs.make_structures(whole.spec)
    predict = [outputs.predictor(loaded.potential.double(), loaded.spec) for loaded in (whole, one)]
    a, b = (p(structures, fidelity) for p in predict)
    other = predict[0](structures, {"gfn2": "pbe", "pbe": "gfn2"}[fidelity])
    for x, y, z in zip(a, b, other, strict=True):
        assert y.energy == pytest.approx(x.energy, abs=1e-6)
        np.testing.assert_allclose(x.forces, y.forces, atol=1e-6)
        assert abs(z.energy - x.energy) > 1e-3
    assert record["from_fidelities"] == ["gfn2", "pbe"]
    with pytest.raises(InputError, match="unknown fidelity 'scan'"):
        save(tiny_release, tmp_path / "scan", fidelity="scan")


def test_a_folding_that_changes_predictions_is_refused(
    tiny_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from mffm.models.heads import Heads

    true = Heads.folded

    def wrong(self: Heads, fidelity: str, shift: torch.Tensor | None) -> Heads:
        heads = true(self, fidelity, shift)
        heads.mlp.biases[-1].add_(1e-6)
        return heads

    monkeypatch.setattr(Heads, "folded", wrong)
    with pytest.raises(InputError, match="folding to 'pbe' changes predictions by"):
        save(tiny_release, tmp_path / "pbe", fidelity="pbe")


def test_an_old_release_is_written_anew(tmp_path: Path):
    old = load(GOLDEN / "release-v1")
    new = load(save(GOLDEN / "release-v1", tmp_path / "new"))
    assert same_weights(old.potential.state_dict(), new.potential.state_dict())
    assert (old.contents.version, new.contents.version) == (1, 2)
    assert new.contents.documents["metrics.json"] == old.contents.documents["metrics.json"]
    assert new.spec.provenance["release"]["training_log_sha256"]
    assert new.spec.references.to_dict() == old.spec.references.to_dict()
    assert (
        new.spec.label_counts == old.spec.label_counts == {"gfn2": {"energy": 53, "forces": 53}, "pbe": {"energy": 20}}
    )


def test_both_forms_hold_the_same(tiny_release: Path, tmp_path: Path):
    single = save(tiny_release, tmp_path / "one.safetensors")
    a, b = load(tiny_release), load(single)
    assert same_weights(a.potential.state_dict(), b.potential.state_dict())
    assert same_weights(load_file(single), load_file(tiny_release / "model.safetensors"))  # any tool finds the weights
    assert a.contents.documents["outputs.json"] == b.contents.documents["outputs.json"]
    assert a.contents.manifest["weights_sha256"] == b.contents.manifest["weights_sha256"]
    again = load(save(single, tmp_path / "folder"))
    assert again.contents.documents["fidelities.json"] == a.contents.documents["fidelities.json"]
    assert set(again.contents.manifest["files"]) == set(a.contents.manifest["files"])


def test_front_matter_is_what_hubs_read(tiny_run: Path, tmp_path: Path, molecule_store: Path):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    loaded, store = load(run), Store(molecule_store)
    parity.write(parity.evaluate(loaded, store, "test"), loaded, store, run)
    text = (save(run, tmp_path / "release") / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    content = yaml.safe_load(front)
    assert (content["license"], content["library_name"]) == ("mit", "mffm")
    assert {"multi-fidelity", "pbe", "gfn2"} <= set(content["tags"])
    assert all(r["metrics"][0]["value"] > 0 for r in content["model-index"][0]["results"])
    assert body.startswith("\n# release\n")


@pytest.mark.parametrize(
    ("removed", "formula", "fidelity"),
    [((), "C2H6O", "pbe"), (("O",), "HN", "pbe"), (("H", "C", "N", "O"), "", "gfn2")],
)
def test_the_example_of_the_card_runs(
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    removed: tuple[str, ...],
    formula: str,
    fidelity: str,
):
    """Of a potential without some elements at pbe, or without energies there."""
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    file = run / "potential" / "fidelities.json"
    content = json.loads(file.read_text())
    for element in removed:
        del content["fidelities"][1]["references"][element]
    file.write_text(json.dumps(content))
    code = (save(run, tmp_path / "release") / "README.md").read_text().split("```")[1].removeprefix("python\n")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert names["atoms"].get_chemical_formula() == (formula or "C2H6O")
    assert f'fidelity="{fidelity}"' in code


def test_folders_of_the_training_machine_stay_there(tiny_run: Path, tmp_path: Path):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    file = run / "potential" / "provenance.json"
    content = json.loads(file.read_text())
    base = json.loads(file.read_text())
    content["recipe"]["start_from"] = "/home/somebody/base"
    content["start_from"] = {"path": "/home/somebody/base", "provenance": base}
    file.write_text(json.dumps(content))
    found = load(save(run, tmp_path / "release")).spec.provenance
    store = found["recipe"]["data"]["store"]
    assert store == content["recipe"]["data"]["store"]  # mffm evaluate opens it
    assert (found["recipe"]["run"], found["recipe"]["start_from"], found["start_from"]["path"]) == (
        "run",
        "base",
        "base",
    )
    text = json.dumps(found).replace(store, "")
    assert "/home/somebody" not in text
    assert str(tiny_run) not in text


def test_mixed_licences_are_not_passed_off_as_one():
    from mffm.release.card import front_matter

    spec = load(GOLDEN / "release-v1").spec
    spec.provenance["sources"] = [{"name": "a", "licence": "MIT"}, {"name": "b", "licence": "CC-BY-NC-4.0"}]
    content = front_matter("x", spec, {})
    assert (content["license"], content["license_name"]) == ("other", "CC-BY-NC-4.0 and MIT")


def test_a_write_that_fails_leaves_nothing(tiny_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(container, "write_bytes", full)
    with pytest.raises(InputError, match="cannot be written"):
        save(tiny_release, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
