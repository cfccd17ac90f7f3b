"""Submitting: what is written, what SLURM is told, what is refused; two ranks through submitit's local executor."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from launch import records
from launch.submit import load_cluster, load_recipe, parse_seeds, submit
from mffm.config.base import load, validate
from mffm.config.cluster import ClusterConfig
from mffm.config.recipe import Recipe
from mffm.errors import InputError

ROOT = Path(__file__).parents[3]
LOCAL = {"executor": "local", "tasks_per_node": 2, "time_minutes": 5}
SLURM = {"executor": "slurm", "nodes": 2, "tasks_per_node": 4, "gpus_per_node": 4, "cpus_per_task": 8}


def cluster(**content: object) -> ClusterConfig:
    return validate(ClusterConfig, content, "x")


def test_two_ranks_through_the_local_executor_and_again(make_recipe: Callable[..., Path], tmp_path: Path):
    recipe = load(Recipe, make_recipe())
    (one,) = submit(recipe, cluster(**LOCAL))
    assert one.job.results() == [str(one.folder)] * 2, one.job.stderr()
    assert (one.folder / "weights" / "best.safetensors").is_file()
    assert "rank 1 of 2" in (one.folder / "logs" / "rank-1.log").read_text()
    assert json.loads((one.folder / "code.json").read_text())["version"]
    assert records.status(one.folder)["state"] == "finished"
    # A finished run: the job returns at once.
    written = (one.folder / "logs" / "rank-0.log").read_text()
    (again,) = submit(load_recipe(one.folder, []), cluster(**LOCAL))
    assert again.job.results() == [str(one.folder)] * 2
    assert (one.folder / "logs" / "rank-0.log").read_text() == written
    with pytest.raises(InputError, match=r"holds a run with optim\.lr=0\.002, not 0\.5"):
        submit(load(Recipe, make_recipe(optim={"lr": 0.5})), cluster(**LOCAL))


def test_submitting_imports_no_torch():
    code = "import sys, launch.submit, launch.runs, launch.task; print('torch' in sys.modules)"
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**SLURM, "tasks_per_node": 2}, "one rank drives one GPU"),
        ({**LOCAL, "nodes": 2}, "one machine"),
        ({**LOCAL, "slurm": {"slurm_partition": "gpu"}}, "needs executor: slurm"),
        ({**SLURM, "slurm": {"partition": "gpu"}}, "slurm_partition"),
    ],
)
def test_cluster_faults_name_the_remedy(content: dict[str, object], message: str):
    with pytest.raises(InputError, match=message):
        cluster(**content)


def test_what_slurm_is_told(make_recipe: Callable[..., Path], slurm_programs: Path):
    config = cluster(
        **SLURM, slurm={"slurm_partition": "gpu", "slurm_srun_args": ["--mpi=none"]}, setup=["module load cuda"]
    )
    (one,) = submit(load(Recipe, make_recipe()), config, after="3:4")
    assert one.job.job_id == "8"
    script = (slurm_programs / "8.sh").read_text()
    for line in (
        "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=4", "#SBATCH --gpus-per-node=4", "#SBATCH --cpus-per-task=8",
        "#SBATCH --signal=USR2@300", "#SBATCH --requeue", "#SBATCH --partition=gpu", "#SBATCH --dependency=afterok:3:4",
        "#SBATCH --kill-on-invalid-dep=yes", "module load cuda", f"export PYTHONPATH='{ROOT}'",
        "--kill-on-bad-exit=1 --cpus-per-task=8 --mpi=none",
    ):  # fmt: skip
        assert line in script, line
    job = records.read_json(one.folder / "job.json")
    assert (job["job_id"], job["after"]) == ("8", "3:4")
    submission = one.job.submission()
    assert submission._timeout_countdown == config.max_timeouts
    assert submission.function.checkpoint().function.requeues == 1


def test_an_array_has_a_folder_a_seed(make_recipe: Callable[..., Path], slurm_programs: Path, tmp_path: Path):
    submitted = submit(load(Recipe, make_recipe()), cluster(**SLURM), parse_seeds("3, 5"))
    assert [one.job.job_id for one in submitted] == ["8_0", "8_1"]
    assert [one.folder for one in submitted] == [tmp_path / "run" / "seed-3", tmp_path / "run" / "seed-5"]
    recipe = load(Recipe, submitted[1].folder / "submitted.yaml")
    assert (recipe.seed, recipe.name, recipe.log.group) == (5, "tiny-seed-5", "tiny")
    assert "#SBATCH --array=0-1" in (slurm_programs / "8.sh").read_text()


def test_a_run_under_way_is_not_submitted_again(
    make_recipe: Callable[..., Path], slurm_programs: Path, program: Callable[[str, str], None]
):
    recipe = load(Recipe, make_recipe())
    submit(recipe, cluster(**SLURM))
    submit(recipe, cluster(**SLURM))  # SLURM forgot job 8: it is over
    program("scontrol", 'echo "JobId=$5 JobState=RUNNING"')
    with pytest.raises(InputError, match="job 9 of this run is RUNNING; end it first: scancel 9"):
        submit(recipe, cluster(**SLURM))
    submit(recipe, cluster(**SLURM), after="9")  # a chain on the same run


def test_a_local_run_under_way_and_what_a_removed_one_leaves(make_recipe: Callable[..., Path], slurm_programs: Path):
    recipe = load(Recipe, make_recipe())
    (one,) = submit(recipe, cluster(**SLURM))
    records.write_json(one.folder / "job.json", {"job_id": str(os.getpid()), "executor": "local"})
    records.write_status(one.folder, "running")
    with pytest.raises(InputError, match=f"running: process {os.getpid()}"):
        submit(recipe, cluster(**SLURM))
    ended = subprocess.Popen(["true"])
    ended.wait()
    records.write_json(one.folder / "job.json", {"job_id": str(ended.pid), "executor": "local"})
    submit(recipe, cluster(**SLURM))  # its process has ended
    records.write_status(one.folder, "finished")
    submit(recipe, cluster(**SLURM))
    assert records.status(one.folder) == {}  # there is no checkpoint, so it is a new run and not a finished one


def test_refusals_of_the_scheduler_are_one_message(
    make_recipe: Callable[..., Path], slurm_programs: Path, program: Callable[[str, str], None]
):
    recipe = load(Recipe, make_recipe())
    program("sbatch", "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1")
    with pytest.raises(InputError, match="sbatch refused the job: sbatch: error: invalid partition"):
        submit(recipe, cluster(**SLURM))
    with pytest.raises(InputError, match="slurm_color"):
        submit(recipe, cluster(**SLURM, slurm={"slurm_color": "red"}))
    with pytest.raises(InputError, match="no queue"):
        submit(recipe, cluster(**LOCAL), seeds=[1, 2])
    with pytest.raises(InputError, match="whole numbers"):
        parse_seeds("0-3")


def test_the_command_line_changes_the_cluster():
    changed = load_cluster(ROOT / "configs" / "clusters" / "slurm_gpu.yaml", 3, 2, 30)
    assert (changed.nodes, changed.gpus_per_node, changed.tasks_per_node, changed.time_minutes) == (3, 2, 2, 30)
    assert load_cluster(ROOT / "configs" / "clusters" / "slurm_gpu.yaml", None, 0, None).tasks_per_node == 1
