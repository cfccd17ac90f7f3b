"""The command line: quick to start, and one message with exit code 2 for bad input."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml


def mffm(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mffm", *arguments], capture_output=True, text=True, timeout=280, cwd=cwd
    )


def refused(*arguments: str) -> str:
    done = mffm(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("command", [["-c", "import mffm"], ["-m", "mffm", "--help"]])
def test_starts_in_under_a_second_and_without_torch(command: list[str]):
    best = 9.0
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        best = min(best, time.perf_counter() - started)
    assert best < 1.0
    probe = (
        "import sys, runpy\nsys.argv=['mffm','--help']\n"
        "try: runpy.run_module('mffm', run_name='__main__')\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout.endswith("False\n")


def test_every_command_has_help():
    shown = mffm("--help").stdout
    for command in ("ingest", "references", "train", "resume", "evaluate", "release", "edges", "verify"):
        assert command in shown
        assert mffm(command, "--help").returncode == 0


def test_unknown_key(make_recipe: Callable[..., Path]):
    assert "optim.learning_rate: unknown key" in refused("train", str(make_recipe()), "optim.learning_rate=1")


def test_missing_recipe_and_store(make_recipe: Callable[..., Path], tmp_path: Path):
    assert "none.yaml: no such file" in refused("train", str(tmp_path / "none.yaml"))
    assert "no-store" in refused("train", str(make_recipe()), f"data.store={tmp_path / 'no-store'}")


def test_fidelity_absent_from_the_store(make_recipe: Callable[..., Path]):
    message = refused("train", str(make_recipe()), "data.plan.pools.1.fidelity=scan", "model.heads.base=gfn2")
    assert "'scan'" in message
    assert "ccsdt, gfn2, pbe" in message


def test_property_without_labels(make_recipe: Callable[..., Path]):
    message = refused("train", str(make_recipe()), "data.plan.pools.1.properties=[energy, stress]")
    assert "trains stress of 'pbe'" in message


def test_unknown_best_metric_and_cutoff_without_counts(make_recipe: Callable[..., Path]):
    assert "no metric 'val/pbe/accuracy'" in refused("train", str(make_recipe()), "train.best=val/pbe/accuracy")
    assert "mffm edges" in refused("train", str(make_recipe()), "model.backbone.cutoff=4.5")


def test_pinned_fingerprint(make_recipe: Callable[..., Path]):
    assert "the recipe pins" in refused("train", str(make_recipe()), "data.fingerprint=abc")


def test_not_finite_loss_stops_with_the_frames(make_recipe: Callable[..., Path], tmp_path: Path):
    recipe = make_recipe(optim={"lr": 1e30, "warmup_steps": 0, "clip": 1e30})
    message = refused("train", str(recipe))
    assert "the loss is not finite" in message
    (bundle,) = (tmp_path / "run" / "quarantine").glob("*.json")
    content = json.loads(bundle.read_text())
    assert len(content["rows"]) == len(content["fidelities"]) > 0


def test_full_disk_while_saving_leaves_what_was_written(make_recipe: Callable[..., Path], tmp_path: Path):
    """A real limit on file sizes, met by the checkpoint writer in the middle of a run."""
    run = tmp_path / "run"
    first = mffm("train", str(make_recipe()))
    assert first.returncode == 0, first.stderr
    before = {p: p.read_bytes() for p in (run / "checkpoints").rglob("*") if p.is_file()}
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["train"]["steps"] = 9
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    limit = (run / "checkpoints" / "step-00000006" / "model.safetensors").stat().st_size // 2
    code = (
        f"import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); import mffm.training.loop; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); sys.argv = ['mffm', 'resume', {str(run)!r}]; "
        "from mffm.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert all(p.read_bytes() == content for p, content in before.items())


def test_train_evaluate_release_from_the_command_line(tiny_run: Path, tmp_path: Path):
    done = mffm("evaluate", str(tiny_run), "--split", "test", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "meV/atom" in done.stdout
    assert (tmp_path / "evaluation-test.json").is_file()
    assert mffm("release", str(tiny_run), str(tmp_path / "r")).returncode == 0
    assert (tmp_path / "r" / "model.safetensors").is_file()
    assert "exists and is not empty" in refused("release", str(tiny_run), str(tmp_path / "r"))


def test_wandb_offline_records_the_run(make_recipe: Callable[..., Path], tmp_path: Path):
    done = mffm("train", str(make_recipe(log={"wandb": "offline", "group": "g"})))
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    shown = subprocess.run(
        [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(folder)],
        capture_output=True,
        text=True,
    )
    assert "val/pbe/loss" in shown.stdout
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000006" / "state.json").read_text())["state"]
    assert folder.name.endswith(state["wandb_id"])


def test_patience_stops_early(make_recipe: Callable[..., Path]):
    recipe = make_recipe(
        train={"steps": 40, "validate_every": 1, "save_every": 40, "patience": 2, "best": "val/gfn2/loss"},
        optim={"lr": 1e-12},
    )
    done = mffm("train", str(recipe))
    assert done.returncode == 0
    assert "stopped_early" in done.stderr


def test_fine_tune_starts_from_a_run(tiny_run: Path, make_recipe: Callable[..., Path]):
    pools = [{"fidelity": "ccsdt", "properties": ["energy"]}]
    recipe = yaml.safe_load(make_recipe("base").read_text())
    data = {**recipe["data"], "plan": {"pools": pools, "edge_budget": 600}}
    model = {**recipe["model"], "heads": {"kind": "shared", "hidden": [8]}}
    refused_message = refused(
        "train", str(make_recipe("other-heads", data=data, model=model, start_from=str(tiny_run)))
    )
    assert "heads" in refused_message
