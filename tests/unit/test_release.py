"""Releases round-trip exactly, and refuse what is damaged, changed, newer or of another shape."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mffm.data.store import Store
from mffm.errors import InputError
from mffm.evaluate import parity
from mffm.release import licence_chain, load, save


@pytest.fixture
def copy(tiny_release: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_release, tmp_path / "copy"))


def test_round_trip_keeps_every_weight_and_reference(tiny_run: Path, tiny_release: Path):
    run, release = load(tiny_run), load(tiny_release)
    assert all((v == release.potential.state_dict()[k]).all() for k, v in run.potential.state_dict().items())
    torch.testing.assert_close(
        run.spec.reference_table(), release.spec.reference_table(), rtol=0, atol=0, equal_nan=True
    )
    assert release.fidelities.names == ("gfn2", "pbe")
    best = load_file(tiny_run / "weights" / "best.safetensors")
    assert all((best[k] == v).all() for k, v in release.potential.state_dict().items())


def test_no_pickle_and_everything_a_user_needs(tiny_release: Path):
    assert {p.name for p in tiny_release.iterdir()} == {
        "model.safetensors", "config.json", "fidelities.json", "provenance.json", "metrics.json", "README.md",
    }  # fmt: skip
    provenance = json.loads((tiny_release / "provenance.json").read_text())
    assert provenance["store_fingerprint"]
    assert provenance["sources"][0]["licence"] == "MIT"
    assert provenance["recipe"]["train"]["steps"] == 6
    card = (tiny_release / "README.md").read_text()
    for text in ("gfn2", "PBE/def2-SVP", "MIT", provenance["store_fingerprint"], "| C |", "no default fidelity"):
        assert text in card


def test_weights_of_a_run_are_chosen_by_name(tiny_run: Path):
    assert load(tiny_run, "raw").weights == "raw"
    with pytest.raises(InputError, match=r"no weights 'median'; it has: best, best-gfn2, best-pbe, last, raw"):
        load(tiny_run, "median")


def test_card_holds_the_errors_of_its_own_weights_only(tiny_run: Path, tmp_path: Path, molecule_store: Path):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    store = Store(molecule_store)
    for weights, split in (("best", "test"), ("raw", "val")):
        loaded = load(run, weights)
        parity.write(parity.evaluate(loaded, store, split), loaded, store, run)
    metrics = json.loads((save(run, tmp_path / "release") / "metrics.json").read_text())
    assert set(metrics) == {"test"}
    assert set(json.loads((save(run, tmp_path / "raw", "raw") / "metrics.json").read_text())) == {"val"}


def test_licences_of_what_it_was_fine_tuned_from_are_listed():
    base = {"sources": [{"name": "a", "licence": "CC-BY-4.0"}]}
    tuned = {"sources": [{"name": "b", "licence": "MIT"}], "start_from": {"provenance": base}}
    assert [s["name"] for s in licence_chain({"sources": [], "start_from": {"provenance": tuned}})] == ["b", "a"]


def test_existing_target_is_not_overwritten(tiny_run: Path, copy: Path):
    with pytest.raises(InputError, match="exists and is not empty"):
        save(tiny_run, copy)


@pytest.mark.parametrize("name", ["config.json", "fidelities.json", "model.safetensors"])
def test_truncated_file_is_named(copy: Path, name: str):
    os.truncate(copy / name, (copy / name).stat().st_size // 2)
    with pytest.raises(InputError, match=name):
        load(copy)


def test_tampered_weights_are_refused(copy: Path):
    state = load_file(copy / "model.safetensors")
    key = next(k for k, v in state.items() if v.numel() > 1)
    state[key] = state[key] + 1e-3
    save_file(state, copy / "model.safetensors")
    with pytest.raises(InputError, match="SHA-256 differs"):
        load(copy)


def test_newer_format_says_so(copy: Path):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "format_version": 99}))
    with pytest.raises(InputError, match=r"format version 99.*install a newer mffm"):
        load(copy)


def test_weights_of_another_shape_name_the_tensor(copy: Path):
    config = json.loads((copy / "config.json").read_text())
    config["model"]["backbone"]["channels"] = 12
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"does not fit its config.json; first differing tensor"):
        load(copy)


def test_not_a_release(tmp_path: Path):
    with pytest.raises(InputError, match="neither a release"):
        load(tmp_path)
