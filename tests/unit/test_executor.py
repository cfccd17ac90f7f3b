import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mffm import executor
from mffm.errors import InputError
from mffm.executor import Job, LocalExecutor, locked, process_of


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_order_failure_and_logs(tmp_path: Path):
    jobs = [
        Job("c", python("raise SystemExit(1)"), tmp_path / "c.log", after=("a",)),
        Job("a", python("import os; print('value', os.environ['X'])"), tmp_path / "a.log", {"X": "7"}),
        Job("d", python("print(1)"), tmp_path / "d.log", after=("c",)),
    ]
    seen = []
    states = LocalExecutor(2, poll_seconds=0.02).run(jobs, lambda s: seen.append(dict(s)))
    assert states == {"a": "done", "c": "failed", "d": "failed"}
    assert (tmp_path / "a.log").read_text() == "value 7\n"
    assert not (tmp_path / "d.log").exists(), "a job whose predecessor failed must not start"
    assert seen[0]["c"] == "waiting"


def test_workers_bound_what_runs_at_once(tmp_path: Path):
    jobs = [Job(str(i), python("import time; time.sleep(0.2)"), tmp_path / f"{i}.log") for i in range(4)]
    most = 0

    def report(states):
        nonlocal most
        most = max(most, sum(s == "running" for s in states.values()))

    LocalExecutor(2, poll_seconds=0.02).run(jobs, report)
    assert most == 2


def test_interrupt_ends_the_processes(tmp_path: Path):
    marker = tmp_path / "alive"
    code = (
        "import time, pathlib\nfor i in range(100):\n"
        f"    pathlib.Path({str(marker)!r}).write_text(str(i)); time.sleep(0.05)"
    )

    def report(states):
        if marker.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LocalExecutor(1, poll_seconds=0.02).run([Job("a", python(code), tmp_path / "a.log")], report)
    before = marker.read_text()
    time.sleep(0.2)
    assert marker.read_text() == before


def test_cpu_time_of_each_job(tmp_path: Path):
    busy = "import time\nwhile time.process_time() < 0.6: pass"
    jobs = [Job("busy", python(busy), tmp_path / "b.log"), Job("idle", python("pass"), tmp_path / "i.log")]
    pool = LocalExecutor(2, poll_seconds=0.02)
    pool.run(jobs, lambda s: None)
    assert 0.6 <= pool.cpu_seconds["busy"] < 1.2
    assert pool.cpu_seconds["idle"] < 0.5


def test_a_lock_is_held_once_and_a_process_is_found_by_its_arguments(tmp_path: Path):
    with locked(tmp_path / "lock"), pytest.raises(InputError, match="another controller"), locked(tmp_path / "lock"):
        pass
    with locked(tmp_path / "lock"):
        pass
    folder = tmp_path / "run"
    process = subprocess.Popen([*python("import time; time.sleep(60)"), f"run={folder}"])
    try:
        deadline = time.monotonic() + 20
        while process_of(folder) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process_of(tmp_path / "other", folder) == process.pid
        assert process_of(tmp_path / "other") is None
    finally:
        process.kill()
        process.wait()


def test_the_process_of_a_slurm_job_is_no_orphan(tmp_path: Path):
    command = [*python("import time; print('up', flush=True); time.sleep(60)"), str(tmp_path)]
    of_slurm = {**os.environ, "SLURM_JOB_ID": "7"}
    for environment, is_found in ((of_slurm, True), ({**of_slurm, "MFFM_START": "7.0"}, False)):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None
            process.stdout.readline()
            assert process_of(tmp_path) == (process.pid if is_found else None)
        finally:
            process.kill()
            process.communicate()


