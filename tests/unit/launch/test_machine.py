"""The self-test's view of a cluster: ranks and nodes, a command on every rank, and a job that never starts."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import submitit

from launch import records
from launch.command import Command
from launch.machine import Machine, last_words
from mffm.config.base import load
from mffm.config.cluster import ClusterConfig
from mffm.config.recipe import Recipe
from mffm.errors import InputError

SLURM = ClusterConfig(executor="slurm", nodes=2, tasks_per_node=4, gpus_per_node=4, time_minutes=600, warn_seconds=300)
LOCAL = ClusterConfig(executor="local", tasks_per_node=2)


@pytest.mark.parametrize(("ranks", "nodes", "per_node"), [(None, 2, 4), (4, 1, 4), (12, 3, 4), (1, 1, 1), (2, 1, 2)])
def test_ranks_fill_nodes(ranks: int | None, nodes: int, per_node: int):
    machine = Machine(SLURM, ranks)
    cluster = machine.cluster
    assert (cluster.nodes, cluster.tasks_per_node, cluster.gpus_per_node) == (nodes, per_node, per_node)
    assert machine.n_ranks == nodes * per_node
    assert cluster.time_minutes < 60
    assert cluster.warn_seconds < 60 * cluster.time_minutes / 2


def test_ranks_that_leave_a_node_half_full_are_refused():
    with pytest.raises(InputError, match="6 ranks do not fill nodes of 4"):
        Machine(SLURM, 6)
    gpu = LOCAL.model_copy(update={"tasks_per_node": 1, "gpus_per_node": 1})
    with pytest.raises(InputError, match="2 ranks on 1 GPU"):
        Machine(gpu, 2)


def test_a_command_runs_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "ranks.py").write_text(
        "import os, sys, time\n"
        "print('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'], os.environ['MASTER_PORT'], flush=True)\n"
        "if os.environ['RANK'] == '1': sys.exit('error: the disk is full' if sys.argv[1] == 'die' else 0)\n"
        "time.sleep(float(sys.argv[2]))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    machine, folder = Machine(LOCAL), tmp_path / "out"
    assert machine.run("ranks", ["go", "0"], 2, folder, 60) is None
    logs = [(folder / f"rank-{r}.log").read_text().split() for r in (0, 1)]
    assert [log[:4] for log in logs] == [["rank", str(r), "of", "2"] for r in (0, 1)]
    assert logs[0][4] == logs[1][4]
    started = time.monotonic()
    why = machine.run("ranks", ["die", "100"], 2, folder, 60)
    assert time.monotonic() - started < 30, "a rank that waits for a dead one is ended"
    assert why == f"error: the disk is full; {folder / 'rank-1.log'}"
    slow = machine.run("ranks", ["go", "100"], 2, folder, 1)
    assert slow is not None
    assert slow.startswith("not done after 1 s")
    assert "nothing was started" in last_words(tmp_path / "empty")


def test_a_command_does_not_outlive_its_killed_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "sleeper.py").write_text(
        "import os, time; print(os.getpid(), os.getppid(), flush=True); time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    executor = submitit.AutoExecutor(folder=tmp_path / "submitit", cluster="local")
    executor.update_parameters(timeout_min=1)
    executor.submit(Command("sleeper", [], str(tmp_path), 1, {}))
    log = tmp_path / "rank-0.log"
    deadline = time.monotonic() + 30
    while not (log.is_file() and len(log.read_text().split()) == 2):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child, task = log.read_text().split()
    os.kill(int(task), signal.SIGKILL)
    try:
        deadline = time.monotonic() + 10
        while records.process_runs(child):
            assert time.monotonic() < deadline, "the child goes on"
            time.sleep(0.05)
    finally:
        if records.process_runs(child):
            os.kill(int(child), signal.SIGKILL)


def test_a_machine_that_cannot_start_python_fails(make_recipe: Callable[..., Path], tmp_path: Path):
    """The shell line before the job fails, e.g. `module load` of a module that there is not."""
    machine = Machine(LOCAL.model_copy(update={"setup": ["echo no such module >&2; false"]}))
    assert machine.run("platform", [], 2, tmp_path / "out", 60) is not None
    job = machine.train(load(Recipe, make_recipe()), 2)
    deadline = time.monotonic() + 30
    while job.state() == "running":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert job.state() == "failed"
    assert job.starts() == 0
