"""The command line: quick to start, and one message with exit code 2 for bad input."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
import yaml
from typer.testing import CliRunner


def mffm(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return forked.run(["-m", "mffm", *arguments], cwd=cwd)


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
    from mffm.cli import app

    shown = CliRunner().invoke(app, ["--help"]).stdout
    for command in ("ingest", "references", "train", "resume", "evaluate", "release", "edges", "verify"):
        assert command in shown
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_unknown_key(make_recipe: Callable[..., Path]):
    assert "optim.learning_rate: unknown key" in refused("train", str(make_recipe()), "optim.learning_rate=1")


def test_missing_recipe_and_store(make_recipe: Callable[..., Path], tmp_path: Path):
    assert "none.yaml: no such file" in refused("train", str(tmp_path / "none.yaml"))
    assert "no-store" in refused("train", str(make_recipe()), f"data.store={tmp_path / 'no-store'}")


def test_difference_of_fidelities(molecule_store: Path, tmp_path: Path):
    store = shutil.copytree(molecule_store, tmp_path / "store")
    message = refused("difference", str(store), "--high", "pbe", "--low", "gfn1")
    assert "unknown fidelity 'gfn1'; known fidelities: ccsdt, gfn2, pbe" in message
    for expected in ("pbe_minus_gfn2 = pbe − gfn2: 90 energy, 90 forces", "complete already, nothing new"):
        done = mffm("difference", str(store), "--high", "pbe", "--low", "gfn2")
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


def test_new_study_of_two_levels_in_one_file(tmp_path: Path):
    shipped = str(Path(__file__).parents[2] / "data" / "molecules.extxyz")
    names = ("--low-name", "gfn2", "--high-name", "pbe", "--low-energy", "energy_gfn2")
    message = refused("study", "new", shipped, shipped, *names, "--folder", str(tmp_path / "mine"))
    assert "several keys look like energy" in message
    assert "--high-energy KEY" in message
    arguments = (*names, "--high-energy", "energy_pbe", "--folder", "mine")
    done = mffm("study", "new", shipped, shipped, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "note: " in done.stdout
    last = [line.strip() for line in done.stdout.splitlines()[-3:]]
    assert last == [
        "mffm ingest mine/data.yaml", "mffm difference stores/mine --high pbe --low gfn2", "mffm study mine/study.yaml"
    ]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["data.yaml", "recipe.yaml", "study.yaml"]


def test_yaml_that_is_not_utf8(tmp_path: Path):
    (tmp_path / "data.yaml").write_bytes("store: é\n".encode("latin-1"))
    message = refused("ingest", str(tmp_path / "data.yaml"))
    assert "data.yaml" in message
    assert "UTF-8" in message


def test_full_disk_without_a_file_name_says_what_to_do(capsys: pytest.CaptureFixture[str], monkeypatch):
    import errno

    from mffm import cli

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cli, "app", full)
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("error: No space left on device; what was written before is intact: make")


@pytest.mark.parametrize("workers", [1, 2])
def test_interrupted_ingest_says_how_to_go_on(tmp_path: Path, workers: int):
    root = Path(__file__).parents[2]
    store = tmp_path / "store"
    arguments = ["ingest", str(root / "configs/data/molecules.yaml"), "--store", str(store), f"workers={workers}"]
    for _ in range(5):  # the ingest takes half a second: the signal may come after its end
        shutil.rmtree(store, ignore_errors=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "mffm", *arguments, "shard_frames=20"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # a shell that runs the tests in the background has them ignore SIGINT, and children inherit that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        while not (store / "staging.lmdb").is_file() and process.poll() is None:
            time.sleep(0.003)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
        _, err = process.communicate(timeout=60)
        if process.returncode == 130:
            break
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted; give the same command again to go on where it stopped"
    assert mffm(*arguments, "shard_frames=20").returncode == 0
    assert mffm("verify", str(store)).returncode == 0


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


def test_what_decides_the_numbers_is_not_overridden_behind_the_recipe(make_recipe: Callable[..., Path]):
    recipe = make_recipe(deepspeed={"overrides": {"gradient_accumulation_steps": 1}})
    assert "the recipe's key is data.plan.edges_per_microbatch" in refused("train", str(recipe))
    recipe = make_recipe(deepspeed={"overrides": {"zero_optimization": 3}})
    assert "deepspeed.overrides.zero_optimization: 3; expected keys and values" in refused("train", str(recipe))
    assert "model.init_from needs start_from" in refused("train", str(make_recipe()), "model.init_from={pbe: gfn2}")
    assert "references.refit: false is for" in refused("train", str(make_recipe()), "references.refit=false")
    assert "optim.betas" in refused("train", str(make_recipe()), "optim.betas=[0.9, 1.5]")
    assert "loss.weights" in refused("train", str(make_recipe()), "loss.weights={pbe: {energy: -1}}")


def test_another_backbone_than_the_weights(tiny_run: Path, make_recipe: Callable[..., Path]):
    recipe = make_recipe(start_from=str(tiny_run))
    message = refused("train", str(recipe), "model.backbone.envelope_power=10")
    assert "envelope_power: 10 here, 6 there" in message


def test_pinned_fingerprint(make_recipe: Callable[..., Path]):
    assert "the recipe pins" in refused("train", str(make_recipe()), "data.fingerprint=abc")


def test_not_finite_loss_stops_with_the_frames(make_recipe: Callable[..., Path], tmp_path: Path):
    recipe = make_recipe(optim={"lr": 1e30, "warmup_steps": 0, "clip": 1e30})
    message = refused("train", str(recipe))
    assert "the loss is not finite" in message
    (bundle,) = (tmp_path / "run" / "quarantine").iterdir()
    assert len(json.loads((bundle / "bundle.json").read_text())["systems"]) > 0
    assert f"mffm replay {bundle}" in message.replace("\n", "")


def test_full_disk_while_saving_leaves_what_was_written(make_recipe: Callable[..., Path], tmp_path: Path):
    """A real limit on file sizes, met by the checkpoint writer in the middle of a run."""
    run = tmp_path / "run"
    first = mffm("train", str(make_recipe(train={"preflight": False})))  # which would see the limit before
    assert first.returncode == 0, first.stderr
    text = (run / "recipe.yaml").read_text()
    assert "  steps: 6\n" in text
    (run / "recipe.yaml").write_text(text.replace("  steps: 6\n", "  steps: 9\n"))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.parent.name != "weights"}
    log = run / "metrics.jsonl"
    limit = (run / "checkpoints" / "step-00000006" / "model.safetensors").stat().st_size // 2
    code = (
        f"import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); import mffm.training.loop; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); sys.argv = ['mffm', 'resume', {str(run)!r}]; "
        "from mffm.cli import main; main()"
    )
    done = forked.run(["-c", code])
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert [p for p, content in before.items() if p != log and p.read_bytes() != content] == []
    assert log.read_bytes().startswith(before[log])
    small = code.replace(f"({limit}, {limit})", "(600, 600)")
    done = forked.run(["-c", small])
    assert done.returncode == 2, done.stderr
    assert "recipe.yaml: cannot be written" in done.stderr
    assert (run / "recipe.yaml").read_bytes() == before[run / "recipe.yaml"]
    whole = mffm("resume", str(run))
    assert whole.returncode == 0, whole.stderr


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


def test_fine_tune_at_the_same_fidelities_starts_where_the_base_is(tiny_run: Path, make_recipe: Callable[..., Path]):
    """The base's element references are kept: eight frames must not move them under the weights."""
    recipe = make_recipe(start_from=str(tiny_run), optim={"lr": 1e-12, "warmup_steps": 0, "ema_decay": 0.0})
    few = ["data.plan.pools.0.max_frames=8", "data.plan.pools.1.max_frames=8", "train.steps=1"]
    done = mffm("train", str(recipe), *few)
    assert done.returncode == 0, done.stderr
    run = Path(yaml.safe_load(recipe.read_text())["run"])
    now = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    base = [json.loads(s) for s in (tiny_run / "metrics.jsonl").read_text().splitlines() if "val/pbe/energy_mae" in s]
    best = min(base, key=lambda r: r["val/loss"])
    for key in ("val/gfn2/energy_mae", "val/pbe/energy_mae", "val/pbe/forces_mae"):
        assert now[key] == pytest.approx(best[key], rel=1e-3)
    assert "kept" in (run / "references.md").read_text()


