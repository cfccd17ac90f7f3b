"""Differences of two fidelities: exact, of what a row has at both, wherever the labels lie; mistakes are one error."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mffm.config.data import DataConfig
from mffm.data.differences import add_difference
from mffm.data.ingest import ingest
from mffm.data.layers import add_labels
from mffm.data.store import Store
from mffm.errors import InputError

from .conftest import Structures

TABLE = {
    "lda": {"level_of_theory": "LDA", "code": "GPAW 25"},
    "pbe": {"level_of_theory": "PBE", "code": "GPAW 25"},
    "hf": {"level_of_theory": "HF"},
}


@pytest.fixture
def make_store(
    structures: Structures, write_frames: Callable[..., Path], data_config: Callable[..., DataConfig], tmp_path: Path
) -> Callable[..., Store]:
    """Return a function that makes a store of 12 frames at `lda`, and adds `pbe` to those of ``pairs`` as layers."""
    frames = [structures.crystal() if i % 2 else structures.molecule() for i in range(12)]
    for frame in frames:
        frame["energy"] -= 41_234.567891234  # as of all electrons
    properties = {p: p for p in ("energy", "forces", "stress")}

    def make(*pairs: range, **changes: Any) -> Store:
        write_frames("low.extxyz", frames)
        ingest(
            data_config("low.extxyz", fidelities=TABLE, source_labels={"lda": properties}, **changes),
            tmp_path,
            progress=False,
        )
        for n, chosen in enumerate(pairs):
            high = [frames[i] | {"energy": frames[i]["energy"] * 1.001 + 0.1234567890123 * i} for i in chosen]
            for frame in high:
                frame["forces"] = frame["forces"] * 1.1
                if "stress" in frame:
                    frame["stress"] = frame["stress"] + 0.01 * np.eye(3)
            write_frames(f"high-{n}.extxyz", high)
            config = data_config(
                f"high-{n}.extxyz", fidelities=TABLE, source_labels={"pbe": properties}, source_name=f"cc-{n}",
                source_licence="CC-BY-4.0",
            )  # fmt: skip
            add_labels(tmp_path / "store", config, tmp_path, f"high-{n}")
        return Store(tmp_path / "store")

    return make


@pytest.mark.parametrize("pairs", [(range(2, 9),), (range(2, 5), range(5, 9))], ids=["one layer", "two layers"])
def test_differences_are_exact_and_cover_what_has_both(make_store: Callable[..., Store], pairs: tuple[range, ...]):
    before = make_store(*pairs, shard_frames=3)
    assert add_difference(before.path, "pbe", "lda", "delta", "layer") == {"energy": 7, "forces": 7, "stress": 3}
    store = Store(before.path)
    store.verify()
    both = store.has("pbe", "energy")
    for prop in ("energy", "forces", "stress"):
        assert np.array_equal(store.has("delta", prop), store.has("pbe", prop) & store.has("lda", prop))
    rows = np.flatnonzero(both)
    assert np.array_equal(store.energies("delta", rows), store.energies("pbe", rows) - store.energies("lda", rows))
    packed = store.read(rows, "delta")
    assert np.array_equal(packed.energy, store.energies("delta", rows))
    for row in rows.tolist():
        high, low, found = (store.labels(row, name) for name in ("pbe", "lda", "delta"))
        assert set(found) == set(high) & set(low)
        exact = high["forces"].astype(np.float64) - low["forces"].astype(np.float64)
        assert np.array_equal(found["forces"], exact.astype(np.float32))
        if "stress" in found:
            assert np.array_equal(found["stress"], high["stress"] - low["stress"])


def test_the_fidelity_says_what_it_is_and_nothing_old_changes(make_store: Callable[..., Store]):
    before = make_store(range(12))
    add_difference(before.path, "pbe", "lda", "delta", "layer")
    store = Store(before.path)
    record = store.fidelities["delta"]
    assert record.level_of_theory == "PBE − LDA"
    assert (record.code, record.settings) == ("GPAW 25 − GPAW 25", "labels of pbe minus labels of lda")
    assert store.fidelities.names == (*before.fidelities.names, "delta")
    assert store.manifest["layers"][:-1] == before.manifest["layers"]
    old = [layer["name"] for layer in before.manifest["layers"]]
    assert Store(store.path, layers=old).fingerprint == before.fingerprint != store.fingerprint
    (source,) = [s for s in store.sources if s["name"] == "layer"]
    assert source["licence"] == "MIT; CC-BY-4.0", "labels inherit the licences of those they were made from"
    assert sorted(p.name for p in (store.path / "layers").iterdir()) == sorted([*old, "layer"])
    assert sorted(p.suffix for p in (store.path / "layers" / "layer").iterdir()) == [
        ".json", ".lmdb", ".npy", ".npy", ".npy"
    ]  # fmt: skip


def test_again_adds_what_was_labelled_since(
    make_store: Callable[..., Store], write_frames: Callable[..., Path], data_config: Callable[..., DataConfig]
):
    store = make_store(range(4))
    assert add_difference(store.path, "pbe", "lda", "delta", "delta")["energy"] == 4
    manifest = (store.path / "manifest.json").read_text()
    assert add_difference(store.path, "pbe", "lda", "delta", "delta") == {}
    assert (store.path / "manifest.json").read_text() == manifest
    store = Store(store.path)
    numbers, positions, _, _ = store.geometry(4)
    late = {"numbers": numbers, "positions": positions, "energy": -41_000.0, "forces": np.zeros((len(numbers), 3))}
    write_frames("late.extxyz", [late])
    config = data_config(
        "late.extxyz", fidelities=TABLE, source_name="late", source_labels={"pbe": {"energy": "energy"}}
    )
    add_labels(store.path, config, store.path.parent, "late")
    with pytest.raises(InputError, match="has a layer 'delta' already"):
        add_difference(store.path, "pbe", "lda", "delta", "delta")
    assert add_difference(store.path, "pbe", "lda", "delta", "delta-2") == {"energy": 1}
    assert Store(store.path).has("delta", "energy").sum() == 5


def test_faults(make_store: Callable[..., Store]):
    store = make_store(range(4), range(4, 6))
    mistakes = {
        ("scan", "lda", "delta", "delta"): "unknown fidelity 'scan'; known fidelities: hf, lda, pbe",
        ("pbe", "lsda", "delta", "delta"): "unknown fidelity 'lsda'",
        ("pbe", "pbe", "delta", "delta"): "pbe − pbe is zero everywhere; name two fidelities",
        ("pbe", "hf", "delta", "delta"): "no structure has a label of 'pbe' and of 'hf'.*pbe: 6 energy.*hf: none",
        ("pbe", "lda", "hf", "delta"): "fidelity 'hf' is there already as 'HF'.*choose another name",
        ("pbe", "lda", "delta", "high-0"): "has a layer 'high-0' already",
        ("pbe", "lda", "delta", "cc-0"): "has a source 'cc-0' already",
        ("pbe", "lda", "delta", "a/b"): "layer 'a/b': not a name",
    }
    manifest, folders = store.manifest, sorted((store.path / "layers").iterdir())
    for arguments, message in mistakes.items():
        with pytest.raises(InputError, match=message):
            add_difference(store.path, *arguments)
    assert json.loads((store.path / "manifest.json").read_text()) == manifest
    assert sorted((store.path / "layers").iterdir()) == folders
    add_difference(store.path, "pbe", "lda", "delta", "delta")
    with pytest.raises(InputError, match=r"'delta' is there already as 'PBE − LDA' \(labels of pbe minus"):
        add_difference(store.path, "lda", "pbe", "delta", "other")
