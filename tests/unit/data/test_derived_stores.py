"""Stores made of stores: merged, part of one, split anew, copied to a node; and what is refused."""

import json
import shutil
from fractions import Fraction

import numpy as np
import pytest

from mffm.config.data import SplitSpec
from mffm.data import merge as merge_module
from mffm.data import statistics
from mffm.data.ingest import ingest
from mffm.data.merge import merge
from mffm.data.stage import stage
from mffm.data.store import Store
from mffm.data.subset import chosen_rows, split, subset
from mffm.errors import InputError

PBE = {"pbe": {"energy": "energy", "forces": "forces"}}


@pytest.fixture
def frames(structures):
    frames = [structures.crystal() for _ in range(40)] + [structures.molecule() for _ in range(20)]
    for i, frame in enumerate(frames):
        frame["info"] = {"name": f"f{i}", "series": f"s{i % 5}"}
    return frames


@pytest.fixture
def make(write_frames, data_config, tmp_path):
    """Return a function that ingests frames into a store."""

    def build(name, frames, **changes):
        write_frames(f"{name}.extxyz", frames)
        options = {"source_labels": PBE, "source_group_key": "series", "source_frame_key": "name", "shard_frames": 16}
        config = data_config(f"{name}.extxyz", **{**options, "cutoffs": [4.0], **changes})
        ingest(config, tmp_path, tmp_path / name, progress=False)
        return Store(tmp_path / name)

    return build


def by_id(store):
    """Return frame id → everything of the frame but where it was read from."""
    found = {}
    for row in range(store.n_frames):
        frame = store.frame(row)
        labels = {key: value.tolist() for key, value in frame.labels.items()}
        found[frame.frame_id] = (
            frame.atomic_numbers.tolist(), frame.positions.tolist(), frame.cell.tolist(), labels, frame.group,
            frame.charge, frame.spin_multiplicity, frame.weight, int(store.n_edges(4.0)[row]),
        )  # fmt: skip
    return found


def test_merge_is_the_ingest_of_all_files(make, frames, write_frames, data_config, tmp_path):
    """Halves that were ingested apart and merged hold what one ingest of both holds, with any number of workers."""
    first, second = make("first", frames[:30]), make("second", frames[30:])
    for workers in (1, 2):
        done = merge([first.path, second.path], tmp_path / f"merged-{workers}", workers, progress=False)
        assert (done.n_frames, done.n_merged, done.n_rejected, done.n_moves) == (60, 0, 0, 0)
    merged, again = Store(tmp_path / "merged-1"), Store(tmp_path / "merged-2")
    assert merged.fingerprint == again.fingerprint
    merged.verify()
    whole = make("whole", frames)
    assert by_id(merged) == by_id(whole)
    assert merged.geometry_fingerprint == whole.geometry_fingerprint
    assert [layer.name for layer in merged.layers] == ["set"]
    assert merged.manifest["statistics"] == whole.manifest["statistics"]
    assert merged.neighbor_histograms() == whole.neighbor_histograms()
    assert merged.manifest["made_from"]["stores"] == [["first", first.fingerprint], ["second", second.fingerprint]]
    assert not (merged.path / "staging.lmdb").exists()


def test_merge_joins_labels_and_keeps_structures_in_one_split(make, frames, tmp_path):
    high = [{k: v for k, v in f.items() if k != "forces"} | {"energy": f["energy"] - 3} for f in frames[20:50]]
    first = make("first", frames[:40])
    second = make("second", high, source_name="high", source_labels={"ccsdt": {"energy": "energy"}}, splits={"seed": 5})
    done = merge([first.path, second.path], tmp_path / "merged", progress=False)
    assert (done.n_frames, done.n_merged, done.n_rejected) == (50, 20, 0)
    merged = Store(tmp_path / "merged")
    assert (merged.has("pbe", "energy") & merged.has("ccsdt", "energy")).sum() == 20
    rows = merged.rows(fidelity="ccsdt")
    at = {merged.frame_id(row): row for row in range(50)}
    expected = [frames[int(merged.frame_id(row)[1:])]["energy"] - 3 for row in rows]
    np.testing.assert_allclose(merged.energies("ccsdt", rows), expected, atol=1e-8)
    for row in range(first.n_frames):
        assert merged.split_names[merged.split[at[first.frame_id(row)]]] == first.split_names[first.split[row]]
    moved = [
        second.frame_id(row)
        for row in range(second.n_frames)
        if second.split_names[second.split[row]] != merged.split_names[merged.split[at[second.frame_id(row)]]]
    ]
    assert done.n_moves == len(moved) > 0
    assert f"{second.path}:" in done.moves[0]


