"""The line of the foundation model in miniature, on a few frames of the public sets: stopped, moved on, reported."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from ase import Atoms
from ase.io import write

from mffm.config.base import load, read_yaml
from mffm.config.recipe import Recipe
from mffm.data.store import Store
from mffm.errors import InputError

ROOT = Path(__file__).parents[3]
BACKBONE = {
    "lmax": 2, "l_message": 1, "layers": 1, "channels": 16, "edge_channels": 8, "n_radial": 4, "radial_hidden": 0,
    "ff_expansion": 1, "body_order": 3,
}  # fmt: skip
SOURCES = ("mpf_alkali", "matpes_r2scan", "s66x8")
FIDELITIES = ("pbe_mp", "r2scan_matpes", "wb97x_cartesian")
TRAIN = {
    "train.steps": 40, "train.compile": False, "train.log_every": 5, "data.plan.edge_budget": 3200,
    "model.backbone": BACKBONE, "data.validation_max_frames": 10,
}  # fmt: skip


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Arguments of the tool: three domains of the recipes as they ship, few sources, a small backbone."""
    from mffm.config.base import apply_overrides, as_overrides

    if "MFFM_DATA" not in os.environ:
        pytest.skip("MFFM_DATA is not set: the foundation model is made from the public sets in that folder")
    content = read_yaml(ROOT / "configs" / "data" / "foundation.yaml")
    content["sources"] = [s for s in content["sources"] if s["name"] in SOURCES]
    del content["splits"]["key"], content["splits"]["holdout"]["ood"]  # of other sources
    named = {k: v for k, v in content["fidelities"].items() if k in FIDELITIES}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({**content, "fidelities": named}))
    found = ["--data", str(tmp_path / "data.yaml"), "--folder", str(tmp_path / "out"), "--scale", "1", "--limit", "1"]
    for stage, name in (("direct", "foundation_direct"), ("recipe", "foundation")):
        recipe = read_yaml(ROOT / "configs" / f"{name}.yaml")
        pools = [p for p in recipe["data"]["plan"]["pools"] if p["fidelity"] in FIDELITIES]
        recipe = apply_overrides(recipe, as_overrides(TRAIN | {"data.plan.pools": pools}))
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        found += [f"--{stage}", str(tmp_path / f"{name}.yaml")]
    for task in ("matbench-discovery/wbm972=pbe_mp", "lambench/wiggle150-mini=wb97x_cartesian"):
        found += ["--task", task]
    return found


