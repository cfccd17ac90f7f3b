"""One rank of a training job inside a submitit task: start mffm, pass warnings on, report a death, requeue.

    SLURM ── SIGUSR2 ──▶ task of each rank ── SIGUSR2 ──▶ mffm: all ranks save at one step boundary, exit 75
                         task of rank 0    ── submitit: scontrol requeue ──▶ the job starts again, mffm resume

SIGUSR2 is a warning (time limit, preemption): save and requeue. SIGTERM alone is somebody else's decision (scancel,
``scontrol requeue``, preemption by requeue): save and wait to be killed; whoever sent it also decides what follows.
"""

import ctypes
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from launch import records
from launch.state import node_address
from mffm.errors import EXIT_INTERRUPTED
from mffm.executor import Usage, cpu_of_children, machine
from mffm.failures import START_VARIABLE, Report, ending, node_name, path_of

if TYPE_CHECKING:
    import submitit

RESEND_SECONDS = 0.4  # until mffm has its handlers, which it installs some seconds after its start
KILLED_WITHIN_SECONDS = 600.0  # after a requeue SLURM kills the waiting ranks in seconds
REPORT_LINES = 30


class Training:
    """The callable that submitit pickles. It holds no state of the run: all of that is in the run's folder."""

    def __init__(self, folder: str, threads: int, environment: Mapping[str, str], requeues: int = 0):
        self.folder = folder
        self.threads = threads
        self.environment = dict(environment)
        self.requeues = requeues

    def checkpoint(self) -> "submitit.helpers.DelayedSubmission":
        """Return what the requeued job runs: the same. submitit calls this on rank 0 alone."""
        import submitit

        return submitit.helpers.DelayedSubmission(
            Training(self.folder, self.threads, self.environment, self.requeues + 1)
        )

    def __call__(self) -> str:
        """Train or resume as one rank and return the run's folder; at once where the run is finished already.

        Raises:
            RuntimeError: the rank died; the message is the report.
            SystemExit: interrupted; no result is left behind, so submitit does not take the job for done.
        """
        import submitit

        task = submitit.JobEnvironment()
        folder, rank = Path(self.folder), task.global_rank
        if records.status(folder).get("state") == "finished":
            return self.folder
        # SLURM counts requeues that submitit has not seen as well; its local executor does not count.
        start = f"{task.job_id}.{max(self.requeues, int(os.environ.get('SLURM_RESTART_COUNT') or 0))}"
        asked: set[int] = set()
        requeue = signal.getsignal(signal.SIGUSR2)
        signal.signal(signal.SIGUSR2, lambda *_: asked.add(signal.SIGUSR2))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: asked.add(signal.SIGTERM))
        code, log, offset = self._train(task, asked, start)
        if code == 0:
            if rank == 0:
                records.write_status(folder, "finished")
            return self.folder
        if code == EXIT_INTERRUPTED or asked:
            how = "saved" if code == EXIT_INTERRUPTED else f"did not save in time ({ending(code)})"
            print(f"rank {rank}: asked to stop, {how}", file=sys.stderr, flush=True)
            _leave(task, folder, start, asked, requeue)
        written = records.failures(folder, start)
        if rank == 0:
            records.write_status(folder, "failed")
        # mffm reports its own exceptions, and with code >= 0 it ended by itself: the cause is in a report, or it is
        # this rank's. A local task's kill ends a rank because of another one.
        if written and (code >= 0 or task.cluster == "local" or path_of(folder, start, rank) in written):
            raise RuntimeError(written[0].read_text())
        report = write_report(folder, start, rank, task.num_tasks, code, log, offset)
        raise RuntimeError(report)

    def _train(self, task: "submitit.JobEnvironment", asked: set[int], start: str) -> tuple[int, Path, int]:
        """Run mffm; return its exit code, its log and where in the log this start begins."""
        folder, rank = Path(self.folder), task.global_rank
        log = folder / "logs" / f"rank-{rank}.log"
        log.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "mffm", *train_or_resume(folder)]
        environment = {**rank_environment(task, self.threads), **self.environment, START_VARIABLE: start}
        if rank == 0:
            step = records.checkpoint_step(folder) or 0
            records.write_status(
                folder, "running", start=start, job_id=task.job_id, host=node_name(), ranks=task.num_tasks,
                started=time.time(), started_step=step,
            )  # fmt: skip
        place, before = machine(), cpu_of_children()
        Usage(None, place).write(folder, start, rank)
        with log.open("ab") as stream:
            offset = stream.tell()
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                preexec_fn=prepare_child,
            )
            title = f"start {start}, rank {rank} of {task.num_tasks}, host {node_name()}"
            stream.write(f"--- {title}, pid {process.pid}, {records.now()}\n".encode())
        code = _watch(process, folder, asked, start, rank, is_local=task.cluster == "local")
        Usage(cpu_of_children() - before, place).write(folder, start, rank)
        return code, log, offset


