"""Compiled training: the numbers of the eager one, through DeepSpeed, cached, resumed bit for bit; what is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mffm.config.base import load
from mffm.config.recipe import Recipe
from mffm.errors import InputError

# The runs of one process: eager, compiled, loaded from the cache at another ZeRO stage, and resumed.
RUN_ALL = """
import shutil, sys
from pathlib import Path
from mffm.config.base import load
from mffm.config.recipe import Recipe
from mffm.training.loop import resume, train
*recipes, whole, half = sys.argv[1:]
for path in recipes:
    train(load(Recipe, path))
shutil.copytree(whole, half)
shutil.rmtree(Path(half) / "checkpoints" / "step-00000006")
(Path(half) / "checkpoints" / "latest").write_text("step-00000003\\n")
recipe = (Path(half) / "recipe.yaml").read_text().replace(whole, half)
(Path(half) / "recipe.yaml").write_text(recipe)
resume(half)
"""
TINY = {"lmax": 1, "l_message": 0, "layers": 1, "channels": 8, "edge_channels": 8, "radial_hidden": 8, "n_radial": 4}
TRAIN = {"steps": 6, "validate_every": 3, "save_every": 3, "log_every": 1, "threads": 1, "keep": 3}


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compiled_training(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipes = []
    for name, train, stage in (("eager", {}, 0), ("whole", {"compile": True}, 0), ("zero3", {"compile": True}, 3)):
        sections = {"train": {**TRAIN, **train}, "deepspeed": {"zero_stage": stage}}
        sections["model"] = {"backbone": {**TINY, "cutoff": 4.0}}
        recipes.append(make_recipe(name, run=str(tmp_path / name), **sections))
    cache = tmp_path / "cache"
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, *map(str, recipes), str(tmp_path / "whole"), str(tmp_path / "half")],
        capture_output=True, text=True, timeout=1100, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    expected = losses(tmp_path / "eager")
    assert len(expected) == 6
    for name in ("whole", "zero3"):
        assert losses(tmp_path / name) == pytest.approx(expected, rel=2e-4)
    assert done.stderr.count("compiled in") == 1, "one graph for all batches, and for all runs"
    assert done.stderr.count("loaded in") == 2
    assert len([p for p in cache.iterdir() if (p / "step.bin").is_file()]) == 1
    for file in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        whole, half = (tmp_path / n / "checkpoints" / "step-00000006" / file for n in ("whole", "half"))
        assert whole.read_bytes() == half.read_bytes()


def test_what_compilation_refuses(make_recipe: Callable[..., Path]) -> None:
    escn = {"backbone": {"kind": "escn", "lmax": 1, "mmax": 1}, "conditioning": {"kind": "none"}, "heads": {}}
    for sections, reason in (
        ({"train": {"steps": 1, "compile": True, "activation_checkpointing": True}}, "choose one"),
        ({"train": {"steps": 1, "compile": True}, "model": escn}, "is for the density backbone"),
    ):
        with pytest.raises(InputError, match=reason):
            load(Recipe, make_recipe(**sections))


def test_no_compiler_is_one_clear_error(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = make_recipe(train={"steps": 1, "compile": True})
    empty = tmp_path / "bin"
    empty.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "CXX"} | {"PATH": str(empty)}
    done = subprocess.run(
        [sys.executable, "-m", "mffm", "train", str(recipe)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2
    assert "train.compile needs a C++ compiler" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_compiler_that_fails_is_one_clear_error(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    backbone = {**TINY, "cutoff": 4.0, "lmax": 0, "body_order": 2}
    recipe = make_recipe(train={"steps": 1, "compile": True}, model={"backbone": backbone})
    compiler = tmp_path / "g++"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exec g++ --version\necho "fatal error: Python.h" >&2\nexit 1\n'
    )
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "mffm", "train", str(recipe)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "the C++ compiler failed: fatal error: Python.h" in done.stderr
    assert "Traceback" not in done.stderr
