"""Ingest: splits, pairing, duplicates, bad sources, kills and full disks."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lmdb
import numpy as np
import pytest
import yaml

from mffm.config.data import SplitSpec
from mffm.data import records, staging
from mffm.data.ingest import Splitter, ingest
from mffm.data.report import kind_of
from mffm.data.store import Store
from mffm.errors import InputError


@pytest.fixture
def crystals(structures):
    frames = [structures.crystal() for _ in range(40)]
    for i, frame in enumerate(frames):
        frame["info"] = {"name": f"f{i}", "series": f"s{i % 4}"}
    return frames


def names(store):
    return [store.frame_id(r) for r in range(store.n_frames)]


def test_report(crystals, write_frames, data_config, tmp_path):
    bad = crystals[3] | {"energy": "nan"}
    write_frames("data.extxyz", [*crystals[:20], bad])
    report = ingest(data_config(cutoffs=[4.0]), tmp_path, progress=False)
    assert (report.n_frames, report.n_rejected, report.n_merged) == (20, 1, 0)
    assert report.label_counts["all"] == {"pbe": {"energy": 20, "forces": 20}}
    assert sum(report.split_frames.values()) == 20
    assert report.elements == {"C": 20, "O": 20, "Si": 20}
    assert "data.extxyz:20" in report.rejected_examples[0]
    text = report.path.read_text()
    for part in ("20 structures", "| pbe | forces | 20 |", "energy per atom", "data.extxyz:20", report.fingerprint):
        assert part in text
    (line,) = (tmp_path / "store" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["index"] == 20
    assert "nan" in json.loads(line)["reason"]
    assert not list((tmp_path / "store").glob("staging*"))


def test_again_does_nothing_and_another_yaml_is_refused(crystals, write_frames, data_config, tmp_path):
    write_frames("data.extxyz", crystals)
    first = ingest(data_config(), tmp_path, progress=False)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*") if p.is_file()}
    again = ingest(data_config(workers=2), tmp_path, progress=False)
    assert again.already_complete
    assert again.fingerprint == first.fingerprint
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*") if p.is_file()} == times
    ingest(data_config(cutoffs=[4.0]), tmp_path, progress=False)
    assert Store(tmp_path / "store").n_edges(4.0).sum() > 0
    with pytest.raises(InputError, match="another data YAML"):
        ingest(data_config(min_distance=0.2), tmp_path, progress=False)
    write_frames("data.extxyz", crystals[:-1])
    with pytest.raises(InputError, match="other source files"):
        ingest(data_config(), tmp_path, progress=False)


def test_fingerprint_is_of_the_content(crystals, write_frames, data_config, tmp_path):
    """Workers, folder and the time of day do not matter; a label does."""
    write_frames("data.extxyz", crystals * 8)
    a = ingest(data_config(shard_frames=7), tmp_path, tmp_path / "a", progress=False)
    b = ingest(data_config(shard_frames=7, workers=2), tmp_path, tmp_path / "b", progress=False)
    assert a.fingerprint == b.fingerprint
    crystals[5]["energy"] += 0.5
    write_frames("data.extxyz", crystals * 8)
    c = ingest(data_config(shard_frames=7), tmp_path, tmp_path / "c", progress=False)
    assert c.fingerprint != a.fingerprint
    assert Store(tmp_path / "a").geometry_fingerprint == Store(tmp_path / "c").geometry_fingerprint


# --- splits


def test_splits_follow_the_structure_not_its_neighbours(crystals, write_frames, data_config, tmp_path):
    """Another order and more frames move no structure to another split."""
    write_frames("data.extxyz", crystals[:25])
    ingest(data_config(source_frame_key="name"), tmp_path, tmp_path / "a", progress=False)
    write_frames("data.extxyz", crystals[::-1])
    ingest(data_config(source_frame_key="name"), tmp_path, tmp_path / "b", progress=False)
    a, b = Store(tmp_path / "a"), Store(tmp_path / "b")
    split_a = dict(zip(names(a), a.split.tolist(), strict=True))
    split_b = dict(zip(names(b), b.split.tolist(), strict=True))
    assert {k: split_b[k] for k in split_a} == split_a
    assert len(set(split_b.values())) == 3


def test_fractions_and_seed():
    units = [os.urandom(16) for _ in range(4000)]
    splitter = Splitter(SplitSpec(fractions={"train": 0.7, "val": 0.1, "test": 0.2}), [])
    drawn = [splitter.split("", "", u) for u in units]
    shares = dict(zip(splitter.names, np.bincount(drawn) / len(units), strict=True))
    assert shares == pytest.approx({"train": 0.7, "val": 0.1, "test": 0.2}, abs=0.04)
    written_otherwise = Splitter(SplitSpec(fractions={"test": 0.2, "train": 0.7, "val": 0.1}), [])
    assert [written_otherwise.split("", "", u) for u in units] == drawn
    other = Splitter(SplitSpec(seed=1), [])
    assert [other.split("", "", u) for u in units] != [splitter.split("", "", u) for u in units]


def test_groups_and_holdout_stay_together(crystals, write_frames, data_config, tmp_path):
    write_frames("data.extxyz", crystals)
    spec = {"by": "group", "holdout": {"ood": ["s2"]}, "fractions": {"train": 0.5, "test": 0.5}}
    ingest(data_config(source_group_key="series", splits=spec), tmp_path, progress=False)
    store = Store(tmp_path / "store")
    groups = np.array(store.group_names)[store.group]
    for group in ("s0", "s1", "s2", "s3"):
        assert len(set(store.split[groups == group].tolist())) == 1
    assert set(groups[store.rows("ood")]) == {"s2"}


def test_a_group_to_hold_out_that_does_not_exist_is_refused(crystals, write_frames, data_config, tmp_path):
    write_frames("data.extxyz", crystals)
    for group, remedy in (("s22", "is it s2"), ("typo", "groups: s0, s1, s2, s3")):
        config = data_config(source_group_key="series", splits={"holdout": {"ood": ["s1", group]}})
        with pytest.raises(
            InputError, match=rf"splits.holdout.ood: no structure has the group '{group}', of 4; {remedy}"
        ):
            ingest(config, tmp_path, progress=False)
    ingest(data_config(source_group_key="series", splits={"holdout": {"ood": ["s1"]}}), tmp_path, progress=False)


def test_formula_is_a_group_where_there_is_none(crystals, structures, write_frames, data_config, tmp_path):
    write_frames("data.extxyz", [*crystals[:3], structures.molecule()])
    ingest(data_config(source_group_key="formula", splits={"holdout": {"ood": ["CH4"]}}), tmp_path, progress=False)
    store = Store(tmp_path / "store")
    assert store.group_names == ["CO2Si", "CH4"]
    assert store.rows("ood").tolist() == [3]


def test_given_splits_and_the_leak_in_them(crystals, write_frames, data_config, tmp_path):
    """A structure that the source puts into two splits stays in the first, and the report says so."""
    for i, frame in enumerate(crystals):
        frame["info"]["part"] = "train" if i < 30 else "mine"
    leak = crystals[2] | {"info": {"part": "mine", "name": "again"}, "positions": crystals[2]["positions"] + 3e-4}
    write_frames("data.extxyz", [*crystals, leak])
    report = ingest(data_config(splits={"key": "part"}), tmp_path, progress=False)
    store = Store(tmp_path / "store")
    assert store.split_names == ("test", "train", "val", "mine")
    assert (len(store.rows("train")), len(store.rows("mine"))) == (30, 10)
    assert any("leak in the source: 1 frames" in w and "data.extxyz:40" in w for w in report.warnings)


# --- the same structure again


def two_files(crystals, write_frames):
    cheap = [dict(c.items()) for c in crystals[:30]]
    rng = np.random.default_rng(1)
    dear = [
        {k: v for k, v in c.items() if k != "forces"} | {"energy": c["energy"] - 7, "positions": c["positions"] + d}
        for c, d in zip(crystals[10:], rng.uniform(-3e-4, 3e-4, (30, 4, 3)), strict=True)
    ]
    write_frames("cheap.extxyz", cheap)
    write_frames("dear.extxyz", [dear[k] for k in rng.permutation(30)])


@pytest.mark.parametrize("by", ["key", "geometry"])
@pytest.mark.parametrize("as_sources", [False, True])
def test_pairing_of_two_files(crystals, write_frames, data_config, tmp_path, by, as_sources):
    """Labels of two files of one structure become one frame: by key within a source, by geometry across sources."""
    two_files(crystals, write_frames)
    (tmp_path / "dear.extxyz").write_text((tmp_path / "dear.extxyz").read_text().replace(" energy=", " cc="))
    key = {"frame_key": "name", "pair_by": "key"} if by == "key" else {"pair_by": "geometry"}
    cheap = {"pbe": {"energy": "energy", "forces": "forces"}}
    dear = {"ccsdt": {"energy": "cc"}}
    common = {"licence": "MIT", **key}
    if as_sources:
        sources = [
            {"name": "cheap", "path": "cheap.extxyz", "labels": cheap, **common},
            {"name": "dear", "path": "dear.extxyz", "labels": dear, **common},
        ]
    else:
        sources = [{"name": "both", "path": ["cheap.extxyz", "dear.extxyz"], "labels": cheap | dear, **common}]
    report = ingest(data_config(sources=sources, shard_frames=11), tmp_path, progress=False)
    store = Store(tmp_path / "store")
    assert (report.n_frames, report.n_merged, report.n_rejected) == (40, 20, 0)
    both = store.has("pbe", "energy") & store.has("ccsdt", "energy")
    assert both.sum() == 20
    rows = np.flatnonzero(both)
    np.testing.assert_allclose(store.energies("ccsdt", rows), store.energies("pbe", rows) - 7, atol=1e-8)
    if as_sources:
        assert [layer.name for layer in store.layers] == ["cheap", "dear"]
        assert len(store.rows(source="dear", fidelity="ccsdt")) == 30
        assert len(store.rows(source="dear")) == 30
        assert len(store.rows(source="cheap", fidelity="ccsdt")) == 0


def test_a_key_used_for_two_structures_is_rejected(crystals, write_frames, data_config, tmp_path):
    crystals[7]["info"]["name"] = "f2"
    write_frames("data.extxyz", crystals)
    report = ingest(data_config(source_frame_key="name", source_pair_by="key"), tmp_path, progress=False)
    assert report.n_rejected == 1
    assert "'f2' names another structure" in report.rejected_examples[0]


def test_conflicting_labels_are_rejected_with_both_values(crystals, write_frames, data_config, tmp_path):
    same = dict(crystals[4])
    other = crystals[5] | {"energy": -12.5}
    write_frames("data.extxyz", [*crystals[:10], same, other])
    report = ingest(data_config(), tmp_path, progress=False)
    assert (report.n_frames, report.n_merged, report.n_rejected) == (10, 1, 1)
    assert f"-12.5 contradicts {crystals[5]['energy']:.8g}" in report.rejected_examples[0]


def test_duplicate_policies(crystals, write_frames, data_config, tmp_path):
    write_frames("data.extxyz", [*crystals[:10], crystals[5] | {"energy": -12.5}])
    skip = ingest(data_config(duplicates="skip"), tmp_path, tmp_path / "skip", progress=False)
    assert (skip.n_frames, skip.n_merged, skip.n_rejected) == (10, 1, 0)
    store = Store(tmp_path / "skip")
    assert store.energies("pbe", [5])[0] == pytest.approx(crystals[5]["energy"])
    with pytest.raises(InputError, match=r"data.extxyz:10: the same structure as row 5"):
        ingest(data_config(duplicates="error"), tmp_path, tmp_path / "error", progress=False)


def test_identical_geometries_are_never_in_two_splits(crystals, write_frames, data_config, tmp_path):
    """Ten noisy, wrapped copies of each of forty structures are forty rows."""
    rng = np.random.default_rng(2)
    copies = []
    for _ in range(10):
        for c in crystals:
            moved = c["positions"] + rng.uniform(-2e-4, 2e-4, (4, 3)) + rng.integers(-1, 2, (4, 3)) @ c["cell"]
            copies.append(c | {"positions": moved})
    write_frames("data.extxyz", [copies[k] for k in rng.permutation(len(copies))])
    report = ingest(data_config(), tmp_path, progress=False)
    assert (report.n_frames, report.n_merged) == (40, 360)


def test_charge_and_spin_make_another_structure(structures, write_frames, data_config, tmp_path):
    molecule = structures.molecule()
    states = [(0, 1), (1, 2), (0, 3), (0, 1)]
    write_frames("data.extxyz", [molecule | {"info": {"q": q, "m": m}} for q, m in states])
    config = data_config(source_charge_key="q", source_spin_multiplicity_key="m")
    assert ingest(config, tmp_path, progress=False).n_frames == 3
    store = Store(tmp_path / "store")
    assert store.charge.tolist() == [0, 1, 0]
    assert store.spin_multiplicity.tolist() == [1, 2, 3]
    assert store.frame(1).charge == 1


# --- bad sources


def test_missing_file_and_variable(data_config, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"absent.extxyz: no such file"):
        ingest(data_config("absent.extxyz"), tmp_path, progress=False)
    with pytest.raises(InputError, match=r"no-\*.extxyz: no such file"):
        ingest(data_config("no-*.extxyz"), tmp_path, progress=False)
    monkeypatch.delenv("NOWHERE", raising=False)
    with pytest.raises(InputError, match="NOWHERE is not set"):
        ingest(data_config("${NOWHERE}/a.extxyz"), tmp_path, progress=False)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"source_labels": {"pbe": {"energy": "energy_pbe"}}},
        {"source_frame_key": "energy_pbe"},
        {"source_group_key": "energy_pbe"},
        {"source_charge_key": "energy_pbe"},
        {"splits": {"key": "energy_pbe"}},
    ],
)
def test_a_key_in_no_frame_lists_the_keys_and_leaves_nothing(crystals, write_frames, data_config, tmp_path, change):
    write_frames("data.extxyz", crystals)
    with pytest.raises(InputError, match=r"'energy_pbe'.*keys found: .*energy, forces"):
        ingest(data_config(**change), tmp_path, progress=False)
    ingest(data_config(), tmp_path, progress=False)


def test_empty_source(data_config, tmp_path):
    (tmp_path / "data.extxyz").write_text("\n")
    with pytest.raises(InputError, match="no frames; the source 'set' is empty"):
        ingest(data_config(), tmp_path, progress=False)


def test_every_frame_bad(crystals, write_frames, data_config, tmp_path):
    write_frames("data.extxyz", [c | {"cell": np.zeros((3, 3))} for c in crystals])
    with pytest.raises(InputError, match=r"no usable frame, 40 rejected; the first: .*:0: .*zero volume"):
        ingest(data_config(), tmp_path, progress=False)


def test_bad_frames_are_left_out_and_listed(crystals, write_frames, data_config, tmp_path):
    close = crystals[1]["positions"].copy()
    close[1] = close[0] + 0.1
    bad = {
        3: crystals[0] | {"energy": "nan"},
        5: crystals[1] | {"positions": close},
        8: crystals[2] | {"cell": np.zeros((3, 3))},
        9: crystals[3] | {"numbers": np.array([119, 8, 8, 6])},
        11: crystals[4] | {"forces": np.full((4, 3), np.inf)},
        12: crystals[5] | {"stress": [1.0] * 5},
    }
    frames = [bad.get(i, crystals[i]) for i in range(20)]
    write_frames("data.extxyz", frames)
    labels = {"pbe": {p: p for p in ("energy", "forces", "stress")}}
    report = ingest(data_config(source_labels=labels), tmp_path, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "store" / "rejected.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == sorted(bad)
    assert report.n_frames == 20 - len(bad)
    assert any("rejected" in w for w in report.warnings)
    with pytest.raises(InputError, match=r"data.extxyz:3: .*on_reject: stop"):
        ingest(data_config(on_reject="stop"), tmp_path, tmp_path / "b", progress=False)


def test_a_folder_as_path_and_a_damaged_frame_are_named(crystals, write_frames, data_config, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"folder: is a folder; name its files, e.g. folder/\*.extxyz"):
        ingest(data_config("folder"), tmp_path, progress=False)
    path = write_frames("data.extxyz", crystals[:3])
    path.write_text(path.read_text().replace("4\n", "9999\n", 1).replace(" energy=", " e=", 1))
    with pytest.raises(InputError, match=r"no frame has the key 'energy' .*; rejected: 1, the first .*:0: .*cut short"):
        ingest(data_config(), tmp_path, progress=False)


def test_warnings_say_why_and_what_is_missing(crystals, write_frames, data_config, tmp_path):
    write_frames("a.extxyz", [c | ({"energy": "nan"} if i < 4 else {}) for i, c in enumerate(crystals[:20])])
    report = ingest(data_config("a.extxyz"), tmp_path, progress=False)
    assert "20.0% of the frames were rejected, 4 of them for: energy (energy): nan;" in " ".join(report.warnings)
    assert "no frame has a label of fidelity ccsdt" in " ".join(report.warnings)


def test_kinds_of_reasons_leave_out_the_numbers():
    assert kind_of("atoms 0 and 1 are 0.1 Å apart") == kind_of("atoms 7 and 9 are 0.2 Å apart")
    assert kind_of("positions: 1e12 Å at [0, 1], farther") == "positions: … Å at … farther"


@pytest.mark.parametrize(("shift", "paired"), [(1e-5, True), (5e-3, False)])
def test_files_that_do_not_pair_are_a_warning(crystals, write_frames, data_config, tmp_path, shift, paired):
    write_frames("low.extxyz", crystals[:20])
    write_frames("high.extxyz", [c | {"positions": c["positions"] + shift * np.eye(4, 3)} for c in crystals[:20]])
    sources = [
        {"name": path, "path": f"{path}.extxyz", "licence": "MIT", "labels": {name: {"energy": "energy"}}}
        for path, name in (("low", "pbe"), ("high", "ccsdt"))
    ]
    report = ingest(data_config(sources=sources), tmp_path, progress=False)
    assert report.n_frames == (20 if paired else 40)
    assert any("no structure has labels of two fidelities" in w for w in report.warnings) is not paired


# --- kills and full disks


def run_ingest(folder: Path, extra: str = "") -> subprocess.Popen:
    code = (
        "import sys, yaml; from pathlib import Path; from mffm.config.data import DataConfig\n"
        "import mffm.data.ingest as m, mffm.data.staging as s\n"
        "m.COMMIT_FRAMES = 256\n"
        f"{extra}\n"
        f"folder = Path({str(folder)!r})\n"
        "config = DataConfig.model_validate(yaml.safe_load((folder / 'data.yaml').read_text()))\n"
        "print(m.ingest(config, folder, progress=False).fingerprint)"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


_LARGE: dict[str, str] = {}  # texts and fingerprint, made once


@pytest.fixture
def large(structures, write_frames, data_config, tmp_path):
    """2600 frames in two files that pair up, shards of 300, and the fingerprint of an ingest that nothing disturbed."""
    files = tmp_path / "a.extxyz", tmp_path / "b.extxyz"
    if _LARGE:
        for path in files:
            path.write_text(_LARGE[path.name])
    else:
        frames = [structures.crystal() for _ in range(1300)]
        write_frames("a.extxyz", frames)
        write_frames("b.extxyz", frames[::-1])
        files[1].write_text(files[1].read_text().replace(" energy=", " cc="))
    labels = {"pbe": {"energy": "energy", "forces": "forces"}, "ccsdt": {"energy": "cc"}}
    config = data_config(["a.extxyz", "b.extxyz"], source_labels=labels, shard_frames=300)
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    if not _LARGE:
        fingerprint = ingest(config, tmp_path, tmp_path / "undisturbed", progress=False).fingerprint
        _LARGE.update({path.name: path.read_text() for path in files}, fingerprint=fingerprint)
    return config, _LARGE["fingerprint"]


@pytest.mark.parametrize(
    "moment",
    ["commit 2", "commit 5", "write_shard 1", "publish 2", "publish 9", "publish 16", "write_json 1", "write_json 3"],
)
def test_killed_and_run_again(large, tmp_path, moment):
    """kill -9 while reading, between a shard and its commit, at the layers, at the manifest, at the report."""
    config, fingerprint = large
    name, number = moment.split()
    owner = {"commit": "s.Staging", "write_shard": "records", "publish": "records", "write_json": "records"}[name]
    extra = (
        "import os, signal; from mffm.data import records\n"
        f"real, calls = {owner}.{name}, []\n"
        "def killed(*a, **k):\n"
        "    result = real(*a, **k)\n"
        f"    calls.append(1)\n    if len(calls) == {number}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return result\n"
        f"{owner}.{name} = killed"
    )
    process = run_ingest(tmp_path, extra)
    process.communicate(timeout=100)
    assert process.returncode == -signal.SIGKILL
    if moment != "write_json 3":  # by then the manifest is there
        with pytest.raises(InputError, match="unfinished ingest"):
            Store(config.store)
    report = ingest(config, tmp_path, progress=False)
    assert report.fingerprint == fingerprint
    assert (report.n_frames, report.n_merged, report.n_rejected) == (1300, 1300, 0)
    store = Store(config.store)
    store.verify()
    assert not list(store.path.glob("staging*"))


def test_killed_with_workers(large, tmp_path):
    config, fingerprint = large
    content = yaml.safe_load((tmp_path / "data.yaml").read_text())
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(content | {"workers": 2}, sort_keys=False))
    process = run_ingest(tmp_path)
    deadline = time.monotonic() + 60
    while not (Path(config.store) / "geometry" / "00000.lmdb").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert ingest(config, tmp_path, progress=False).fingerprint == fingerprint


def test_two_at_a_time_are_refused(large, tmp_path, data_config):
    config, _ = large
    folder = Path(config.store)
    with staging.Staging(folder, 10, [["pbe"]], {"n_rows": 0}), pytest.raises(InputError, match="another ingest"):
        ingest(config, tmp_path, progress=False)


def test_full_disk_in_the_working_file(large, tmp_path, monkeypatch):
    config, fingerprint = large
    monkeypatch.setattr("mffm.data.ingest.COMMIT_FRAMES", 256)
    monkeypatch.setattr(staging, "MAP_BYTES", 400_000)
    with pytest.raises(InputError, match="no space left to write"):
        ingest(config, tmp_path, progress=False)
    monkeypatch.undo()
    assert ingest(config, tmp_path, progress=False).fingerprint == fingerprint


@pytest.mark.parametrize("number", [1, 4, 8])
def test_full_disk_at_a_shard(large, tmp_path, monkeypatch, number):
    config, fingerprint = large
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(1)
        if len(calls) >= number:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"no space left to write .*run the same command again"):
        ingest(config, tmp_path, progress=False)
    finished = {p: p.read_bytes() for p in (Path(config.store) / "geometry").glob("*.lmdb")}
    monkeypatch.undo()
    assert ingest(config, tmp_path, progress=False).fingerprint == fingerprint
    assert all(p.read_bytes() == content for p, content in finished.items())


def test_file_size_limit_is_a_full_disk(large, tmp_path):
    """A real write that the system refuses, through LMDB: the limit is set in a process of its own."""
    config, fingerprint = large
    extra = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))"
    )
    process = run_ingest(tmp_path, extra)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "InputError" in errors.splitlines()[-1]
    assert "no space left to write" in errors
    assert ingest(config, tmp_path, progress=False).fingerprint == fingerprint


def test_lmdb_full_errors_are_recognised(tmp_path):
    assert "no space" in str(records.disk_error(lmdb.MapFullError("x"), tmp_path))
    assert records.disk_error(ValueError("x"), tmp_path) is None
    assert "cannot be written" in str(records.disk_error(PermissionError(errno.EACCES, "denied"), tmp_path))


def test_a_folder_with_other_files_is_left_alone(crystals, write_frames, data_config, tmp_path):
    write_frames("data.extxyz", crystals)
    (tmp_path / "store" / "geometry").mkdir(parents=True)
    (tmp_path / "store" / "geometry" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        ingest(data_config(source_frame_key="absent"), tmp_path, progress=False)
    assert (tmp_path / "store" / "geometry" / "mine.txt").read_text() == "mine"


def test_folder_that_cannot_be_made(crystals, write_frames, data_config, tmp_path):
    write_frames("data.extxyz", crystals)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be"):
        ingest(data_config(), tmp_path, tmp_path / "file" / "store", progress=False)


def test_memory_does_not_grow_with_frames(structures, write_frames, data_config, tmp_path):
    """Peak memory of 6000 frames (5 MB of text and 3 MB of records) is within 4 MB of that of 1500."""
    frames = [structures.crystal() for _ in range(1500)]
    peaks = []
    for copies in (1, 4):
        folder = tmp_path / str(copies)
        folder.mkdir()
        every = [
            f | {"positions": f["positions"] + [[k * 0.01, 0, 0]] * np.eye(4, 1)} for k in range(copies) for f in frames
        ]
        write_frames(f"{copies}/data.extxyz", every)
        config = data_config(store=str(folder / "store"), shard_frames=500)
        (folder / "data.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        process = run_ingest(
            folder, "import atexit, resource, sys\natexit.register(lambda: print(resource.getrusage(0)[2]))"
        )
        output, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        peaks.append(int(output.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 4


@pytest.mark.skipif("MFFM_DATA" not in os.environ, reason="MFFM_DATA (folder of the published sets) is not set")
def test_published_sets(data_config, tmp_path):
    """The traps of the sets: 31 frames in both 3BPA files, three conflicts in MPtrj's highest stresses."""
    folder = os.environ["MFFM_DATA"]
    bpa = data_config(f"{folder}/botnet/dataset_3BPA/train*.xyz")
    report = ingest(bpa, tmp_path, tmp_path / "bpa", progress=False)
    assert (report.n_frames, report.n_merged) == (969, 31)
    assert all("which the data YAML declares" in w for w in report.warnings), "no finding but the unused fidelity"
    report = ingest(
        data_config(f"{folder}/mattersim_pbe/mptrj-highest*.xyz"), tmp_path, tmp_path / "mp", progress=False
    )
    assert report.n_rejected == 3
    assert all("contradicts" in line for line in report.rejected_examples)
