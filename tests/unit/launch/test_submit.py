"""A run submitted through submitit's local executor trains on two ranks; submitting imports no torch."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from launch.submit import submit
from mffm.config.base import load, validate
from mffm.config.cluster import ClusterConfig
from mffm.config.recipe import Recipe

ROOT = Path(__file__).parents[3]


def test_two_ranks_through_the_local_executor(make_recipe: Callable[..., Path], tmp_path: Path):
    recipe = load(Recipe, make_recipe())
    cluster = validate(ClusterConfig, {"executor": "local", "tasks_per_node": 2, "time_minutes": 5}, "x")
    job, folder = submit(recipe, cluster)
    assert job.results() == [str(folder)] * 2, job.stderr()
    assert (folder / "weights" / "best.safetensors").is_file()


def test_submitting_imports_no_torch():
    code = "import sys, launch.submit; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "False\n"


def test_cluster_files_load_and_bad_input_is_one_message(tmp_path: Path):
    for path in (ROOT / "configs" / "clusters").glob("*.yaml"):
        load(ClusterConfig, path)
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump({"executor": "pbs"}))
    command = [sys.executable, "-m", "launch.submit", str(ROOT / "configs/quickstart.yaml"), "--cluster", str(bad)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "executor" in done.stderr
    assert "Traceback" not in done.stderr