def test_merge_leaves_out_what_contradicts(make, frames, tmp_path):
    first = make("first", frames[:10])
    second = make("second", [*frames[5:9], frames[9] | {"energy": -99.0}])
    done = merge([first.path, second.path], tmp_path / "merged", progress=False)
    assert (done.n_frames, done.n_merged, done.n_rejected) == (10, 5, 1)
    (line,) = (tmp_path / "merged" / "rejected.jsonl").read_text().splitlines()
    assert "-99 contradicts" in json.loads(line)["reason"]
    assert json.loads(line)["index"] == 4


def test_merge_goes_on_where_it_stopped(make, frames, tmp_path, monkeypatch):
    first, second = make("first", frames[:30]), make("second", frames[30:])
    expected = merge([first.path, second.path], tmp_path / "merged", progress=False).fingerprint
    monkeypatch.setattr(merge_module, "COMMIT_FRAMES", 8)
    monkeypatch.setattr(merge_module, "CHUNK_FRAMES", 8)
    real, calls = merge_module._take, []

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 41:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(merge_module, "_take", stopped)
    with pytest.raises(KeyboardInterrupt):
        merge([first.path, second.path], tmp_path / "again", progress=False)
    with pytest.raises(InputError, match="unfinished"):
        Store(tmp_path / "again")
    with pytest.raises(InputError, match="unfinished merge of other stores"):
        merge([second.path, first.path], tmp_path / "again", progress=False)
    assert merge([first.path, second.path], tmp_path / "again", progress=False).fingerprint == expected
    assert len(calls) < 41 + 60  # what was done was not done again


def test_merge_refuses_what_does_not_go_together(make, frames, tmp_path):
    first = make("first", frames[:5])
    other = make("other", frames[5:9], fidelities={"pbe": {"level_of_theory": "PBE+U"}})
    source = make("source", frames[5:9], source_name="set2")
    shutil.copytree(source.path, tmp_path / "renamed")
    cases = [
        ([first.path, other.path], "'pbe' is 'PBE' in an earlier store and 'PBE\\+U' here"),
        ([first.path, first.path], "the same store twice"),
        ([first.path, tmp_path / "absent"], "no store there"),
    ]
    for stores, message in cases:
        with pytest.raises(InputError, match=message):
            merge(stores, tmp_path / "merged", progress=False)
        assert not (tmp_path / "merged").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not empty"):
        merge([first.path, source.path], tmp_path / "full", progress=False)


def test_subset_has_the_chosen_frames_with_everything(make, frames, tmp_path):
    store = make("whole", frames)
    rows = chosen_rows(store, elements=["C", "H"], fraction=0.5)
    part = subset(store, rows, tmp_path / "part", {"fraction": 0.5})
    assert part.n_frames == 10
    part.verify()
    everything = by_id(store)
    assert by_id(part) == {store.frame_id(row): everything[store.frame_id(row)] for row in rows.tolist()}
    splits = {store.frame_id(row): store.split_names[store.split[row]] for row in rows.tolist()}
    assert {part.frame_id(row): part.split_names[part.split[row]] for row in range(10)} == splits
    geometry, layers = statistics.of_store(part)
    assert geometry["frames"] == 10
    assert layers["set"]["pbe"]["energy"]["frames"] == 10
    assert part.manifest["made_from"]["fraction"] == 0.5
    with pytest.raises(InputError, match="exists and is not empty"):
        subset(store, rows, tmp_path / "part", {})


