"""What ends a labelling from outside: kill -9, Ctrl-C, a full disk. The same command goes on; labels are the same."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mffm.data.store import Store

pytestmark = [pytest.mark.usefixtures("label_codes"), pytest.mark.timeout(1500)]

SHIPPED = Path(__file__).parents[3] / "data" / "molecules.extxyz"
LEVEL = "spgfn2"  # the shipped molecules have gfn2


def command(store: Path) -> list[str]:
    return [sys.executable, "-m", "mffm", "label", str(store), "--level", LEVEL]


def journal_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("journal/*.journal"))


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[bytes]", seconds: float = 600.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def labels_of(store: Store) -> list[tuple[int, bytes, bytes]]:
    rows = store.rows(fidelity=LEVEL)
    found = [(row, store.labels(row, LEVEL)) for row in rows.tolist()]
    return [(row, labels["energy"].tobytes(), labels["forces"].tobytes()) for row, labels in found]


@pytest.mark.slow
def test_five_kills_leave_the_labels_of_an_undisturbed_run(build_store: Callable[..., Path], tmp_path: Path) -> None:
    """Twice early, thrice anywhere in the work: the fingerprint of the layer is the same, and no label is lost."""
    text = SHIPPED.read_text()
    undisturbed = build_store(tmp_path, text)
    killed = tmp_path / "killed"
    shutil.copytree(undisturbed, killed)
    done = subprocess.run(command(undisturbed), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    n = Store(undisturbed).n_frames
    assert len(labels_of(Store(undisturbed))) == n
    size = sum(len(line) for line in (undisturbed / "layers" / LEVEL / "records.jsonl").read_text().splitlines())
    rng = random.Random(5)
    folder = killed / "layers" / f".labelling-{LEVEL}"
    kept = 0
    for moment in [0.0, 0.01, *sorted(rng.uniform(0.05, 0.95) for _ in range(3))]:
        process = subprocess.Popen(command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(lambda moment=moment: journal_bytes(folder) >= moment * size, process)  # type: ignore[misc]
        if moment == 0.0:
            time.sleep(rng.uniform(0, 2))
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was done before the kill"
        assert journal_bytes(folder) >= kept
        kept = journal_bytes(folder)
        Store(killed).verify()
        assert LEVEL not in Store(killed).fidelities, "nothing half done is in the store"
    assert kept > 0
    done = subprocess.run(command(killed), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert labels_of(Store(killed)) == labels_of(Store(undisturbed))
    assert Store(killed).fingerprint == Store(undisturbed).fingerprint
    records = [json.loads(line) for line in (killed / "layers" / LEVEL / "records.jsonl").read_text().splitlines()]
    assert {record["index"] for record in records} == set(range(n))
    assert len(records) < n + 5 * 2, "what was done was not done again"
    assert not folder.exists()
    again = subprocess.run(command(killed), capture_output=True, text=True, timeout=600)
    assert f"complete already: layer {LEVEL} has {n} labels" in again.stdout


def test_an_interrupt_keeps_what_is_done_and_a_dead_worker_is_replaced(molecule_store: Path, tmp_path: Path) -> None:
    path = tmp_path / "store"
    shutil.copytree(molecule_store, path)
    folder = path / "layers" / f".labelling-{LEVEL}"
    process = subprocess.Popen(command(path), stderr=subprocess.PIPE)
    wait_for(lambda: journal_bytes(folder) > 0, process)
    (journal,) = (folder / "journal").glob("*.journal")
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=200)
    if process.returncode == 75:  # not where it was faster than the signal
        assert b"interrupted; the same command goes on where it stopped" in error
        assert journal.stat().st_size > 0
    done = subprocess.run(command(path), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert len(labels_of(Store(path))) == 90


def test_a_full_disk_loses_nothing(molecule_store: Path, tmp_path: Path) -> None:
    path = tmp_path / "store"
    shutil.copytree(molecule_store, path)
    folder = path / "layers" / f".labelling-{LEVEL}"
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY)); "
        f"sys.argv = {['mffm', *command(path)[3:]]!r}; from mffm import cli; cli.main()"
    )
    full = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, timeout=400)
    assert full.returncode == 2
    assert "no space left to write" in full.stderr
    assert "run the same command again" in full.stderr
    assert "Traceback" not in full.stderr
    assert 0 < journal_bytes(folder) <= 20_000
    Store(path).verify()
    done = subprocess.run(command(path), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert len(labels_of(Store(path))) == 90
    records = (path / "layers" / LEVEL / "records.jsonl").read_text().splitlines()
    assert len(records) == 90, "what was written before the disk was full was kept, and nothing was computed twice"
