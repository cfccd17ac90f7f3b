import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
    executor = LocalExecutor(2, poll_seconds=0.02)
    executor.run(jobs, lambda s: None)
    assert 0.6 <= executor.cpu_seconds["busy"] < 1.2
    assert executor.cpu_seconds["idle"] < 0.5


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
