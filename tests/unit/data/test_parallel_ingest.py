"""Ingest by several processes: the same store as by one, whatever the number, and after kill -9 at any moment."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from mffm.data import ingest as module
from mffm.data import parts
from mffm.data.ingest import ingest
from mffm.data.store import Store
from mffm.errors import InputError


@pytest.fixture
def two_files(structures, write_frames, data_config, tmp_path):
    """1000 frames in two files that pair up, of which 25 are bad; shards of 150."""
    frames = [structures.crystal() for _ in range(500)]
    for k, frame in enumerate(frames):
        frame["info"] = {"series": f"s{k % 7}"}
    write_frames("a.extxyz", [f | ({"energy": "nan"} if k % 20 == 0 else {}) for k, f in enumerate(frames)])
    write_frames("b.extxyz", frames[::-1])
    (tmp_path / "b.extxyz").write_text((tmp_path / "b.extxyz").read_text().replace(" energy=", " cc="))
    labels = {"pbe": {"energy": "energy", "forces": "forces"}, "ccsdt": {"energy": "cc"}}
    return data_config(
        ["a.extxyz", "b.extxyz"],
        source_labels=labels,
        source_group_key="series",
        shard_frames=150,
        cutoffs=[3.0],
    )


def content(folder: Path) -> dict[str, object]:
    """Return what may not depend on who did the work: every file but the report's duration and the store's name."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name == "ingest.md":
            continue
        found[str(path.relative_to(folder))] = (
            {k: v for k, v in json.loads(path.read_text()).items() if k not in ("seconds", "store", "name")}
            if path.suffix == ".json" and path.name != "groups.json"
            else path.read_bytes()
        )
    return found


@pytest.mark.timeout(900)  # twelve processes are started; on a busy machine each takes its time
@pytest.mark.parametrize("whole_files", [True, False])
def test_any_number_of_workers_makes_the_same_store(two_files, tmp_path, monkeypatch, whole_files):
    if not whole_files:
        monkeypatch.setattr(module, "_WHOLE_TEXT_BYTES", 0)
    expected = None
    for workers in (1, 3):
        folder = tmp_path / f"by-{workers}"
        report = ingest(two_files.model_copy(update={"workers": workers}), tmp_path, folder, progress=False)
        assert (report.n_frames, report.n_merged, report.n_rejected) == (500, 475, 25)
        found = content(folder)
        assert expected is None or found == expected
        expected = found
    assert not list(tmp_path.glob("by-*/**/*.tmp"))
    assert not list(tmp_path.glob("by-*/staging*"))


def test_statistics_of_the_pass_are_those_of_the_records(two_files, tmp_path):
    ingest(two_files, tmp_path, progress=False)
    store = Store(two_files.store)
    geometry = store.manifest["statistics"]
    sizes = np.bincount([len(store.geometry(row)[0]) for row in range(store.n_frames)])
    assert geometry["sizes"] == {str(n): int(c) for n, c in enumerate(sizes) if c}
    assert geometry["elements"] == {"6": 500, "8": 500, "14": 500}
    (layer,) = store.layers
    packed = store.read(np.arange(store.n_frames), "pbe")
    per_atom = packed.energy[packed.has_energy] / packed.n_atoms[packed.has_energy]
    energy = layer.meta["statistics"]["pbe"]["energy"]
    assert energy["frames"] == len(per_atom)
    assert energy["mean"] == pytest.approx(per_atom.mean(), rel=1e-12)
    assert energy["squares"] == pytest.approx(((per_atom - per_atom.mean()) ** 2).sum(), rel=1e-9)
    forces = layer.meta["statistics"]["pbe"]["forces"]
    assert forces["components"] == packed.forces[np.repeat(packed.has_forces, packed.n_atoms)].size
    assert forces["squares"] == pytest.approx((packed.forces.astype(float) ** 2).sum(), rel=1e-12)
    assert forces["largest"] == pytest.approx(np.abs(packed.forces).max())
    neighbors = np.rint(store.n_edges(3.0) / store.n_atoms).astype(int)
    assert store.neighbor_histograms() == {3.0: {str(k): int(n) for k, n in enumerate(np.bincount(neighbors)) if n}}


