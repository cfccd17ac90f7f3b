"""Files that name frames of a store: for labels, for subsets, for the pools of a recipe."""

import re
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import write

from mffm.config.recipe import PlanConfig
from mffm.data import pools as module
from mffm.data.named import rows_in, rows_named
from mffm.data.plan import Plan
from mffm.data.pools import build_pools
from mffm.data.store import Store
from mffm.errors import InputError


def structures(path: Path, *ids: str | None) -> Path:
    write(path, [Atoms("H", info={} if i is None else {"frame_id": i}) for i in ids])
    return path


def test_ids_and_structures_name_rows(molecule_store: Path, tmp_path: Path):
    store = Store(molecule_store)
    rows = [70, 3, 12]
    ids = [store.frame_id(row) for row in rows]
    (tmp_path / "ids.txt").write_text("\n".join([*ids, "", ids[0]]) + "\n")
    for file in (tmp_path / "ids.txt", structures(tmp_path / "selected.extxyz", *ids)):
        assert rows_in(store, file).tolist() == sorted(rows)
    assert rows_named(store, []).tolist() == []


def test_files_that_name_nothing(molecule_store: Path, tmp_path: Path):
    store = Store(molecule_store)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "cut.extxyz").write_text("5\nProperties=species:S:1:pos:R:3\nH 0 0 0\n")
    files = [
        (
            structures(tmp_path / "none.extxyz", store.frame_id(0), None),
            "frame 1: has no frame_id; choose from this store",
        ),
        (
            structures(tmp_path / "other.extxyz", "unheard-of"),
            "no frame has the id 'unheard-of', as 1 of 1 ids; ids look",
        ),
        (tmp_path / "empty.txt", "names no frame; expected frame ids"),
        (tmp_path / "absent.txt", "no such file; expected frame ids"),
        (
            tmp_path / "cut.extxyz",
            "Frame has 1 atoms, expected 5); expected frame ids",
        ),
    ]
    for file, message in files:
        with pytest.raises(InputError, match=rf"{file.name}: .*{re.escape(message)}|{file.name}: {re.escape(message)}"):
            rows_in(store, file)


def test_a_pool_of_named_frames(molecule_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = Store(molecule_store)
    train, test = store.rows(split="train", fidelity="pbe"), store.rows(split="test")
    named = [*train[[2, 5, 11, 17]].tolist(), int(test[0])]  # what is of another split is not the pool's
    path = tmp_path / "ids.txt"
    path.write_text("\n".join(store.frame_id(row) for row in named))

    def pool(**changes):
        entry = {"fidelity": "pbe", "only": str(path), **changes}
        config = PlanConfig(pools=[entry], edge_budget=5000)
        return build_pools(store, config, store.fidelities, 4.0)[0], config

    found, config = pool()
    assert found.rows.tolist() == sorted(named[:4])
    assert found.label_counts == {"energy": 4, "forces": 4}
    assert len(pool(max_frames=3)[0]) == 3
    assert Plan([found], config, 0).fingerprint != Plan([pool(only=None)[0]], config, 0).fingerprint
    with pytest.raises(InputError, match=r"pools.0.only: none of the frames that .*ids.txt names is in split 'val'"):
        pool(split="val")
    monkeypatch.setattr(module, "LARGE", 1)  # kept in files: another choice under the same name is another pool
    monkeypatch.setenv("MFFM_CACHE", str(tmp_path / "cache"))
    assert np.array_equal(pool()[0].rows, found.rows)
    path.write_text(store.frame_id(named[0]))
    assert pool()[0].rows.tolist() == named[:1]
