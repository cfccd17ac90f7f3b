"""Jobs that follow a training: they wait for its end, write release and evaluation, and say why they did not."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import submitit

from launch import records, runs, then
from launch.submit import load_recipe, submit
from mffm.config.base import load, validate
from mffm.config.cluster import ClusterConfig
from mffm.config.recipe import Recipe
from mffm.errors import InputError

ROOT = Path(__file__).parents[3]
CHAIN = ["release", "evaluate"]


def cluster(**content: object) -> ClusterConfig:
    return validate(ClusterConfig, content, "x")


def wait(folder: Path, seconds: float = 150.0) -> None:
    """Wait until the processes of a local chain have ended."""
    deadline = time.monotonic() + seconds
    while any(records.process_runs(pid) for pid in records.read_json(folder / "job.json")["then"].values()):
        assert time.monotonic() < deadline, runs.read(folder)
        time.sleep(0.1)


def test_train_release_evaluate_through_the_local_executor(make_recipe: Callable[..., Path]):
    (one,) = submit(load(Recipe, make_recipe()), cluster(executor="local", time_minutes=5), steps=CHAIN)
    assert "release waiting, evaluate waiting" in runs.read(one.folder).then
    one.job.result()
    wait(one.folder)
    row = runs.read(one.folder)
    assert (row.state, row.then, row.reasons) == ("finished", "release finished, evaluate finished", ())
    assert (one.folder / "release" / "model.safetensors").is_file()
    report = json.loads((one.folder / "evaluation-test.json").read_text())
    assert report["potential"] == str(one.folder / "release")
    assert (one.folder / "parity-test.png").stat().st_size > 5000
    shown = subprocess.run(
        [sys.executable, "-m", "launch.runs", str(one.folder)], capture_output=True, text=True
    ).stdout
    assert "release finished, evaluate finished" in shown

    # Once more: everything is there.
    (again,) = submit(load_recipe(one.folder, []), cluster(executor="local", time_minutes=5), steps=["release"])
    again.job.result()
    wait(again.folder)
    assert runs.read(one.folder).then == "release finished"
    assert "is there already" in (one.folder / "logs" / "release.log").read_text()
    records.write_status(one.folder, "stopped")
    with pytest.raises(InputError, match=r"release: exists, of an earlier run"):
        submit(load_recipe(one.folder, []), cluster(executor="local"), steps=["release"])


def test_a_failed_training_is_followed_by_nothing(make_recipe: Callable[..., Path], stand_in: Callable[[str], None]):
    stand_in("sys.exit(3)")
    (one,) = submit(load(Recipe, make_recipe()), cluster(executor="local", time_minutes=5), steps=CHAIN)
    wait(one.folder)
    row = runs.read(one.folder)
    assert (row.state, row.then) == ("failed", "release failed, evaluate failed")
    assert row.reasons[0] == f"{one.folder}: release failed: the training is failed, not finished"
    assert not (one.folder / "release").exists()


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("how", ["scancel", "kill -9"])
def test_a_step_ends_with_its_job(stand_in: Callable[[str], None], tmp_path: Path, how: str):
    folder = tmp_path / "run"
    folder.mkdir()
    stand_in("")
    main = tmp_path / "work" / "mffm" / "__main__.py"
    main.write_text("import os, time; print(os.getpid(), os.getppid(), flush=True); time.sleep(60)\n")
    records.write_status(folder, "finished")
    executor = submitit.AutoExecutor(folder=folder / "submitit", cluster="local")
    executor.update_parameters(timeout_min=1)
    job = executor.submit(then.FollowUp("release", str(folder), 1, {}, [], str(os.getpid())))
    records.write_json(folder / "job.json", {"job_id": "1", "then": {"release": job.job_id, "evaluate": "x"}})
    log = folder / "logs" / "release.log"
    until(lambda: log.is_file() and len(log.read_text().split()) == 2)
    child, task = log.read_text().split()
    try:
        assert runs.read(folder).then == "release running, evaluate waiting"
        os.kill(int(task), signal.SIGTERM if how == "scancel" else signal.SIGKILL)
        until(lambda: not records.process_runs(child), 10)
        until(lambda: not records.process_runs(task), 10)
    finally:
        if records.process_runs(child):
            os.kill(int(child), signal.SIGKILL)
    if how == "kill -9":
        old = time.time() - 2 * records.LOST_SECONDS
        os.utime(folder / "then" / "release.json", (old, old))
    state = "stopped" if how == "scancel" else "lost"
    assert runs.read(folder).then == f"release {state}, evaluate not started"


def test_a_step_that_takes_long_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    then.write_status(tmp_path, "release", "running", "9")
    old = time.time() - 2 * records.LOST_SECONDS
    os.utime(then.path_of(tmp_path, "release"), (old, old))
    job = {"then": {"release": "9"}}
    assert then.shown(tmp_path, job, "finished")[0] == "release lost"
    monkeypatch.setattr(records, "HEARTBEAT_SECONDS", 0.1)
    step = then.FollowUp("release", str(tmp_path), 1, {"CODE": "3"}, [], "8")
    with (tmp_path / "log").open("wb") as log:
        assert step._run(["sh", "-c", "sleep 1; exit $CODE"], log, dict(os.environ), set()) == 3
        assert then.shown(tmp_path, job, "finished")[0] == "release running"
        assert step._run(["sleep", "60"], log, dict(os.environ), {signal.SIGTERM}) == -signal.SIGKILL


def test_what_slurm_is_told_of_a_chain(make_recipe: Callable[..., Path], slurm_programs: Path):
    config = cluster(executor="slurm", nodes=2, tasks_per_node=4, gpus_per_node=4)
    (one,) = submit(load(Recipe, make_recipe()), config, steps=["evaluate", "release"])
    scripts = [(slurm_programs / f"{n}.sh").read_text() for n in (8, 9, 10)]
    assert "--dependency" not in scripts[0]
    for script, before in zip(scripts[1:], (8, 9), strict=True):
        for line in (
            f"--dependency=afterok:{before}", "--kill-on-invalid-dep=yes", "--nodes=1", "--ntasks-per-node=1",
            "--gpus-per-node=1",
        ):  # fmt: skip
            assert line in script
    assert records.read_json(one.folder / "job.json")["then"] == {"evaluate": "9", "release": "10"}
    assert runs.read(one.folder).then == "evaluate waiting, release waiting"
    evaluate, release = (
        then.FollowUp(s, "run", 1, {}, b, "8") for s, b in (("evaluate", []), ("release", ["evaluate"]))
    )
    assert (evaluate.command() or [])[3:] == ["evaluate", "run", "--output", "run"]
    assert (release.command() or [])[3:] == ["release", "run", "run/release"]
    records.write_json(one.folder / "status.json", {"state": "failed", "job_id": "8", "start": "8.0"})
    assert runs.read(one.folder).then == "evaluate cancelled, release cancelled"


def test_a_refused_step_leaves_the_trainings_and_says_how_to_add_it(
    make_recipe: Callable[..., Path], slurm_programs: Path, program: Callable[[str, str], None], tmp_path: Path
):
    """A limit of two jobs: the array of two trainings and the first step are taken."""
    shell = (slurm_programs.parent / "bin" / "sbatch").read_text().partition("\n")[2]
    limit = "sbatch: error: QOSMaxSubmitJobPerUserLimit"
    program("sbatch", f'[ $(ls {slurm_programs} | wc -l) = 2 ] && {{ echo "{limit}" >&2; exit 1; }}\n{shell}')
    path = tmp_path / "cluster.yaml"
    path.write_text("executor: slurm\n")
    command = [sys.executable, "-m", "launch.submit", str(make_recipe()), "--cluster", str(path), "--seeds", "3,5"]
    done = subprocess.run([*command, "--then", "release,evaluate"], capture_output=True, text=True, cwd=ROOT)
    runs_ = [tmp_path / "run" / f"seed-{seed}" for seed in (3, 5)]
    said = done.stderr[done.stderr.index("error: sbatch refused") :].splitlines()
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert said[0] == f"error: sbatch refused evaluate of {runs_[0]}: {limit}"
    assert said[1] == (
        f"queued all the same: job 8_0 (training of {runs_[0]}), job 9 (release), job 8_1 (training of {runs_[1]})"
    )
    jobs = [records.read_json(run / "job.json") for run in runs_]
    assert [(job["job_id"], job.get("then")) for job in jobs] == [("8_0", {"release": "9"}), ("8_1", None)]
    # The limit is gone: the commands that it gave, with the jobs in the queue.
    program("sbatch", shell)
    program("scontrol", "echo JobState=PENDING")
    for line in said[3:]:
        again = subprocess.run([sys.executable, *line.split()[1:]], capture_output=True, text=True, cwd=ROOT)
        assert again.returncode == 0, again.stderr
    assert "--dependency=afterok:8_0:9\n" in (slurm_programs / "10.sh").read_text()
    assert "--dependency=afterok:8_1\n" in (slurm_programs / "13.sh").read_text()
    assert records.read_json(runs_[1] / "job.json")["then"] == {"release": "14", "evaluate": "15"}


def test_steps_are_known_ones_each_once():
    assert then.parse(" release, evaluate") == CHAIN
    assert then.parse(None) == []
    for text in ("releases", "release,release"):
        with pytest.raises(InputError, match="steps are evaluate, release"):
            then.parse(text)
