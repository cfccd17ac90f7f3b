"""Run jobs and say how they stand: a small Protocol, and a pool of local processes that implements it."""

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from mffm import forked
from mffm.errors import InputError
from mffm.failures import START_VARIABLE

State = Literal["waiting", "running", "done", "failed"]


@dataclass(frozen=True)
class Job:
    """One command with a name and a log file; ``after`` names jobs that must be done before it starts."""

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    after: Sequence[str] = ()


class Executor(Protocol):
    """Runs jobs somewhere."""

    def run(self, jobs: Sequence[Job], report: Callable[[Mapping[str, State]], None]) -> Mapping[str, State]:
        """Run all jobs; call ``report`` with their states now and then; return the final states."""
        ...


Started = subprocess.Popen[bytes] | forked.Process


class LocalExecutor:
    """Runs up to ``workers`` jobs at a time as processes on this machine.

    Jobs that are ``python -m mffm`` or a part of it are forked from one process that has their imports, where `forked`
    can; other commands start as they are.

    Attributes:
        cpu_seconds: job → CPU time of its process and of what that waited for, of the jobs that have ended; without the
            imports where it was forked, and else right where no other thread waits for processes.
    """

    def __init__(self, workers: int, poll_seconds: float = 0.5):
        assert workers >= 1
        self.workers = workers
        self.poll_seconds = poll_seconds
        self.cpu_seconds: dict[str, float] = {}

    def run(self, jobs: Sequence[Job], report: Callable[[Mapping[str, State]], None]) -> Mapping[str, State]:
        """Run all jobs. A job whose ``after`` failed fails without being started.

        Processes still running when this call ends early (an interrupt) are terminated.
        """
        states: dict[str, State] = {job.name: "waiting" for job in jobs}
        assert len(states) == len(jobs), "two jobs of one name"
        running: dict[str, Started] = {}
        try:
            while "waiting" in states.values() or running:
                for name, process in list(running.items()):
                    if self._has_ended(name, process):
                        states[name] = "done" if process.returncode == 0 else "failed"
                        del running[name]
                for job in jobs:
                    if states[job.name] != "waiting":
                        continue
                    if any(states.get(name) == "failed" for name in job.after):
                        states[job.name] = "failed"
                    elif len(running) < self.workers and all(states.get(name) == "done" for name in job.after):
                        running[job.name] = _start(job)
                        states[job.name] = "running"
                report(states)
                assert running or "waiting" not in states.values(), (
                    f"jobs that wait for each other, or for none: {states}"
                )
                if running:
                    time.sleep(self.poll_seconds)
        finally:
            for process in running.values():
                process.terminate()
            for name, process in running.items():
                self._has_ended(name, process, wait=True)
        return states

    def _has_ended(self, name: str, process: Started, wait: bool = False) -> bool:
        """Return whether a process has ended. The children's usage grows at that moment, by all that it used."""
        before = cpu_of_children()
        if (process.wait() if wait else process.poll()) is None:
            return False
        used = process.cpu_seconds if isinstance(process, forked.Process) else cpu_of_children() - before
        if used is not None:
            self.cpu_seconds[name] = used
        return True


def cpu_of_children() -> float:
    """Return the CPU time, in seconds, of the processes that this one has waited for, and of those that they did."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@dataclass(frozen=True)
class Usage:
    """What one start of one rank of a submitted run used.

    Attributes:
        cpu_seconds: None where nobody saw its end, or it has not ended.
        machine: as `machine` has it.
    """

    cpu_seconds: float | None
    machine: str

    def write(self, run: Path, start: str, rank: int) -> None:
        """Write it to ``cpu/`` in the run's folder, aside and renamed: a reader never sees half of it."""
        path = run / "cpu" / f"{start}-rank-{rank}.json"
        path.parent.mkdir(exist_ok=True)
        aside = path.with_name(f".{path.name}.partial")
        aside.write_text(json.dumps(asdict(self)) + "\n")
        os.replace(aside, path)


def usages(run: Path) -> list[Usage]:
    """Return what all starts of all ranks of a run used; empty for a run that was not submitted."""
    return [Usage(**json.loads(path.read_text())) for path in sorted((run / "cpu").glob("*-rank-*.json"))]


def machine() -> str:
    """Return the processor of this machine, for reports."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = "processor not known"
    return f"{name}, {os.cpu_count()} CPUs"


def _start(job: Job) -> Started:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **job.environment}
    with job.log.open("ab") as log, open(os.devnull, "rb") as nothing:
        server = _server(job)
        if server is not None:
            try:
                streams = [nothing.fileno(), log.fileno(), log.fileno()]
                with _servers_lock:
                    return server.start(job.command[1:], streams, Path.cwd(), environment)
            except (ConnectionError, FileNotFoundError):  # it has said why, or its socket was cleaned away
                _servers[_imported_with(job)] = None
        return subprocess.Popen(list(job.command), stdout=log, stderr=subprocess.STDOUT, stdin=nothing, env=environment)


# Shared by all executors of this process; None where one could not begin.
_servers: dict[frozenset[tuple[str, str]], forked.Server | None] = {}
_servers_lock = threading.Lock()


def _imported_with(job: Job) -> frozenset[tuple[str, str]]:
    """Return the variables of a job that its imports may read, such as OMP_NUM_THREADS."""
    return frozenset((k, v) for k, v in job.environment.items() if not k.startswith("WANDB_"))


def _server(job: Job) -> forked.Server | None:
    """Return the process that forks a job; None where it must start as it is."""
    is_mffm = tuple(job.command[:2]) == (sys.executable, "-m") and job.command[2].split(".")[0] == "mffm"
    if not is_mffm or not forked.can_fork(job.command):
        return None
    key = _imported_with(job)
    with _servers_lock:
        if key not in _servers:
            _servers[key] = forked.Server(dict(key))
        return _servers[key]


@contextmanager
def handling_stops(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Give SIGINT and SIGTERM to a handler, in the main thread."""
    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, old in before.items():
            signal.signal(s, old)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file of a folder in which one controller at a time may work.

    Raises:
        InputError: another process holds it.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{path.parent}: another controller is at work in this folder") from error
        yield


def process_of(*arguments: Path | str) -> int | None:
    """Return a process of this machine that has one of these arguments or trains in such a run folder.

    None where there is none, or no /proc. What a SLURM job of the launcher runs does not count: SLURM knows of it.
    """
    wanted = {word.encode() for a in arguments for word in (str(a), f"run={a}")}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if wanted & set(path.read_bytes().split(b"\0")) and not _is_of_slurm(path.parent):
                return int(path.parent.name)
        except OSError:
            continue
    return None


def _is_of_slurm(process: Path) -> bool:
    names = {word.partition(b"=")[0] for word in (process / "environ").read_bytes().split(b"\0")}
    return {START_VARIABLE.encode(), b"SLURM_JOB_ID"} <= names
