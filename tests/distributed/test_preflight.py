"""The preflight of two ranks: what differs between them, and sums that are wrong, are told once."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def test_ranks_that_are_not_alike(make_recipe: Callable[..., Path], tmp_path: Path):
    driver = str(Path(__file__).with_name("unlike.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", driver]
    done = subprocess.run(
        [*command, "train", "--preflight", str(make_recipe())], capture_output=True, text=True, timeout=200
    )
    assert "exitcode  : 2" in done.stderr, done.stderr
    said = done.stderr.partition("] failed (exitcode")[0]
    assert said.count("problem: ") == 2, said
    assert "problem: versions: mffm is " in said
    assert "but 0.0.9 on rank 1 (" in said
    assert "problem: all-reduce: the sum is wrong on rank(s) 1" in said
    checks = {c["name"]: c for c in json.loads((tmp_path / "run" / "preflight.json").read_text())["checks"]}
    assert checks["all-reduce"]["numbers"]["bytes_per_second"] > 1e6
    assert len(checks["memory"]["numbers"]["ranks"]) == 2
    assert not checks["disk"]["problem"]
