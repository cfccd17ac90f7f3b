"""The store: what is written comes back, opening is cheap and safe, damage is found."""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from mffm.data.edges import count_edges
from mffm.data.ingest import ingest
from mffm.data.layers import add_labels, warnings
from mffm.data.neighbors import count
from mffm.data.store import Store
from mffm.errors import InputError

PROPERTIES = ("energy", "forces", "stress")


@pytest.fixture
def crystals(structures):
    frames = [structures.crystal() for _ in range(23)]
    frames += [structures.molecule() for _ in range(7)]
    for i, frame in enumerate(frames):
        frame["info"] = {"name": f"f{i}", "kind": "crystal" if "cell" in frame else "molecule"}
        if i % 5 == 0:
            del frame["forces"]
    return frames


@pytest.fixture
def store(crystals, write_frames, data_config, tmp_path):
    write_frames("data.extxyz", crystals)
    labels = {"pbe": {p: p for p in PROPERTIES}}
    config = data_config(
        source_labels=labels, source_frame_key="name", source_group_key="kind", shard_frames=8, cutoffs=[4.0]
    )
    ingest(config, tmp_path, progress=False)
    return Store(tmp_path / "store")


def row_of(store, name):
    return next(r for r in range(store.n_frames) if store.frame_id(r) == name)


def test_frames_come_back(store, crystals):
    assert store.n_frames == len(crystals)
    assert len(store.manifest["geometry"]) == 4
    for i, expected in enumerate(crystals):
        row = row_of(store, f"f{i}")
        frame = store.frame(row)
        np.testing.assert_array_equal(frame.atomic_numbers, expected["numbers"])
        np.testing.assert_allclose(frame.positions, expected["positions"], atol=1e-9)
        np.testing.assert_allclose(frame.cell, expected.get("cell", np.zeros((3, 3))), atol=1e-9)
        assert frame.pbc.all() == ("cell" in expected)
        assert frame.group == expected["info"]["kind"]
        assert {p for _, p in frame.labels} == {p for p in PROPERTIES if p in expected}
        assert float(frame.labels["pbe", "energy"]) == pytest.approx(expected["energy"], abs=1e-9)
        if "forces" in expected:
            np.testing.assert_allclose(frame.labels["pbe", "forces"], expected["forces"], atol=1e-6)
        assert store.n_atoms[row] == len(expected["numbers"])


def test_packed_reading_is_reading_one_by_one(store):
    rows = np.random.default_rng(0).permutation(store.n_frames)
    packed = store.read(rows, "pbe")
    first = 0
    for k, row in enumerate(rows.tolist()):
        numbers, positions, cell, pbc = store.geometry(row)
        labels = store.labels(row, "pbe")
        n = len(numbers)
        np.testing.assert_array_equal(packed.atomic_numbers[first : first + n], numbers)
        np.testing.assert_array_equal(packed.positions[first : first + n], positions)
        np.testing.assert_array_equal(packed.cells[k], cell)
        np.testing.assert_array_equal(packed.pbc[k], pbc)
        assert packed.energy[k] == labels["energy"]
        assert packed.has_forces[k] == ("forces" in labels)
        assert packed.has_stress[k] == ("stress" in labels)
        np.testing.assert_array_equal(packed.forces[first : first + n], labels.get("forces", np.zeros((n, 3))))
        np.testing.assert_array_equal(packed.stress[k], labels.get("stress", np.zeros((3, 3))))
        first += n
    assert first == len(packed.positions)
    empty = store.read(np.zeros(0, np.int64), "pbe")
    assert len(empty.positions) == len(empty.energy) == 0


def test_columns(store, crystals):
    composition = store.composition(np.arange(store.n_frames))
    for row in range(store.n_frames):
        expected = np.bincount(store.geometry(row)[0], minlength=119)
        np.testing.assert_array_equal(composition[row], expected)
    assert store.has("pbe", "forces").sum() == sum("forces" in c for c in crystals)
    assert not store.has("ccsdt", "energy").any()
    energies = store.energies("pbe", np.array([3, 1]))
    assert energies.tolist() == [float(store.labels(r, "pbe")["energy"]) for r in (3, 1)]
    assert store.label_counts()["pbe"]["energy"] == store.n_frames
    assert sum(store.label_counts(s).get("pbe", {}).get("energy", 0) for s in store.split_names) == store.n_frames