def test_what_was_read_and_then_lost_is_an_error(two_files, tmp_path, monkeypatch):
    """A part file that is gone when its shard is to be written stops the ingest with its name."""
    real = parts.sync

    def lost(folder, names):
        real(folder, names)
        for path in folder.glob("*.part"):
            path.unlink()

    monkeypatch.setattr(parts, "sync", lost)
    with pytest.raises(InputError, match=r"\.part: damaged \(the file is missing\); delete .* and ingest again"):
        ingest(two_files, tmp_path, progress=False)


def started(folder: Path, config, workers: int) -> subprocess.Popen:
    (folder / "data.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    code = (
        "import sys, yaml; from pathlib import Path; from mffm.config.data import DataConfig\n"
        "import mffm.data.ingest as m; m.COMMIT_FRAMES = 64\n"
        f"folder = Path({str(folder)!r})\n"
        "config = DataConfig.model_validate(yaml.safe_load((folder / 'data.yaml').read_text()))\n"
        f"m.ingest(config.model_copy(update=dict(workers={workers})), folder, progress=False)"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def killed_at_random(config, folder: Path, workers: int, seed: int, n_files: int) -> bool:
    """Start an ingest, kill it at a random moment of its work; return whether it was still at it.

    The moment is when it has written a random share of its files, and up to 20 ms later: starting processes and the
    report take longer than the work itself, which a moment drawn by the clock would seldom meet.
    """
    process = started(folder, config, workers)
    rng = random.Random(seed)
    most = rng.randint(2, n_files)
    store = Path(config.store)
    while process.poll() is None and count_files(store) < most:
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.02))
    hit = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return hit


def count_files(folder: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))


@pytest.fixture
def undisturbed(two_files, tmp_path):
    """The fingerprint of an ingest that nothing disturbed, and how many files it has."""
    report = ingest(two_files, tmp_path, tmp_path / "undisturbed", progress=False)
    return report.fingerprint, count_files(tmp_path / "undisturbed")


def check_killed(two_files, tmp_path, undisturbed, seeds) -> None:
    fingerprint, n_files = undisturbed
    hits = 0
    for seed in seeds:
        workers = 1 + seed % 2
        config = two_files.model_copy(update={"store": str(tmp_path / f"killed-{seed}"), "workers": workers})
        hits += killed_at_random(config, tmp_path, workers, seed, n_files)
        report = ingest(config, tmp_path, progress=False)
        assert report.fingerprint == fingerprint, f"seed {seed}"
        assert (report.n_frames, report.n_merged, report.n_rejected) == (500, 475, 25)
        Store(config.store).verify()
        left = [p.name for p in Path(config.store).rglob("*") if "staging" in p.name or p.suffix in (".tmp", ".part")]
        assert left == []
    assert hits >= len(seeds) // 2, f"{hits} of {len(seeds)} kills came before the end"


def test_killed_at_random_moments(two_files, tmp_path, undisturbed):
    check_killed(two_files, tmp_path, undisturbed, [1])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_twenty_random_moments(two_files, tmp_path, undisturbed):
    check_killed(two_files, tmp_path, undisturbed, range(2, 22))


def test_workers_end_with_a_killed_ingest(two_files, tmp_path):
    process = started(tmp_path, two_files, 2)
    children: list[int] = []
    deadline = time.monotonic() + 120
    while len(children) < 2 and process.poll() is None and time.monotonic() < deadline:
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        children = [int(pid) for pid in listed if b"spawn_main" in _command(int(pid))]
        time.sleep(0.002)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(b"spawn_main" in _command(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in children if b"spawn_main" in _command(pid)]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_part_files(tmp_path, monkeypatch):
    """Records come back from whichever part they lie in; a part ends beyond its size."""
    monkeypatch.setattr(parts, "PART_BYTES", 1000)
    payloads = [os.urandom(n) for n in (10, 0, 700, 900, 5, 1200, 1)]
    extents = [parts.append(tmp_path, [payload])[0] for payload in payloads]
    assert len({extent.part for extent in extents}) == len(list(tmp_path.glob("*.part"))) > 1
    parts.close(tmp_path)
    with parts.PartReader(tmp_path) as reader:
        assert [reader.get(*extent) for extent in extents] == payloads
        with pytest.raises(InputError, match="it ends before byte"):
            reader.get(extents[0].part, extents[0].offset, 10**6)
