"""Verdicts on what was measured, and the comparison of runs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mffm.selftest import runs
from mffm.selftest.checks import interpolated, judge_environment, judge_parity
from mffm.selftest.machine import CheckFailedError


def case(stage: int, error: float, passed: bool = True) -> dict[str, Any]:
    return {
        "stage": stage, "model": "heads", "case": "no labels", "microbatches": 3,
        "gradient_error": error, "parameter_error": error / 2, "passed": passed, "seconds": 1.0,
    }  # fmt: skip


def test_parity_is_one_row_a_stage_and_fails_over_the_bound():
    good = judge_parity([case(0, 1e-7), case(2, 2e-7), case(2, 3e-7)], 1e-5)
    assert [(r.name, r.outcome) for r in good] == [
        ("gradient parity, ZeRO 0", "passed"), ("gradient parity, ZeRO 2", "passed")
    ]  # fmt: skip
    assert "2 cases: gradient 3.0e-07" in good[1].value
    assert [r.outcome for r in judge_parity([case(0, 1e-7)], 0.0)] == ["failed"]
    (bad,) = judge_parity([case(3, 1e-7), case(3, math.nan)], 1e-5)
    assert (bad.outcome, bad.reason) == ("failed", "1 over 1e-05, e.g. heads, no labels, 3 microbatch(es)")
    assert [r.outcome for r in judge_parity([case(1, 0.0, passed=False)], 1e-5)] == ["failed"]
    two = judge_parity([case(2, 0.0), {**case(2, 0.0), "offload": "optimizer"}], 1e-5)
    assert [r.name for r in two] == ["gradient parity, ZeRO 2", "gradient parity, ZeRO 2, offload optimizer"]
    with pytest.raises(CheckFailedError):
        judge_parity([], 1e-5)


def test_ranks_of_other_versions_fail():
    rank = {"rank": "0", "host": "a", "torch": "2.13", "deepspeed": "0.19", "device": "H100", "backend": "nccl",
            "compiler": "c++"}  # fmt: skip
    other = {**rank, "rank": "1", "host": "b"}
    assert judge_environment([rank, other], 2)[0].outcome == "passed"
    assert judge_environment([rank, other], 3)[0].outcome == "failed"
    (different,) = judge_environment([rank, {**other, "torch": "2.12"}], 2)
    assert (different.outcome, different.reason) == ("failed", "ranks differ in torch: 2.12, 2.13")


def test_all_reduce_between_and_above_the_sizes():
    rows = [{"bytes": 4, "seconds": 1.0}, {"bytes": 104, "seconds": 2.0}, {"bytes": 1004, "seconds": 4.0}]
    assert interpolated(rows, 1) == 1.0
    assert interpolated(rows, 54) == 1.5
    assert interpolated(rows, 2008) == 8.0


def row(step: int, loss: float, labels: float = 6.0) -> dict[str, float]:
    return {
        "step": step, "train/loss": loss, "grad_norm": 2 * loss, "labels/emt/energy": labels, "train/emt/energy": loss,
        "atoms_per_s": 100.0 * step, "edges_per_s": 5.0,
    }  # fmt: skip


def write(run: Path, rows: list[dict[str, float]]) -> runs.Rows:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 9, "val/loss": 1}\n{"st')
    return runs.training_rows(run)


def test_rows_of_two_runs(tmp_path: Path):
    whole = write(tmp_path / "a", [row(s, 1.0 / s) for s in (1, 2, 3, 4, 5, 6)])
    assert list(whole) == [1, 2, 3, 4, 5, 6]
    assert runs.rates(tmp_path / "a") == (550.0, 5.0)
    clock = write(tmp_path / "b", [{**row(s, 1.0 / s), "atoms_per_s": 7.0} for s in (1, 2, 3, 4, 5, 6)])
    assert runs.first_difference(clock, whole, range(1, 7), 0.0) is None
    near = write(tmp_path / "c", [row(s, (1 + 1e-6) / s) for s in (1, 2, 3, 4)])
    assert runs.first_difference(near, whole, range(1, 5), 1e-5) is None
    assert runs.largest_difference(near, whole, range(1, 5)) == pytest.approx(1e-6, rel=1e-3)
    assert "step 1: train/loss is 1.000001, not 1" in str(runs.first_difference(near, whole, range(1, 5), 0.0))
    assert runs.first_difference(near, whole, range(1, 7), 1e-5) == "step 5 is missing"
    other = write(tmp_path / "d", [row(1, 1.0), row(2, 0.5, labels=5.0)])
    assert runs.first_difference(other, whole, range(1, 3), 1e-2) == "step 2: labels/emt/energy is 5, not 6"
    assert runs.first_difference(other, whole, [1], math.inf) is None
    assert runs.mean_loss(other) == 0.75
    runs.cut_rows(tmp_path / "c", 2)
    assert list(runs.training_rows(tmp_path / "c")) == [1, 2]
    nan = write(tmp_path / "e", [row(1, math.nan)])
    assert runs.first_difference(nan, whole, [1], math.inf) is not None


def test_a_branch_is_the_run_as_it_stood(tiny_run: Path, tmp_path: Path):
    copy = runs.branch(tiny_run, tmp_path / "copy", 3, 5)
    assert runs.latest(copy) == 3
    assert runs.differing_files(copy, tiny_run, 3) == []
    assert not runs.checkpoint(copy, 6).exists()
    assert not (copy / "status.json").exists()
    assert "steps: 5" in (copy / "recipe.yaml").read_text()
    damaged = runs.checkpoint(copy, 3) / "ema.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert runs.differing_files(copy, tiny_run, 3) == ["ema.safetensors"]
