"""Training through launch.submit on a real SLURM: two nodes, an array, preemption, scancel, a killed rank."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import records, runs, state

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(150), pytest.mark.usefixtures("slurm")]

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "configs" / "clusters" / "slurm_local.yaml"
STEPS = 150  # seconds, for the warning to come in between
JOB_SECONDS = 100.0  # a job that takes longer fails the test; alone on two cores it takes 15


@dataclass
class Submit:
    """Submits recipes as a user does, and cancels what is left."""

    store: Path
    folder: Path
    recipe: Callable[[Path, Path], dict[str, Any]]

    def __post_init__(self) -> None:
        self.jobs: list[str] = []

    def __call__(self, run: str, *options: str, steps: int = STEPS) -> list[str]:
        content = self.recipe(self.store, self.folder / run)
        content["train"] |= {"steps": steps, "validate_every": 50, "save_every": 50}
        path = self.folder / f"{run}.yaml"
        path.write_text(yaml.safe_dump(content))
        command = [sys.executable, "-m", "launch.submit", str(path), "--cluster", str(CLUSTER), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        jobs = re.findall(r"^job (\S+):", done.stdout, re.MULTILINE)
        self.jobs += jobs
        return jobs

    def close(self) -> None:
        for job in self.jobs:
            subprocess.run(["scancel", job.split("_")[0]], timeout=30)


@pytest.fixture
def submit(molecule_store: Path, tiny_recipe: Any, tmp_path: Path) -> Iterator[Submit]:
    made = Submit(molecule_store, tmp_path, tiny_recipe)
    yield made
    made.close()


@pytest.fixture(scope="module")
def uninterrupted(
    slurm: None, molecule_store: Path, tiny_recipe: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """The folder of a finished run of two ranks on two nodes."""
    made = Submit(molecule_store, tmp_path_factory.mktemp("uninterrupted"), tiny_recipe)
    (job,) = made("straight")
    run = made.folder / "straight"
    assert ended(job, run) == "COMPLETED", told(run)
    yield run
    made.close()


def ended(job: str, run: Path) -> str:
    """Return the state in which a job ended; a job that does not end fails the test."""
    found = state.wait([job], JOB_SECONDS, poll_seconds=0.3)[job]
    assert found in state.TERMINAL, f"{found} after {JOB_SECONDS} s\n{told(run)}"
    return found


def told(run: Path) -> str:
    """Return what a run's logs say, for the message of a failing test."""
    paths = [*sorted(run.glob("logs/*")), *sorted(run.glob("submitit/*.err")), *sorted(run.parent.glob("submitit/*"))]
    texts = [
        f"{path}:\n{path.read_text(errors='replace')[-3000:]}" for path in paths if path.suffix in (".log", ".err")
    ]
    return "\n".join([f"status {records.status(run)}", *texts])