def test_stress_is_trained_though_validation_has_none(make_recipe: Callable[..., Path], tmp_path: Path):
    """Crystals at two fidelities, E, F and stress; the validation frames lack the stress labels."""
    root = Path(__file__).parents[2]
    text = []
    for i, lines in enumerate(frames_of((root / "data" / "crystals.extxyz").read_text(), 14)):
        header = lines[1] if i < 10 else re.sub(r"stress_\w+=\"[^\"]*\"", "", lines[1])
        text += [lines[0], header.rstrip("\n") + f" part={'train' if i < 10 else 'val'}\n", *lines[2:]]
    (tmp_path / "crystals.extxyz").write_text("".join(text))
    labels = {f: {p: f"{p}_{f}" for p in ("energy", "forces", "stress")} for f in ("pbe", "r2scan")}
    data = {
        "store": str(tmp_path / "crystals"),
        "fidelities": {"pbe": {"level_of_theory": "PBE"}, "r2scan": {"level_of_theory": "r2SCAN"}},
        "sources": [
            {"name": "c", "path": "crystals.extxyz", "frame_key": "frame_id", "licence": "MIT", "labels": labels}
        ],
        "splits": {"key": "part"},
        "cutoffs": [4.0],
    }
    (tmp_path / "crystals.yaml").write_text(yaml.safe_dump(data))
    assert mffm("ingest", str(tmp_path / "crystals.yaml")).returncode == 0
    pools = [{"fidelity": f, "properties": ["energy", "forces", "stress"]} for f in ("pbe", "r2scan")]
    plan = {"pools": pools, "edge_budget": 3000}
    heads = {"kind": "delta", "base": "pbe", "hidden": [8]}
    recipe = make_recipe(data={"store": str(tmp_path / "crystals"), "plan": plan}, model={"heads": heads})
    done = mffm("train", str(recipe))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(s) for s in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["labels/r2scan/stress"] > 0
    assert not any("val/pbe/stress_mae" in r for r in rows)
    shown = mffm("evaluate", str(tmp_path / "run"), "--split", "train", "--output", str(tmp_path / "out"))
    assert "meV/Å³" in shown.stdout


def frames_of(text: str, n: int) -> list[list[str]]:
    """Split extxyz text into the lines of its first frames."""
    lines, frames, at = text.splitlines(keepends=True), [], 0
    for _ in range(n):
        end = at + 2 + int(lines[at])
        frames.append(lines[at:end])
        at = end
    return frames
