"""``mffm selftest`` on two gloo ranks of this machine, and on one that cannot start a job."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


def outcomes(folder: Path) -> dict[str, str]:
    return {r["name"]: r["outcome"] for r in json.loads((folder / "selftest.json").read_text())["results"]}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_checks_pass_here(run_mffm: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path):
    done = run_mffm("selftest", "--quick", "--folder", "selftest", cwd=tmp_path, timeout=580)
    assert set(outcomes(tmp_path / "selftest").values()) == {"passed"}, done.stdout + done.stderr
    assert {
        "kill -9 of a rank, resume",
        "preemption",
        "elastic resume, 2 → 1 → 2 ranks",
        "gradient parity, ZeRO 2",
    } <= (outcomes(tmp_path / "selftest").keys())
    assert done.returncode == 0
    assert "expect: " in done.stdout
    assert "edges/s" in (tmp_path / "selftest" / "selftest.md").read_text()


def test_a_machine_that_starts_nothing_fails_with_the_reason(
    run_mffm: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
):
    clusters = tmp_path / "configs" / "clusters"
    clusters.mkdir(parents=True)
    (clusters / "broken.yaml").write_text(
        "{executor: local, tasks_per_node: 2, setup: ['echo no module cuda >&2; false']}"
    )
    done = run_mffm("selftest", "--cluster", "broken", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    found = outcomes(tmp_path / "runs" / "selftest")
    assert {name for name, outcome in found.items() if outcome == "failed"} == {
        "environment", "1 and 2 ranks train alike", "gradient parity"
    }  # fmt: skip
    assert "passed" not in found.values()
    assert "nothing was started" in done.stdout
    unknown = run_mffm("selftest", "--cluster", "other", cwd=tmp_path)
    assert unknown.returncode == 2
    assert "not one of configs/clusters in this folder: broken" in unknown.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    refused = run_mffm("selftest", "--cluster", "broken", "--folder", "mine", cwd=tmp_path)
    assert refused.returncode == 2
    assert "holds something else than a self-test" in refused.stderr
    assert (tmp_path / "mine" / "thesis.txt").exists()