def until(condition: Callable[[], Any], run: Path, seconds: float = 60.0) -> None:
    """Wait for something; fail with the run's logs where it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s\n{told(run)}"
        time.sleep(0.1)


def rows(run: Path) -> list[dict[str, float]]:
    """Return the losses and metrics of every step, without what depends on the clock."""
    clock = ("atoms_per_s", "edges_per_s", "time", "seconds", "cpu_s")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(clock)} for line in lines]


def is_at(run: Path, step: int) -> bool:
    return int(records.last_row(run).get("step", 0)) >= step


def pids(run: Path, rank: int) -> list[int]:
    """Return the process of mffm of every start of a rank."""
    return [
        int(p) for p in re.findall(r"^--- start .* pid (\d+),", (run / "logs" / f"rank-{rank}.log").read_text(), re.M)
    ]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_two_nodes_train_and_the_folder_says_so(uninterrupted: Path):
    run = uninterrupted
    assert records.status(run)["state"] == "finished"
    assert "rank 0 of 2, host n1" in (run / "logs" / "rank-0.log").read_text()
    assert "rank 1 of 2, host n2" in (run / "logs" / "rank-1.log").read_text()
    assert json.loads((run / "code.json").read_text()).keys() >= {"version", "commit", "dirty"}
    row = runs.read(run)
    assert (row.state, row.step, row.steps) == ("finished", STEPS, STEPS)
    assert row.best is not None
    assert row.job_id == records.read_json(run / "job.json")["job_id"]


def test_an_array_has_a_run_a_seed(submit: Submit):
    jobs = submit("seeds", "--seeds", "0,1", "--nodes", "1", steps=6)
    assert [job.split("_")[1] for job in jobs] == ["0", "1"]
    folders = [submit.folder / "seeds" / f"seed-{seed}" for seed in (0, 1)]
    for job, run in zip(jobs, folders, strict=True):
        assert ended(job, run) == "COMPLETED", told(run)
    assert [(row.folder, row.state) for row in map(runs.read, runs.find(submit.folder / "seeds"))] == [
        (run, "finished") for run in folders
    ]
    assert rows(folders[0]) != rows(folders[1])


@pytest.mark.parametrize("how", ["preempted", "at_start"])
def test_preemption_requeues_and_goes_on_bit_identically(how: str, submit: Submit, uninterrupted: Path):
    (job,) = submit("preempted")
    run = submit.folder / "preempted"
    if how == "preempted":
        until(lambda: is_at(run, 5), run)
        subprocess.run(["scancel", job, "--signal", "TERM"], check=True, timeout=30)  # job._interrupt sends both
    else:  # mffm still imports torch: the warning must neither kill it nor be lost
        until(lambda: all((run / "logs" / f"rank-{r}.log").exists() and pids(run, r) for r in (0, 1)), run)
    subprocess.run(["scancel", job, "--signal", "USR2"], check=True, timeout=30)
    until(lambda: records.status(run).get("state") == "requeued", run)
    saved = records.checkpoint_step(run)
    assert saved is not None
    assert saved < STEPS
    assert runs.read(run).state == "requeued"
    # SLURM holds a requeued job back for two minutes; within the same second it kills it ("credential revoked")
    release = ["scontrol", "update", f"jobid={job}", "StartTime=now+3"]
    until(lambda: state.slurm_state(job) == "PENDING", run)
    until(lambda: subprocess.run(release, capture_output=True, timeout=30).returncode == 0, run)
    assert ended(job, run) == "COMPLETED", told(run)
    assert f"resumed from step-{saved:08d}" in (run / "logs" / "rank-0.log").read_text()
    assert len(pids(run, 0)) == len(pids(run, 1)) == 2
    assert rows(run) == rows(uninterrupted)
    last = Path("checkpoints") / f"step-{STEPS:08d}"
    names = sorted(path.name for path in (uninterrupted / last).iterdir())
    assert len(names) >= 4
    for name in names:
        assert (run / last / name).read_bytes() == (uninterrupted / last / name).read_bytes(), name


def test_scancel_saves_and_ends(submit: Submit):
    (job,) = submit("cancelled", steps=100_000)
    run = submit.folder / "cancelled"
    until(lambda: is_at(run, 3), run)
    subprocess.run(["scancel", job], check=True, timeout=30)
    assert ended(job, run) == "CANCELLED"
    until(lambda: not any(is_running(pid) for rank in (0, 1) for pid in pids(run, rank)), run, 20)
    assert records.status(run)["state"] == "stopped"
    assert (records.checkpoint_step(run) or 0) >= 3


@pytest.mark.parametrize("victim", ["training", "task"])
def test_a_killed_rank_fails_the_job_promptly_with_a_report(victim: str, submit: Submit):
    (job,) = submit("killed", steps=100_000)
    run = submit.folder / "killed"
    until(lambda: is_at(run, 3), run)
    (child,) = pids(run, 1)
    parent = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1])
    started = time.monotonic()
    os.kill(child if victim == "training" else parent, signal.SIGKILL)
    assert ended(job, run) == "FAILED", told(run)
    assert time.monotonic() - started < 30
    until(lambda: not any(is_running(pid) for rank in (0, 1) for pid in pids(run, rank)), run, 20)
    row = runs.read(run)
    if victim == "training":
        assert row.report is not None
        report = row.report.read_text()
        assert report.startswith("rank 1 of 2 on n2 died: killed by SIGKILL (9)")
        assert "last lines of" in report
        assert row.state == "failed"
    else:  # a task that was killed cannot report; srun and the other rank do
        assert "Killed" in "".join(path.read_text() for path in (run / "submitit").glob("*.err"))
        assert row.state in ("failed", "stopped", "lost")
