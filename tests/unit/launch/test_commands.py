"""Commands as one array: what SLURM is told, and what a second controller adopts and submits again."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from launch import commands, records
from launch.commands import CommandArray, Repeatable, refuse_under_way
from mffm.config.cluster import ClusterConfig
from mffm.errors import InputError
from mffm.executor import Job, State

SLURM = ClusterConfig(executor="slurm", nodes=2, tasks_per_node=4, cpus_per_task=3)


class Interrupted(BaseException):
    """What a signal raises."""


def interrupted(states: Mapping[str, State]) -> None:
    raise Interrupted


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    command = [sys.executable, "-m", "timeit", "-n", "1"]
    return [Job(f"part-{k}", command, tmp_path / "work" / "tasks" / f"part-{k}" / "rank-0.log") for k in range(3)]


@pytest.fixture
def queue(slurm_programs: Path, program: Callable[[str, str], None], tmp_path: Path) -> Callable[[str], None]:
    """Return a function that sets what squeue says of all jobs."""

    def say(lines: str) -> None:
        (tmp_path / "queue").write_text(lines)
        program("squeue", f'case "$*" in *--name*) exit 0;; esac; cat {tmp_path}/queue')

    say("")
    return say


def array(tmp_path: Path) -> tuple[CommandArray, list[str]]:
    said: list[str] = []
    return CommandArray(tmp_path / "work", "label-gfn2", SLURM, None, said.append, poll_seconds=0.02), said


def test_tasks_are_submitted_adopted_and_submitted_again(
    jobs: list[Job], slurm_programs: Path, queue: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, said = array(tmp_path)
    with pytest.raises(Interrupted):
        first.run(jobs, interrupted)
    assert said == ["array 8: 3 task(s) submitted"]
    script = (slurm_programs / "8.sh").read_text()
    for option in ("--array=0-2%3", "--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=3", "--requeue"):
        assert f"#SBATCH {option}" in script
    queue("8_0 RUNNING\n8_1 PENDING\n8_2 FAILED\n")
    with pytest.raises(InputError, match=r"tasks of an earlier start with --cluster are at work.* --name label-"):
        refuse_under_way(tmp_path / "work")
    seen: list[dict[str, State]] = []

    def report(states: Mapping[str, State]) -> None:
        """The first task ends well, and SLURM forgets the second; the third, submitted again, fails."""
        seen.append(dict(states))
        if len(seen) == 2:
            (jobs[0].log.parent / "rank-0.done").touch()
            queue("9 FAILED\n")

    monkeypatch.setattr(commands, "FORGOTTEN_SECONDS", 0.1)
    second, said = array(tmp_path)
    assert second.run(jobs, report) == {"part-0": "done", "part-1": "failed", "part-2": "failed"}
    assert said == ["2 task(s) of an earlier start are queued or run", "array 9: 1 task(s) submitted"]
    assert seen[0] == {"part-0": "running", "part-1": "waiting", "part-2": "waiting"}
    refuse_under_way(tmp_path / "work")


def test_silence_is_waited_for(
    jobs: list[Job], queue: Callable[[str], None], slurm_away: Callable[[], None], tmp_path: Path
) -> None:
    one, said = array(tmp_path)
    polls = 0

    def report(states: Mapping[str, State]) -> None:
        nonlocal polls
        polls += 1
        if polls == 2:
            slurm_away()
        elif polls == 4:
            with pytest.raises(InputError, match="SLURM does not answer, so tasks"):
                refuse_under_way(tmp_path / "work")
            queue("8_0 RUNNING\n8_1 RUNNING\n8_2 COMPLETED\n")
        elif polls == 7:
            queue("8_0 COMPLETED\n8_1 COMPLETED\n8_2 COMPLETED\n")

    assert set(one.run(jobs, report).values()) == {"done"}
    assert said[1:] == ["SLURM does not answer; the jobs are kept", "SLURM answers again"]


def test_a_requeued_task_is_the_same(tmp_path: Path) -> None:
    body = Repeatable("timeit", ["-n", "1"], str(tmp_path), 1, {"A": "b"})
    again = body.checkpoint()
    assert again.function is body
    assert (body.module, body.arguments, body.threads, body.environment) == ("timeit", ["-n", "1"], 1, {"A": "b"})


def test_a_cluster_is_slurm(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs executor: slurm"):
        CommandArray(tmp_path, "label", ClusterConfig(executor="local"))


def test_the_task_of_a_part_labels_what_it_has_left(tmp_path: Path) -> None:
    """``mffm.label.task`` by itself, as a node runs it, twice: the second time nothing is left."""
    import numpy as np
    from ase import Atoms
    from ase.io import write

    from mffm.label import run, task
    from mffm.label.journal import Limits
    from mffm.label.structures import Source
    from mffm.label.work import Request, begin

    write(tmp_path / "in.extxyz", [Atoms("Cu2", [[0, 0, 0], [0, 0, 2.2 + 0.1 * i]]) for i in range(7)])
    level = "ase:ase.calculators.emt:EMT"
    request = Request(Source.of([tmp_path / "in.extxyz"]), level, "emt")
    work = begin(tmp_path / "work", request)
    made = run._jobs(work, 2, set(range(7)), 1, Limits(30.0))
    assert [job.name for job in made] == ["part-00000", "part-00001"]
    assert sorted(np.concatenate([np.load(task.part_path(work.folder, k)) for k in (0, 1)])) == list(range(7))
    for left in (4, 0):
        done = subprocess.run(made[0].command, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        assert f"part 0: {left} structures to label with 1 workers" in done.stdout
    assert len(work.ledger().labelled) == 4
    assert [job.name for job in run._jobs(work, 2, {1, 3, 5}, 1, Limits())] == ["part-00001"]
    assert records.read_json(work.folder / "work.json")["level"] == level