def start(arguments: list[str], *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tools" / "foundation.py"), *arguments, "--workers", "2", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def stopped(arguments: list[str], number: int, when: Path) -> str:
    """Start the tool, send it a signal once a run has a row of metrics, and return what it printed."""
    process = start(arguments)
    deadline = time.monotonic() + 300
    try:
        while not (when.is_file() and when.read_text()):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "no row of metrics in five minutes"
            time.sleep(0.02)
        process.send_signal(number)
        return process.communicate(timeout=240)[0]
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_line_in_miniature(arguments: list[str], tmp_path: Path):
    out = tmp_path / "out"
    told = stopped(arguments, signal.SIGTERM, out / "runs" / "mixture-direct" / "metrics.jsonl")
    assert "stopped and saved; the same command goes on" in told
    stopped(arguments, signal.SIGKILL, out / "runs" / "mixture" / "metrics.jsonl")  # its trainings live on
    done = start(arguments, "--docs", str(tmp_path / "docs"))
    text = done.communicate(timeout=600)[0]
    assert done.returncode == 0, text

    report = json.loads((tmp_path / "docs" / "report.json").read_text())
    assert report["resumed"] == 2
    assert "resumed from" in (out / "logs" / "mixture-direct.log").read_text()
    assert report["doctor"]["error"] == 0
    assert report["n_elements"] > 60
    assert {e["domain"] for e in report["errors"]} == set(FIDELITIES)
    by = {(e["domain"], e["property"]): e for e in report["errors"]}
    for e in report["errors"]:
        if e["ratio"] is not None:
            assert e["ratio"] == pytest.approx(e["mixture"] / e["specialist"])
            assert e["interval"][0] <= e["ratio"] <= e["interval"][1]
    assert by["wb97x_cartesian", "forces"]["ratio"] is not None
    assert by["pbe_mp", "stress"]["unit"] == "meV/Å³"
    assert "r2scan_matpes" in report["without_test"], "one structure an element: none is trained that is tested"
    runs = report["trainings"]
    assert set(runs) == {n + s for n in ("mixture", *FIDELITIES) for s in ("", "-direct")}
    for suffix in ("", "-direct"):
        shares = {n: runs[n + suffix]["share"] for n in FIDELITIES}
        assert sum(shares.values()) == pytest.approx(1)
        # the same work, so the same CPU time where a step of the same edges costs the same
        for n in FIDELITIES:
            assert runs[n + suffix]["steps"] == pytest.approx(shares[n] * runs["mixture" + suffix]["steps"], rel=0.6)
    assert all(row["cpu_minutes"] > 0 for row in runs.values())
    assert report["cpu_minutes"] == pytest.approx(sum(row["cpu_minutes"] for row in runs.values()))
    assert {row["task"]: row["n"] for row in report["benchmarks"]} == {
        "matbench-discovery/wbm972": 1, "lambench/wiggle150-mini": 1,
    }  # fmt: skip
    page = (tmp_path / "docs" / "report.md").read_text()
    assert "no domain is worse than its specialist by more than 10 %" in page
    assert "resumed 2 time(s)" in page
    for name in ("ratios.png", "parity.png"):
        assert (tmp_path / "docs" / name).read_bytes()[:4] == b"\x89PNG"
    metrics = json.loads((out / "release" / "metrics.json").read_text())
    assert {row["fidelity"] for row in metrics["test"]["rows"]} == set(FIDELITIES)

    before = {p: p.stat().st_mtime_ns for p in out.glob("runs/*/weights/*")}
    again = start(arguments)
    assert again.communicate(timeout=600)[0]
    assert again.returncode == 0
    assert {p: p.stat().st_mtime_ns for p in out.glob("runs/*/weights/*")} == before, "trained again"
    other = start([*arguments, "optim.lr=0.001"])
    assert "was begun with other recipes; give another --folder" in other.communicate(timeout=600)[0]


def test_a_training_that_draws_test_frames_is_refused(molecule_store: Path, tiny_recipe: Any, tmp_path: Path):
    import foundation

    store = Store(molecule_store)
    content = tiny_recipe(molecule_store, tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    line = foundation.Line(tmp_path, {}, foundation.domains_of(load(Recipe, tmp_path / "recipe.yaml")))
    foundation.refuse_leaks(foundation.plan_of(content, store), line, store, "mixture")
    content["data"]["plan"]["pools"][1]["split"] = "test"
    with pytest.raises(InputError, match=r"mixture: pool pbe.* trains \d+ test frames, the first .* split: train"):
        foundation.refuse_leaks(foundation.plan_of(content, store), line, store, "mixture")


def test_a_store_with_a_leak_is_refused(tmp_path: Path):
    import foundation

    first = Atoms("OH2", [[0, 0, 0.1], [0, 0.8, -0.5], [0, -0.7, -0.5]])
    frames = []
    for k in range(40):  # one structure, turned: no ingest merges it, so it falls into all splits
        frame = first.copy()
        frame.rotate(9 * k, "x")
        frame.info = {"frame_id": f"turned-{k}", "energy_gfn2": -137.0}
        frames.append(frame)
    write(tmp_path / "frames.extxyz", frames)
    content = {
        "store": "unused",
        "fidelities": {"gfn2": {"level_of_theory": "GFN2-xTB"}},
        "sources": [{
            "name": "one", "path": "frames.extxyz", "licence": "MIT", "frame_key": "frame_id",
            "labels": {"gfn2": {"energy": "energy_gfn2"}},
        }],
        "splits": {"fractions": {"train": 0.5, "test": 0.5}},
        "cutoffs": [5.0],
    }  # fmt: skip
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=r"leak: .*more than one split"):
        foundation.prepare(tmp_path, tmp_path / "data.yaml", 1)


def test_ratios_and_claims():
    from foundation_report import claims, compare

    def errors(sums: list[float], rows: list[int]) -> dict[str, Any]:
        return {"energy": {"rows": rows, "sums": sums, "counts": [1] * len(rows)}}

    found = {
        "mixture": {"domains": {
            "large": errors([2.0, 4.0, 9.0], [1, 2, 3]), "small": errors([1.0, 1.0], [5, 6]),
            "none": errors([3.0], [9]),
        }},
        "large": {"domains": {"large": errors([4.0, 1.0], [2, 1])}},
        "small": {"domains": {"small": errors([2.0, 2.0], [5, 6])}},
        "none": {"domains": {"none": {}}},
    }  # fmt: skip
    entries = compare({"large": 1000, "small": 10, "none": 10}, found)
    large, small, none = entries
    assert (large["mixture"], large["specialist"], large["n_test"]) == (3.0, 2.5, 2), "only frames that both predict"
    assert large["ratio"] == pytest.approx(1.2)
    assert small["interval"] == [0.5, 0.5]
    assert (none["mixture"], none["specialist"], none["ratio"]) == (3.0, None, None)
    (within, shown), (better, better_shown) = claims(entries)
    assert "so for 1 of 2 errors; not large energy 1.20" in within
    assert not shown
    assert better == "better in the domains of fewer than 300 training frames: so for 1 of 1 errors"
    assert better_shown
