"""Exact resume: 20 steps = 10 + kill -9 + 10, bit for bit; an interrupt saves; damage is told."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
from safetensors.torch import load_file

TRAIN = {"steps": 20, "validate_every": 5, "save_every": 10, "log_every": 1, "threads": 1, "keep": 3}


def mffm(*arguments: str, **options) -> subprocess.CompletedProcess:
    return forked.run(["-m", "mffm", *arguments], **options)


def bytes_of(run: Path, step: int = 20) -> dict[str, bytes]:
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {
        name: (folder / name).read_bytes() for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
    }


def losses(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("time", "cpu_s") and not k.endswith("_per_s")} for row in rows]


def start_and_signal(recipe: Path, run: Path, number: int, after_step: int) -> int:
    """Start a run, send a signal once a metric row of ``after_step`` is there; return the exit code."""
    with open(os.devnull, "w") as nothing:
        process = forked.start(["-m", "mffm", "train", str(recipe)], nothing, nothing)
    deadline = time.monotonic() + 180
    try:
        while time.monotonic() < deadline and process.poll() is None:
            log = run / "metrics.jsonl"
            if log.exists() and any(
                json.loads(s)["step"] >= after_step for s in log.read_text().splitlines() if s.endswith("}")
            ):
                break
            time.sleep(0.003)
        process.send_signal(number)
        return process.wait(timeout=120)
    finally:
        process.kill()


@pytest.fixture
def uninterrupted(make_recipe: Callable[..., Path], tmp_path: Path) -> Path:
    done = mffm("train", str(make_recipe("whole", run=str(tmp_path / "whole"), train=TRAIN)))
    assert done.returncode == 0, done.stderr
    return tmp_path / "whole"


def test_kill_and_resume_is_bit_identical(uninterrupted: Path, make_recipe: Callable[..., Path], tmp_path: Path):
    run = tmp_path / "killed"
    recipe = make_recipe("killed", run=str(run), train=TRAIN)
    code = start_and_signal(recipe, run, signal.SIGKILL, after_step=11)
    assert code == -signal.SIGKILL, "the run ended before it could be killed"
    assert (run / "checkpoints" / "latest").read_text().strip() == "step-00000010"
    resumed = mffm("resume", str(run))
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from step-00000010" in resumed.stderr
    assert bytes_of(run) == bytes_of(uninterrupted)
    assert losses(run) == losses(uninterrupted)
    for name in ("best", "last", "raw"):
        mine, whole = (load_file(r / "weights" / f"{name}.safetensors") for r in (run, uninterrupted))
        assert all((mine[k] == whole[k]).all() for k in whole)


def test_soap_goes_on_bit_for_bit(make_recipe: Callable[..., Path], tmp_path: Path):
    """What a kill leaves is what the checkpoint of step 10 was."""
    run = tmp_path / "soap"
    optim = {"kind": "soap", "precondition_every": 3}
    trained = mffm("train", str(make_recipe("soap", run=str(run), train=TRAIN, optim=optim)))
    assert trained.returncode == 0, trained.stderr
    expected = bytes_of(run)
    assert expected["model.safetensors"] != bytes_of(run, 10)["model.safetensors"]
    checks = {c["name"]: c["numbers"] for c in json.loads((run / "preflight.json").read_text())["checks"]}
    tensors = [v for name in expected for v in load_file(run / "checkpoints" / "step-00000020" / name).values()]
    assert checks["disk"]["checkpoint_bytes"] == 4 * sum(v.numel() for v in tensors)
    shutil.rmtree(run / "checkpoints" / "step-00000020")
    (run / "checkpoints" / "latest").write_text("step-00000010\n")
    resumed = mffm("resume", str(run))
    assert resumed.returncode == 0, resumed.stderr
    assert bytes_of(run) == expected
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("kind: soap", "kind: adamw").replace("every: 3", "every: 10"))
    refused = mffm("resume", str(run))
    assert refused.returncode == 2
    assert "its optimiser state is not of this recipe's optim.kind: adamw" in refused.stderr


def test_interrupt_saves_at_a_step_boundary_and_says_how_to_go_on(
    uninterrupted: Path, make_recipe: Callable[..., Path], tmp_path: Path
):
    run = tmp_path / "interrupted"
    recipe = make_recipe("interrupted", run=str(run), train=TRAIN)
    assert start_and_signal(recipe, run, signal.SIGTERM, after_step=3) == 75
    step = json.loads(
        (run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip() / "state.json").read_text()
    )["state"]["step"]
    assert 3 <= step < 20
    assert mffm("resume", str(run)).returncode == 0
    assert bytes_of(run) == bytes_of(uninterrupted)


def test_damaged_checkpoint_is_passed_over_with_a_warning(uninterrupted: Path):
    """The one before is taken, the warning names the damaged file, and the run ends as if nothing had happened."""
    before = bytes_of(uninterrupted)
    newest = uninterrupted / "checkpoints" / "step-00000020" / "ema.safetensors"
    os.truncate(newest, newest.stat().st_size - 10)
    resumed = mffm("resume", str(uninterrupted))
    assert resumed.returncode == 0, resumed.stderr
    assert "ema.safetensors: damaged" in resumed.stderr
    assert "resumed from step-00000010" in resumed.stderr
    assert bytes_of(uninterrupted) == before

    for folder in (uninterrupted / "checkpoints").glob("step-*"):
        (folder / "optimizer.safetensors").unlink()
    hopeless = mffm("resume", str(uninterrupted))
    assert hopeless.returncode == 2
    assert "no whole checkpoint" in hopeless.stderr
    assert "step-00000010" in hopeless.stderr


def test_misuse_is_one_message(uninterrupted: Path, make_recipe: Callable[..., Path], tmp_path: Path):
    again = mffm("train", str(make_recipe("again", run=str(uninterrupted), train=TRAIN)))
    assert again.returncode == 2
    assert "holds a run already" in again.stderr
    assert "Traceback" not in again.stderr

    nothing = mffm("resume", str(tmp_path / "no-run"))
    assert nothing.returncode == 2
    assert "not the folder of a run" in nothing.stderr


def test_resume_on_another_plan_is_refused(uninterrupted: Path):
    recipe = uninterrupted / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("edge_budget: 600", "edge_budget: 500"))
    refused = mffm("resume", str(uninterrupted))
    assert refused.returncode == 2
    assert "another plan" in refused.stderr
