"""The closed loop on labels that another store holds back: what it labels, what it trains, kills, bad input."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import active_loop
import forked
import numpy as np
import pytest

from mffm.data.store import Store
from mffm.keys import ENERGY

SHIPPED = Path(__file__).parents[3] / "data" / "molecules.extxyz"
EXIT_INPUT = 2


@pytest.fixture
def make(tmp_path: Path, molecule_store: Path, tiny_release: Path) -> Callable[..., Path]:
    """Return a function that writes a configuration with a store of its own and returns its path."""

    def write(name: str = "loop", **changes: Any) -> Path:
        return active_loop.write(tmp_path / name, molecule_store, tiny_release, **changes)

    return write


def start(config: Path, *overrides: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = ["-m", "mffm", "active", str(config), *overrides, "--folder", str(config.parent / "run")]
    return forked.run(command, **options)


def test_two_rounds_and_a_third(make: Callable[..., Path], molecule_store: Path):
    config = make()
    done = start(config)
    assert done.returncode == 0, done.stderr
    run, oracle, store = config.parent / "run", Store(molecule_store), Store(config.parent / "pool")
    held = json.loads((run / "held" / "chosen.json").read_text())["rows"]
    chosen = [json.loads((run / f"round-0{k}" / "chosen.json").read_text())["rows"] for k in (1, 2)]
    labelled = store.rows(fidelity="ccsdt")
    assert sorted([*held, *chosen[0], *chosen[1]]) == labelled.tolist()
    assert set(chosen[0] + chosen[1]) <= set(store.rows(split="train").tolist())
    assert [len(rows) for rows in chosen] == [4, 4]
    by_id = {oracle.frame_id(row): row for row in range(len(oracle.n_atoms))}
    same = [by_id[store.frame_id(row)] for row in labelled.tolist()]
    np.testing.assert_array_equal(store.energies("ccsdt", labelled), oracle.energies("ccsdt", np.array(same)))
    report = json.loads((run / "report.json").read_text())
    assert [found["n_labels"] for found in report["rounds"]] == [4, 8]
    assert report["rounds"][1]["rows"][0]["n_systems"] == 6
    assert "| 2 | 8 |" in (run / "report.md").read_text()
    assert (run / "report.png").stat().st_size > 5000
    before = active_loop.ends(config)
    again = start(config, "rounds=3")
    assert again.returncode == 0, again.stderr
    after = active_loop.ends(config)
    assert {key: after[key] for key in ("round-01", "round-02")} == {
        key: before[key] for key in ("round-01", "round-02")
    }
    assert len(after["round-03"][0]["rows"]) == 4
    other = start(config, "n=5")
    assert other.returncode == EXIT_INPUT
    assert "begun with n: 4, now 5" in other.stderr


@pytest.mark.slow
@pytest.mark.parametrize("by", ["maxdet"])
def test_kills_change_nothing(make: Callable[..., Path], by: str):
    undisturbed, killed = make("undisturbed", select={"by": by}), make("killed", select={"by": by})
    began = time.monotonic()
    assert start(undisturbed).returncode == 0
    lasted = time.monotonic() - began
    random.seed(0)
    command = [sys.executable, "-m", "mffm", "active", str(killed), "--folder", str(killed.parent / "run")]
    for _ in range(5):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(random.uniform(0.15, 0.6) * lasted)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = start(killed)
    assert done.returncode == 0, done.stderr
    assert active_loop.ends(killed) == active_loop.ends(undisturbed)


@pytest.mark.slow
def test_structures_without_a_label_are_not_chosen_again(make: Callable[..., Path], tmp_path: Path, build_store):
    """The oracle lacks a third of the structures."""
    text = SHIPPED.read_text().splitlines(keepends=True)
    frames, at = [], 0
    while len(frames) < 90:
        size = 2 + int(text[at])
        frames.append("".join(text[at : at + size]))
        at += size
    sparse = build_store(tmp_path / "sparse", "".join(f for i, f in enumerate(frames) if i % 3))
    config = make(label={"level": f"store:{sparse}@ccsdt"}, validation=14, test=12, n=12)
    done = start(config)
    assert done.returncode == 0, done.stderr
    chosen = [
        row for name, found in active_loop.ends(config).items() if name.startswith("round") for row in found[0]["rows"]
    ]
    assert len(set(chosen)) == len(chosen) == 24
    store = Store(config.parent / "pool")
    has = store.has("ccsdt", ENERGY)
    assert 0 < has[chosen].sum() < 24
    assert "failed" in done.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 60}, "split 'train' has 5"),
        ({"asked": "r2scan"}, "r2scan"),
        ({"label": {"level": "pbee"}}, "no such level"),
        ({"changes": {"data.plan.pools.0.fidelity": "pbe"}}, "no pool of 'ccsdt'"),
        ({"changes": {"data.store": "elsewhere"}}, "data.store is set by the loop itself"),
        ({"select": {"by": "disagreement"}}, "belong together"),
        ({"release": "nowhere"}, "nowhere"),
    ],
)
def test_bad_input_is_told_before_anything_is_labelled(make: Callable[..., Path], changes: dict, message: str):
    config = make(**changes)
    done = start(config)
    assert done.returncode == EXIT_INPUT, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "ccsdt" not in Store(config.parent / "pool").fidelities