TRAIN = [sys.executable, "-m", "mffm", "train"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def test_a_job_starts_as_it_is_where_no_server_can_begin(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "torch.py").write_text("raise RuntimeError('no such torch')")
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    job = Job("a", [sys.executable, "-m", "mffm", "--version"], tmp_path / "a.log", environment)
    pool = LocalExecutor(1, poll_seconds=0.02)
    assert pool.run([job], lambda s: None) == {"a": "done"}
    assert job.log.read_text().startswith("mffm ")
    assert "no such torch" in capfd.readouterr().err
    assert pool.cpu_seconds["a"] > 0


def test_jobs_share_a_server_where_imports_see_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mffm.forked.GPUS", ())

    def server(command: list[str], **environment: str):
        return executor._server(Job("a", command, tmp_path / "a.log", environment))

    one = server(TRAIN, OMP_NUM_THREADS="1", WANDB_RUN_ID="a")
    assert one is not None
    assert server(TRAIN, OMP_NUM_THREADS="1", WANDB_RUN_ID="b") is one
    assert server([sys.executable, "-m", "mffm.active.task"], OMP_NUM_THREADS="1") is one
    assert server(TRAIN, OMP_NUM_THREADS="2") is not one
    for command in (python("pass"), [sys.executable, "-m", "torch.distributed.run"], ["mffm", "train"], ["true"]):
        assert server(command) is None


@pytest.mark.slow
def test_forked_trainings_are_those_of_interpreters_of_their_own(make_recipe: Callable[..., Path], tmp_path: Path):
    recipes = {name: make_recipe(name, run=str(tmp_path / name)) for name in ("fresh", "first", "second")}
    fresh = subprocess.run([*TRAIN, str(recipes["fresh"])], capture_output=True, text=True)
    assert fresh.returncode == 0, fresh.stderr
    jobs = [Job(n, [*TRAIN, str(recipes[n])], tmp_path / f"{n}.log", ONE_THREAD) for n in ("first", "second")]
    pool = LocalExecutor(2, poll_seconds=0.02)
    assert pool.run(jobs, lambda s: None) == {"first": "done", "second": "done"}
    for name in ("first", "second"):
        for kind in ("weights", "checkpoints/step-00000006"):
            files = sorted((tmp_path / "fresh" / kind).glob("*.safetensors"))
            assert files
            for path in files:
                own = tmp_path / name / kind / path.name
                assert own.read_bytes() == path.read_bytes(), f"{own} differs"
        assert "finished at step 6" in (tmp_path / f"{name}.log").read_text()
        assert 0.2 < pool.cpu_seconds[name] < 6.0


@pytest.mark.slow
def test_forked_trainings_are_found_interrupted_and_resumed(make_recipe: Callable[..., Path], tmp_path: Path):
    recipe = make_recipe(train={"steps": 60, "save_every": 2})
    found = []

    def report(states):
        if (tmp_path / "run" / "checkpoints" / "latest").exists():
            found.append(process_of(recipe))
            raise KeyboardInterrupt

    pool = LocalExecutor(1, poll_seconds=0.02)
    log = tmp_path / "a.log"
    with pytest.raises(KeyboardInterrupt):
        pool.run([Job("a", [*TRAIN, str(recipe)], log, ONE_THREAD)], report)
    assert found[0] is not None
    assert process_of(recipe) is None
    assert pool.cpu_seconds.keys() == {"a"}
    job = Job("a", [sys.executable, "-m", "mffm", "resume", str(tmp_path / "run")], log, ONE_THREAD)
    assert pool.run([job], lambda s: None) == {"a": "done"}
    text = log.read_text()
    assert "resumed from step-" in text
    assert "finished at step 60" in text
    bad = Job("bad", [*TRAIN, str(tmp_path / "none.yaml")], tmp_path / "bad.log", ONE_THREAD)
    assert pool.run([bad], lambda s: None) == {"bad": "failed"}
    assert "none.yaml" in bad.log.read_text()


@pytest.mark.slow
def test_a_controller_that_is_killed_leaves_its_trainings_and_no_server(
    make_recipe: Callable[..., Path], tmp_path: Path
):
    recipe = make_recipe(train={"steps": 60, "save_every": 2})
    code = (
        "import sys; from pathlib import Path; from mffm.executor import Job, LocalExecutor\n"
        f"job = Job('a', [sys.executable, '-m', 'mffm', 'train', {str(recipe)!r}], Path({str(tmp_path / 'a.log')!r}))\n"
        "LocalExecutor(1).run([job], lambda s: None)"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    controller = subprocess.Popen(python(code), env=environment, stdout=subprocess.PIPE)
    try:
        while not (tmp_path / "run" / "checkpoints" / "latest").exists():
            assert controller.poll() is None
            time.sleep(0.05)
        server, training = next(tmp_path.glob("mffm-forked-*")), process_of(recipe)
        assert training is not None
        os.kill(training, signal.SIGSTOP)  # so that it does not end before it is looked at
        controller.send_signal(signal.SIGKILL)
        assert controller.communicate(timeout=60)[0] == b"", "whoever reads its output sees its end"
        assert process_of(recipe) == training, "it goes on"
        os.kill(training, signal.SIGCONT)
        deadline = time.monotonic() + 60
        while server.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        while process_of(recipe) is not None:
            time.sleep(0.1)
    finally:
        controller.kill()
    assert "finished at step 60" in (tmp_path / "a.log").read_text()
