"""A rank's task with a stand-in for mffm: a death is reported and ends the others, a warning saves and starts again."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import submitit

from launch import records
from launch.task import Training, ending, master_port, resolvable
from mffm.executor import usages

WAIT = "for _ in range(600): time.sleep(0.1)"


@pytest.fixture
def start(tmp_path: Path) -> Callable[[], "submitit.Job[str]"]:
    """Return a function that starts two tasks on a run's folder through submitit's local executor."""
    folder = tmp_path / "run"
    folder.mkdir()

    def submit() -> "submitit.Job[str]":
        executor = submitit.AutoExecutor(folder=folder / "submitit", cluster="local")
        executor.update_parameters(tasks_per_node=2, timeout_min=1)
        return executor.submit(Training(str(folder), 1, {"EXTRA": "x"}))

    return submit


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_rank_that_dies_is_reported_and_ends_the_job(
    start: Callable[[], "submitit.Job[str]"], stand_in: Callable[[str], None], tmp_path: Path
):
    stand_in(f"if rank == 1: print('the last words', os.environ['EXTRA']); sys.exit(3)\n{WAIT}")
    run = tmp_path / "run"
    begun = time.monotonic()
    job = start()
    with pytest.raises(submitit.core.utils.FailedJobError):
        job.results()
    assert time.monotonic() - begun < 20
    first = records.failures(run, f"{job.job_id}.0")[0]
    report = first.read_text()
    assert report.startswith("rank 1 of 2 on ")
    assert "died: exit code 3" in report
    assert "the last words x" in report
    assert "newest checkpoint none" in report
    assert records.status(run)["state"] == "failed"


def test_what_mffm_reported_itself_is_not_reported_again(
    start: Callable[[], "submitit.Job[str]"], stand_in: Callable[[str], None], tmp_path: Path
):
    stand_in(
        "from mffm.failures import Report\n"
        "report = Report(os.environ['MFFM_START'], 0, 2, 'here', 'died: the cause', 'step 1', 'nothing')\n"
        "if rank == 0: report.write(folder); sys.exit(1)\n"
        "while not (folder / 'failures').exists(): time.sleep(0.05)\n"
        "sys.exit(1)"
    )
    run = tmp_path / "run"
    job = start()
    with pytest.raises(submitit.core.utils.FailedJobError, match="died: the cause"):
        job.results()
    until(lambda: job.done())
    assert [p.name for p in records.failures(run, f"{job.job_id}.0")] == [f"{job.job_id}.0-rank-0.txt"]


def test_a_warning_saves_on_all_ranks_and_starts_again(
    start: Callable[[], "submitit.Job[str]"], stand_in: Callable[[str], None], tmp_path: Path
):
    # The stand-in is deaf for a second, as mffm is while it imports torch. Only rank 0 is warned: ranks agree.
    stand_in(
        "time.sleep(1)\n"
        "def save(*_):\n"
        "    (folder / 'checkpoints').mkdir(exist_ok=True)\n"
        "    (folder / 'checkpoints' / 'latest').write_text('step-00000007')\n"
        "signal.signal(signal.SIGUSR2, save)\n"
        "while not (folder / 'checkpoints' / 'latest').exists(): time.sleep(0.05)\n"
        "sys.exit(75)"
    )
    run = tmp_path / "run"
    job = start()
    log = run / "logs" / "rank-0.log"
    until(lambda: log.exists() and "stand-in train" in log.read_text())
    child = int(re.findall(r"pid (\d+)", log.read_text())[0])
    task = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(child, signal.SIGUSR2)  # lost: ignored
    os.kill(task, signal.SIGUSR2)  # sent on until it is heard
    assert job.results() == [str(run)] * 2
    for rank in (0, 1):
        text = (run / "logs" / f"rank-{rank}.log").read_text()
        assert text.index("stand-in train") < text.index("stand-in resume")
        assert f"start {job.job_id}.1, rank {rank} of 2" in text
    status = records.status(run)
    assert (status["state"], status["started_step"]) == ("finished", 7)
    used = {path.name for path in (run / "cpu").iterdir()}
    assert used == {f"{job.job_id}.{start}-rank-{rank}.json" for start in (0, 1) for rank in (0, 1)}
    assert all(one.cpu_seconds is not None and one.cpu_seconds > 0 for one in usages(run))


def test_sigterm_alone_saves_and_leaves_no_result(
    start: Callable[[], "submitit.Job[str]"], stand_in: Callable[[str], None], tmp_path: Path
):
    stand_in(f"signal.signal(signal.SIGUSR2, lambda *_: sys.exit(75))\nprint('ready', flush=True)\n{WAIT}")
    run = tmp_path / "run"
    job = start()
    until(lambda: all((run / "logs" / f"rank-{r}.log").exists() for r in (0, 1)))
    until(lambda: all("ready" in (run / "logs" / f"rank-{r}.log").read_text() for r in (0, 1)))
    os.kill(int(job.job_id), signal.SIGTERM)  # submitit's controller hands it to the tasks
    until(lambda: job.state != "RUNNING")
    assert records.status(run)["state"] == "stopped"
    assert not list((run / "submitit").glob("*result*"))
    assert not (run / "failures").exists()


def test_names(program: Callable[[str, str], None]):
    assert ending(3) == "exit code 3"
    assert ending(-9) == "killed by SIGKILL (9)"
    assert 20000 <= master_port("123456789") < 32000
    assert resolvable("localhost") == "localhost"
    program("scontrol", 'echo "NodeName=$5 Arch=x86_64 NodeAddr=10.1.2.3 Version=22"')
    assert resolvable("no-such-node.invalid") == "10.1.2.3"