def test_rows_by_condition(store):
    parts = [store.rows(split=s) for s in store.split_names]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(store.n_frames))
    assert np.array_equal(store.rows(source="set"), np.arange(store.n_frames))
    forces = store.rows(split="train", source="set", fidelity="pbe", prop="forces")
    trained = store.split == store.split_index("train")
    assert np.array_equal(forces, np.flatnonzero(trained & store.has("pbe", "forces")))
    assert len(store.rows(fidelity="ccsdt")) == 0
    for wrong, known in (({"split": "dev"}, "train"), ({"source": "x"}, "set"), ({"fidelity": "hf"}, "ccsdt, pbe")):
        with pytest.raises(InputError, match=known):
            store.rows(**wrong)


def test_edge_counts(store, tmp_path, monkeypatch):
    counts = store.n_edges(4.0)
    expected = [count(*store.geometry(r)[1:], 4.0) for r in range(store.n_frames)]
    assert counts.dtype == np.int32
    assert counts.tolist() == expected
    with pytest.raises(InputError, match=r"mffm edges .* --cutoff 5"):
        store.n_edges(5.0)
    count_edges(store.path, 5.0)
    assert (store.n_edges(5.0) >= counts).all()
    assert store.edges_fingerprint(5.0) != store.edges_fingerprint(4.0)
    monkeypatch.setenv("MFFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: "cache" in str(path))
    assert tmp_path / "cache" in count_edges(store.path, 6.0).parents
    assert (store.n_edges(6.0) >= store.n_edges(5.0)).all()


def test_processes_threads_and_copies(store):
    """Opened lazily in each process; forked, spawned and pickled stores read the same, as do threads."""
    expected = store.geometry(0)[1].tolist()
    again = pickle.loads(pickle.dumps(store))
    assert len(pickle.dumps(store)) < 500
    assert again.fingerprint == store.fingerprint
    for method in ("fork", "spawn"):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
            assert pool.submit(Store.frame, store, 0).result(60).positions.tolist() == expected
    found = []
    threads = [
        threading.Thread(target=lambda: found.append([store.geometry(r)[1].sum() for r in range(store.n_frames)]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(f == found[0] for f in found)


def test_views_outlive_the_store(store):
    path = store.path
    positions = Store(path).geometry(3)[1]
    expected = store.geometry(3)[1].copy()
    del store
    np.testing.assert_array_equal(positions, expected)


def test_nothing_is_written_by_reading(store):
    for root, _, files in os.walk(store.path, topdown=False):
        for file in files:
            os.chmod(os.path.join(root, file), 0o444)
        os.chmod(root, 0o555)
    before = sorted(p for p in store.path.rglob("*"))
    again = Store(store.path)
    again.frame(0)
    again.verify()
    assert sorted(p for p in store.path.rglob("*")) == before
    for root, _, _ in os.walk(store.path):
        os.chmod(root, 0o755)


def test_import_and_open_need_no_torch(store):
    code = (
        "import sys; from mffm.data.store import Store; import mffm.data.ingest, mffm.data.readers, mffm.data.layers;"
        f"s = Store({str(store.path)!r}); s.frame(0); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("file", ["geometry/00001.lmdb", "layers/set/labels-00000.lmdb"])
def test_truncated_shard_is_found_on_opening(store, file):
    path = store.path / file
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(InputError, match=f"{path.name}: it has .* the manifest says"):
        Store(store.path)
    path.unlink()
    with pytest.raises(InputError, match="missing"):
        Store(store.path)


@pytest.mark.parametrize("file", ["geometry/00002.lmdb", "layers/set/labels-00001.lmdb", "index/split.npy"])
def test_verify_names_the_damaged_file(store, file):
    store.verify()
    path = store.path / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path.name}: damaged"):
        Store(store.path).verify()


def test_verify_reads_edge_counts_and_groups(store):
    path = count_edges(store.path, 3.0)
    store.verify()
    counts = np.load(path)
    np.save(path, counts + 1)
    with pytest.raises(InputError, match=r"cutoff-3.npy: damaged; run `mffm edges .* --cutoff 3`"):
        Store(store.path).verify()
    np.save(path, counts)
    groups = store.path / "groups.json"
    groups.write_text("[]")
    with pytest.raises(InputError, match=r"groups.json: damaged: 0 names"):
        Store(store.path).verify()
    groups.write_text('["a", "b')
    with pytest.raises(InputError, match=r"groups.json: not valid JSON"):
        Store(store.path).verify()


def test_unknown_schema_version_and_no_store(store, tmp_path):
    manifest = store.path / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"schema_version": 99}))
    with pytest.raises(InputError, match="schema version 99"):
        Store(store.path)
    manifest.write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        Store(store.path)
    with pytest.raises(InputError, match="no store there"):
        Store(tmp_path / "nothing")


def extra_config(data_config, path, **changes):
    labels = changes.pop("source_labels", {"ccsdt": {"energy": "energy"}})
    return data_config(path, source_name="cc", source_labels=labels, **changes)


def test_units_of_a_layer_are_checked(store, crystals, write_frames, data_config, tmp_path):
    molecules = [{k: v for k, v in c.items() if k != "stress"} for c in crystals if "cell" not in c]
    for unit, factor in (("eV", 1.0), ("hartree", 1 / 27.211386)):
        write_frames("more.extxyz", [m | {"energy": m["energy"] * factor} for m in molecules])
        config = extra_config(data_config, "more.extxyz")
        if unit == "eV":
            assert not warnings(store.path, config)
            continue
        add_labels(store.path, config, tmp_path, unit)
        assert "look like Hartree read as eV" in " ".join(warnings(store.path, config))


@pytest.mark.parametrize("by", ["key", "geometry"])
def test_a_layer_is_added_and_changes_nothing_old(store, crystals, write_frames, data_config, tmp_path, by):
    some = [c | {"energy": c["energy"] + 5} for c in crystals[4:20]]
    stranger = crystals[0] | {"info": {"name": "new"}, "positions": crystals[0]["positions"] + [0.1, 0, 0]}
    stranger["positions"][0] += 0.2
    write_frames("more.extxyz", [*some, stranger])
    before = store.manifest
    geometry = {p.name: p.read_bytes() for p in (store.path / "geometry").iterdir()}
    key = {"source_frame_key": "name", "source_pair_by": "key"} if by == "key" else {}
    numbers = add_labels(store.path, extra_config(data_config, "more.extxyz", **key), tmp_path, "cc-layer")
    assert numbers == {"rows": 16, "repeated": 0, "rejected": 1}
    after = Store(store.path)
    after.verify()
    assert after.geometry_fingerprint == store.geometry_fingerprint
    assert after.manifest["layers"][0] == before["layers"][0]
    assert after.manifest["geometry"] == before["geometry"]
    assert {p.name: p.read_bytes() for p in (store.path / "geometry").iterdir()} == geometry
    assert Store(store.path, layers=["set"]).fingerprint == store.fingerprint != after.fingerprint
    assert after.has("ccsdt", "energy").sum() == 16
    rows = after.rows(source="cc", fidelity="ccsdt")
    np.testing.assert_allclose(after.energies("ccsdt", rows), after.energies("pbe", rows) + 5, atol=1e-9)
    np.testing.assert_allclose(after.read(rows, "ccsdt").energy, after.energies("ccsdt", rows))
    assert "new" in (store.path / "layers" / "cc-layer" / "rejected.jsonl").read_text() or by == "geometry"
    assert np.array_equal(after.n_edges(4.0), store.n_edges(4.0))


def test_faults_of_a_layer(store, crystals, write_frames, data_config, tmp_path):
    write_frames("more.extxyz", crystals[:3])
    config = extra_config(data_config, "more.extxyz")
    with pytest.raises(InputError, match="has a layer 'set' already; layers: set"):
        add_labels(store.path, config, tmp_path, "set")
    with pytest.raises(InputError, match="layer 'a/b': not a name"):
        add_labels(store.path, config, tmp_path, "a/b")
    keys = extra_config(data_config, "more.extxyz", source_labels={"ccsdt": {"energy": "energy", "forces": "force"}})
    with pytest.raises(InputError, match=r"no frame has the key 'force' \(labels.ccsdt.forces.*keys found: .*energy"):
        add_labels(store.path, keys, tmp_path, "new")
    (tmp_path / "empty.extxyz").write_text("")
    with pytest.raises(InputError, match=r"empty.extxyz: no frames"):
        add_labels(store.path, extra_config(data_config, "empty.extxyz"), tmp_path, "new")
    other = extra_config(data_config, "more.extxyz", fidelities={"ccsdt": {"level_of_theory": "HF"}})
    with pytest.raises(InputError, match="'HF' here"):
        add_labels(store.path, other, tmp_path, "new")
    write_frames("more.extxyz", [crystals[0] | {"positions": crystals[0]["positions"] * 1.1}])
    with pytest.raises(InputError, match="no structure of the store has this geometry"):
        add_labels(store.path, config, tmp_path, "new")
    contradicting = data_config("more.extxyz", source_name="again")
    write_frames("more.extxyz", [crystals[1] | {"energy": -3.0}, crystals[2]])
    with pytest.raises(InputError, match="-3 contradicts"):
        add_labels(store.path, contradicting, tmp_path, "new")
    assert [p.name for p in (store.path / "layers").iterdir()] == ["set"]
    with pytest.raises(InputError, match="no label layer 'x'; layers: set"):
        Store(store.path, layers=["x"])