def train_or_resume(folder: Path) -> list[str]:
    """Return mffm's arguments: resume where the run has a checkpoint, else train."""
    checkpoints = folder / "checkpoints"
    if checkpoints.is_dir():
        os.listdir(checkpoints)  # on NFS this refreshes what the node remembers of the folder
    return ["resume", str(folder)] if (checkpoints / "latest").exists() else ["train", str(folder / "submitted.yaml")]


def rank_environment(task: "submitit.JobEnvironment", threads: int) -> dict[str, str]:
    """Return the environment of mffm: what torchrun would set, threads, and the virtual environment on PATH."""
    path = os.environ.get("PATH", "")
    return {
        **os.environ,
        "RANK": str(task.global_rank),
        "WORLD_SIZE": str(task.num_tasks),
        "LOCAL_RANK": str(task.local_rank),
        "MASTER_ADDR": resolvable(task.hostnames[0]),
        "MASTER_PORT": str(master_port(task.raw_job_id)),
        "OMP_NUM_THREADS": str(threads),
        # ninja, which DeepSpeed's extensions are built with, lies beside the interpreter
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{path}",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",  # a crash in native code leaves a traceback in the rank's log
    }


def master_port(raw_job_id: str) -> int:
    """Return a port that two jobs on one node rarely share, below Linux's ephemeral ports (32768 and up)."""
    return 20000 + int("".join(filter(str.isdigit, raw_job_id)) or 0) % 12000


def resolvable(host: str) -> str:
    """Return the host, or SLURM's address of it where its name does not resolve (torch would retry for 30 minutes)."""
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return node_address(host)
    return host


def write_report(folder: Path, start: str, rank: int, n_ranks: int, code: int, log: Path, offset: int) -> str:
    """Report a process that left no report itself, and return the text: who, where, how, how far, its last words."""
    hint = {
        -signal.SIGKILL: "SIGKILL comes from the kernel when memory runs out (dmesg), or from somebody's kill -9.",
        2: "Exit code 2 is bad input: the message is below.",
    }.get(code, "")
    with log.open("rb") as stream:
        stream.seek(max(offset, stream.seek(0, os.SEEK_END) - 65536))
        lines = stream.read().decode(errors="replace").splitlines()[-REPORT_LINES:]
    report = Report(
        start, rank, n_ranks, node_name(), f"died: {ending(code)}",
        f"last logged step {records.last_row(folder).get('step', 'none')}",
        f"python -m launch.submit {folder} --cluster <the same YAML>", hint, f"last lines of {log}:", lines,
    )  # fmt: skip
    return report.write(folder)[1]


def prepare_child() -> None:
    """Between fork and exec: ignore warnings until mffm handles them, and die with the task.

    SLURM signals every process of a step. Ignoring survives exec; the default would kill mffm while it still imports.
    """
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if platform.system() == "Linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _watch(
    process: "subprocess.Popen[bytes]", folder: Path, asked: set[int], start: str, rank: int, is_local: bool
) -> int:
    """Wait for mffm. Send SIGUSR2 on, again and again, as mffm ignores it while it starts; keep the heartbeat."""
    sent, beat = float("-inf"), time.monotonic()
    while True:
        try:
            return process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            pass
        moment = time.monotonic()
        if asked and moment - sent > RESEND_SECONDS:
            process.send_signal(signal.SIGUSR2)
            sent = moment
        if moment - beat > records.HEARTBEAT_SECONDS:
            beat = moment
            if rank == 0 and (folder / "status.json").exists():
                os.utime(folder / "status.json")
        if is_local and any(p != path_of(folder, start, rank) for p in records.failures(folder, start)):
            process.kill()  # nobody else takes the job down, as srun does


def _leave(task: "submitit.JobEnvironment", folder: Path, start: str, asked: set[int], requeue: Any) -> NoReturn:
    """Requeue (rank 0), or wait to be killed."""
    is_main, is_local = task.global_rank == 0, task.cluster == "local"
    deadline = time.monotonic() + KILLED_WITHIN_SECONDS
    if asked == {signal.SIGTERM}:
        if is_main:
            records.write_status(folder, "stopped")
        # The warning may follow: submitit's own test signal and some preemptions send SIGTERM first. Where a rank
        # died, SIGTERM is srun's.
        while asked == {signal.SIGTERM} and time.monotonic() < deadline:
            if is_local or records.failures(folder, start):
                raise SystemExit(EXIT_INTERRUPTED)
            time.sleep(0.2)
        if asked == {signal.SIGTERM}:
            raise SystemExit(EXIT_INTERRUPTED)
    if is_main:
        records.write_status(folder, "requeued")
        try:
            requeue(signal.SIGUSR2, None)  # submitit: writes the pickle, scontrol requeue, SystemExit
        except Exception as error:
            records.write_status(folder, "stopped")
            again = f"python -m launch.submit {folder} --cluster <the same YAML>"
            print(f"saved, but could not requeue: {error}\ngo on with: {again}", file=sys.stderr, flush=True)
            raise
    elif not is_local:  # submitit's local executor starts again when all tasks have ended
        time.sleep(max(0.0, deadline - time.monotonic()))
    raise SystemExit(EXIT_INTERRUPTED)
