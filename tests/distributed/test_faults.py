"""A rank that dies ends the job promptly, with one report that names it; the run then goes on."""

import time
from collections.abc import Callable
from pathlib import Path

import forked
import pytest

from mffm.training import checkpoint

DRIVER = str(Path(__file__).with_name("failing.py"))
PROMPTLY = 150.0  # seconds for a whole start of two ranks that fails; alone on two cores it takes 15, a hang 600


def torchrun(*arguments: str) -> tuple[int, str, str, float]:
    """Start two ranks; return exit code, what they said, what torchrun added to it, and seconds."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    started = time.monotonic()
    done = forked.run(command, timeout=200)
    said, mark, added = (done.stdout + done.stderr).partition("] failed (exitcode")
    return done.returncode, said, mark + added, time.monotonic() - started


def new_report(run: Path, known: list[Path]) -> str:
    """Return the one report that a start has left."""
    found = [p for p in (run / "failures").iterdir() if p not in known]
    assert len(found) == 1, found
    known += found
    return found[0].read_text()


def newest_step(run: Path) -> int:
    found = checkpoint.newest_whole(run / "checkpoints")
    assert found is not None
    assert found[2] == []
    return found[1].step


@pytest.mark.timeout(400)
def test_a_failing_rank_is_reported_once_and_the_run_goes_on(make_recipe: Callable[..., Path], tmp_path: Path):
    run, known = tmp_path / "run", []
    recipe = make_recipe(train={"steps": 9, "save_every": 3, "validate_every": 9})

    code, said, added, seconds = torchrun(DRIVER, "raise", "4", "train", str(recipe))
    assert code != 0
    assert seconds < PROMPTLY
    report = new_report(run, known)
    assert report.startswith("rank 1 of 2 on "), report
    assert "died: KeyError: 'the cause'" in report
    assert "last finished step 4, newest checkpoint step 3" in report
    assert f"go on with: mffm resume {run}" in report
    assert "in failing_step" in report
    assert said.count("Traceback (most recent call last)") == 1, said
    assert said.count("rank 0 of 2 on ") == 1, said
    assert "ends because of another: rank 1 of 2 on " in said
    assert "rank      : 1" in added.partition("Root Cause")[2], added
    assert newest_step(run) == 3

    code, said, added, seconds = torchrun(DRIVER, "kill", "7", "resume", str(run))
    assert code != 0
    assert seconds < PROMPTLY
    report = new_report(run, known)
    assert report.startswith("rank 1 of 2 on "), report
    assert "is gone and left no report" in report
    assert "last finished step 7, newest checkpoint step 6" in report
    assert said.count("Traceback (most recent call last)") == 0, said
    assert newest_step(run) == 6

    code, said, added, _ = torchrun(DRIVER, "input", "6", "resume", str(run))
    assert code != 0
    assert said.count("error: this step is bad input") == 1, said
    assert "exitcode  : 2" in added
    assert new_report(run, known).startswith("rank 0 of 2 on ")

    code, said, _, _ = torchrun("-m", "mffm", "resume", str(run))
    assert code == 0, said
    assert newest_step(run) == 9

    code, said, _, _ = torchrun("-m", "mffm", "train", str(recipe))
    assert code != 0
    assert said.count("holds a run already") == 1, said
