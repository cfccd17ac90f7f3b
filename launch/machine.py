"""The self-test's view of a cluster: start, warn, kill and watch jobs (``mffm.selftest.machine.Machine``)."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch import records
from launch.command import Command
from launch.state import NO_ANSWER, TERMINAL, UNKNOWN, slurm_state
from launch.submit import Submitted, load_recipe, make_executor, refusals, submit
from mffm.config.cluster import ClusterConfig
from mffm.config.recipe import Recipe
from mffm.errors import InputError
from mffm.executor import State

if TYPE_CHECKING:
    import submitit

POLL_SECONDS = 0.2
BEREFT_SECONDS = 5.0  # that ranks have to notice that another one failed
MINUTES = 20  # of one job of the self-test; a short limit starts sooner in a queue
START = re.compile(rb"^--- start .* host (\S+), pid (\d+),", re.MULTILINE)  # written by launch.task


class Machine:
    """A cluster as the self-test uses it.

    Args:
        cluster: its YAML.
        ranks: instead of the YAML's nodes × tasks.

    Raises:
        InputError: so many ranks do not fill whole nodes.
    """

    def __init__(self, cluster: ClusterConfig, ranks: int | None = None):
        update = {
            "time_minutes": min(cluster.time_minutes, MINUTES), "warn_seconds": min(cluster.warn_seconds, 60)
        }  # fmt: skip
        self.cluster = cluster.model_copy(update=update)
        self.cluster = self._of(ranks or cluster.nodes * cluster.tasks_per_node)
        self.n_ranks = self.cluster.nodes * self.cluster.tasks_per_node
        self.on_gpu = cluster.gpus_per_node > 0
        place = "SLURM" if cluster.executor == "slurm" else "this machine"
        self.description = f"{place}, {self.cluster.nodes} node(s) × {self.cluster.tasks_per_node} rank(s)"

    def _of(self, ranks: int) -> ClusterConfig:
        """Return the cluster's YAML for so many ranks."""
        per_node = ranks if self.cluster.executor == "local" else min(ranks, self.cluster.tasks_per_node)
        if ranks % per_node:
            raise InputError(
                f"{ranks} ranks do not fill nodes of {per_node} (tasks_per_node); give a multiple, or fewer"
            )
        update = {"nodes": ranks // per_node, "tasks_per_node": per_node}
        if self.cluster.gpus_per_node:
            if per_node > self.cluster.gpus_per_node:
                raise InputError(f"{ranks} ranks on {self.cluster.gpus_per_node} GPU(s): one rank drives one GPU")
            update["gpus_per_node"] = per_node
        return self.cluster.model_copy(update=update)

    def train(self, recipe: Recipe, ranks: int) -> "TrainingJob":
        """Submit a new run."""
        cluster = self._of(ranks)
        return TrainingJob(submit(recipe, cluster)[0], cluster)

    def resume(self, folder: Path, ranks: int) -> "TrainingJob":
        """Submit the run in a folder again."""
        cluster = self._of(ranks)
        return TrainingJob(submit(load_recipe(folder, []), cluster)[0], cluster)

    def run(self, module: str, arguments: Sequence[str], ranks: int, folder: Path, seconds: float) -> str | None:
        """Run a module on every rank, at most so long after it left the queue; return None, or why it failed.

        The folder is emptied of what an earlier run of the module left there.
        """
        cluster, folder = self._of(ranks), folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("rank-*.*"):
            old.unlink()
        executor = make_executor(folder / "submitit", module.rpartition(".")[2], cluster, None)
        with refusals("the job"):
            job = executor.submit(Command(module, arguments, str(folder), cluster.cpus_per_task, cluster.environment))
        try:
            return _wait(job, cluster, folder, seconds)
        except BaseException:  # an interrupt must not leave a job behind
            cancel(job, cluster)
            raise


def _wait(job: "submitit.Job[str]", cluster: ClusterConfig, folder: Path, seconds: float) -> str | None:
    """Wait for a command; return None, or why it failed."""
    ran, bereft = 0.0, 0.0  # seconds out of the queue, and since a rank failed
    while (state := job_state(job, cluster, folder)) in ("waiting", "running"):
        time.sleep(POLL_SECONDS)
        ran += POLL_SECONDS if state == "running" else 0.0
        bereft += POLL_SECONDS if any(folder.glob("rank-*.failed")) else 0.0
        if bereft > BEREFT_SECONDS:  # this machine has nobody like srun, who ends the others
            cancel(job, cluster)
        if ran > seconds:
            cancel(job, cluster)
            return f"not done after {seconds:.0f} s: {last_words(folder)}"
    return None if state == "done" else last_words(folder)


class TrainingJob:
    """A submitted training run."""

    def __init__(self, submitted: Submitted, cluster: ClusterConfig):
        self.folder = submitted.folder
        self.job = submitted.job
        self.cluster = cluster

    def state(self) -> State:
        """Return how the job stands."""
        return job_state(self.job, self.cluster, self.folder)

    def step(self) -> int:
        """Return the last logged step."""
        return int(records.last_row(self.folder).get("step", 0))

    def _places(self, rank: int) -> list[tuple[str, int]]:
        """Return host and process of every start of a rank."""
        try:
            log = (self.folder / "logs" / f"rank-{rank}.log").read_bytes()
        except OSError:
            return []
        return [(host.decode(), int(pid)) for host, pid in START.findall(log)]

    def starts(self) -> int:
        """Return how often rank 0 was started."""
        return len(self._places(0))

    def kill_rank(self, rank: int) -> None:
        """Send SIGKILL to the training process of a rank, wherever it runs.

        Raises:
            RuntimeError: srun could not run a second step in the job.
        """
        host, pid = self._places(rank)[-1]
        if self.cluster.executor == "local":
            os.kill(pid, signal.SIGKILL)
            return
        step = ["srun", f"--jobid={self.job.job_id}", "--overlap", f"--nodelist={host}", "--nodes=1", "--ntasks=1"]
        done = subprocess.run([*step, "kill", "-9", str(pid)], capture_output=True, text=True, timeout=60)
        if done.returncode != 0:
            raise RuntimeError(f"srun --overlap could not reach {host}: {done.stderr.strip()[-200:]}")

    def warn(self) -> None:
        """Send SIGUSR2 to every task."""
        if self.cluster.executor == "slurm":
            subprocess.run(["scancel", self.job.job_id, "--signal", "USR2"], timeout=60, check=True)
            return
        for rank in range(self.cluster.tasks_per_node):
            _, pid = self._places(rank)[-1]
            os.kill(parent(pid), signal.SIGUSR2)

    def start_now(self) -> None:
        """Let a requeued job start without SLURM's two minutes; where that is forbidden, it waits."""
        if self.cluster.executor == "slurm":
            command = ["scontrol", "update", f"jobid={self.job.job_id}", "StartTime=now+3"]
            subprocess.run(command, capture_output=True, timeout=60)

    def why(self) -> str:
        """Return the first line of the report of the rank that died first, or what there is instead."""
        return last_words(self.folder)

    def cancel(self) -> None:
        """End the job."""
        cancel(self.job, self.cluster)


def job_state(job: "submitit.Job[str]", cluster: ClusterConfig, folder: Path) -> State:
    """Return how a job stands that trains, or runs a command, in a folder.

    While SLURM does not answer, it counts as running: its time goes on, so a wait for it ends.
    """
    n_ranks = cluster.nodes * cluster.tasks_per_node
    done = records.status(folder).get("state") == "finished" or len(list(folder.glob("rank-*.done"))) == n_ranks
    if cluster.executor == "local":
        return "running" if not job.done() else "done" if done else "failed"
    state = slurm_state(job.job_id)
    if state == NO_ANSWER:
        return "running"
    if state in TERMINAL or state == UNKNOWN:
        return "done" if state == "COMPLETED" or (state == UNKNOWN and done) else "failed"
    return "waiting" if state in ("PENDING", "REQUEUED", "CONFIGURING", "RESV_DEL_HOLD") else "running"


def cancel(job: "submitit.Job[str]", cluster: ClusterConfig) -> None:
    """End a job; at once on this machine, by scancel on SLURM."""
    if cluster.executor == "slurm":
        subprocess.run(["scancel", job.job_id], capture_output=True, timeout=60)
    elif not job.done():
        os.kill(int(job.job_id), signal.SIGTERM)  # submitit's controller hands it on: the ranks save and leave


def last_words(folder: Path) -> str:
    """Return the most telling line that a failed job left in its folder."""
    reports = sorted((folder / "failures").glob("*-rank-*.txt"), key=lambda path: path.stat().st_mtime)
    if reports:
        lines = [line.strip() for line in reports[0].read_text().splitlines() if line.strip()]
        said = "" if lines[-1].startswith("---") else f": {lines[-1]}"  # it printed nothing before it died
        return f"{lines[0]}{said}; {reports[0]}"
    for pattern in (
        "rank-*.failed",
        "rank-*.log",
        "logs/rank-*.log",
        "submitit/*.err",
        "submitit/*.out",
        "../submitit/*.err",
    ):
        for path in sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime):  # who died first wrote first
            path = path.with_suffix(".log") if path.suffix == ".failed" else path
            lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
            own = [line for line in lines if not line.startswith("srun:")] or lines
            telling = [line for line in own if re.search("error|killed|refused", line, re.IGNORECASE)] or own
            if telling:
                return f"{telling[-1]}; {path}"
    return f"nothing was started; {folder}"


def parent(pid: int) -> int:
    """Return the parent of a process of this machine."""
    shown = subprocess.run(["ps", "-o", "ppid=", "-p", str(pid)], capture_output=True, text=True, check=True)
    return int(shown.stdout)