def test_what_a_subset_may_be_chosen_by(make, frames, tmp_path):
    for k in range(0, 60, 3):
        del frames[k]["forces"], frames[k]["energy"]
    frames[1]["info"]["series"] = "s1"
    store = make("whole", frames)
    names = [store.frame_id(row) for row in range(store.n_frames)]
    (tmp_path / "ids.txt").write_text("f7\nf55\n\n f2\n")
    (tmp_path / "bad.txt").write_text("f7\ng7\n")
    assert [names[row] for row in chosen_rows(store, ids=tmp_path / "ids.txt")] == ["f2", "f7", "f55"]
    assert len(chosen_rows(store, fidelities=["pbe"])) == 40
    assert len(chosen_rows(store, elements=["C", "H"])) == 20
    assert len(chosen_rows(store, elements=["C", "H", "O", "Si"])) == 60
    assert np.array_equal(chosen_rows(store, split="val"), store.rows("val"))
    few, more = chosen_rows(store, count=10), chosen_rows(store, count=25)
    assert len(few) == 10
    assert set(few) < set(more)
    assert set(chosen_rows(store, count=10, seed=1)) != set(few)
    cases = [
        ({"ids": tmp_path / "bad.txt"}, "no frame has the id 'g7', as 1 of 2 ids; ids look like 'f0'"),
        ({"fidelities": ["hf"]}, "ccsdt, pbe"),
        ({"elements": ["Xx"]}, "--elements Xx: not an element"),
        ({"elements": ["Au"]}, "no frame of 60 is left"),
        ({"fraction": 1.5}, "above 0, at most 1"),
        ({"fraction": 0.5, "count": 3}, "give one of them"),
        ({"split": "dev"}, "no split 'dev'"),
    ]
    for conditions, message in cases:
        with pytest.raises(InputError, match=message):
            chosen_rows(store, **conditions)


@pytest.mark.parametrize("by", ["structure", "group", "composition"])
def test_split_anew_tears_no_unit_apart(make, frames, tmp_path, by):
    store = make("whole", frames)
    spec = SplitSpec(fractions={"train": 0.5, "test": 0.5}, holdout={"ood": ["s3"]}, seed=3)
    new = split(store, tmp_path / "new", spec, by)
    assert new.split_names == ("test", "train", "ood")
    assert by_id(new) == by_id(store)
    new.verify()
    groups = np.array(new.group_names)[new.group]
    assert set(groups[new.rows("ood")]) == {"s3"}
    units = {
        "structure": list(range(new.n_frames)),
        "group": groups.tolist(),
        "composition": [frozenset(reduced(new, row)) for row in range(new.n_frames)],
    }[by]
    found: dict = {}
    for row in np.flatnonzero(new.split != 2).tolist():
        found.setdefault(units[row], set()).add(int(new.split[row]))
    assert all(len(splits) == 1 for splits in found.values())
    assert store.split_names == Store(store.path).split_names == ("test", "train", "val")
    Store(store.path).verify()
    assert new.fingerprint != store.fingerprint
    assert new.n_edges(4.0).tolist() == store.n_edges(4.0).tolist()
    with pytest.raises(InputError, match="--holdout ood=s9: no structure has that group"):
        split(store, tmp_path / "other", SplitSpec(holdout={"ood": ["s9"]}), by)


def reduced(store, row):
    numbers, counts = np.unique(store.geometry(row)[0], return_counts=True)
    return [(int(z), Fraction(int(c), int(counts.sum()))) for z, c in zip(numbers, counts, strict=True)]


def test_stage_copies_once_and_checks(make, frames, tmp_path, monkeypatch):
    store = make("whole", frames)
    done = stage(store, tmp_path / "node" / "copy")
    copy = Store(done.path)
    copy.verify()
    assert by_id(copy) == by_id(store)
    assert copy.fingerprint == store.fingerprint
    assert done.n_bytes > 0
    assert stage(store, tmp_path / "node" / "copy").n_bytes == 0
    other = make("other", frames[:9])
    with pytest.raises(InputError, match="holds another store, 'whole'"):
        stage(other, tmp_path / "node" / "copy")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(InputError, match="has room for 0"):
        stage(other, tmp_path / "node" / "second")
    monkeypatch.undo()
    path = other.path / "geometry" / "00000.lmdb"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"00000.lmdb: damaged: SHA-256"):
        stage(other, tmp_path / "node" / "second")
    assert sorted(p.name for p in (tmp_path / "node").iterdir() if p.is_dir()) == ["copy"]


def test_statistics_of_an_older_store_are_computed(make, frames):
    store = make("whole", frames)
    expected = statistics.of_store(store)
    for path in (store.path / "manifest.json", *store.path.glob("layers/*/layer.json")):
        content = json.loads(path.read_text())
        del content["statistics"]
        path.write_text(json.dumps(content))
    geometry, layers = statistics.of_store(Store(store.path))
    assert geometry == expected[0]
    assert layers["set"]["pbe"]["energy"]["squares"] == pytest.approx(expected[1]["set"]["pbe"]["energy"]["squares"])
    assert layers["set"]["pbe"]["forces"]["largest"] == expected[1]["set"]["pbe"]["forces"]["largest"]
