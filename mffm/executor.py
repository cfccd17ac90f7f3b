"""Run jobs and say how they stand: a small Protocol, and a pool of local processes that implements it."""

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

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


class LocalExecutor:
    """Runs up to ``workers`` jobs at a time as processes on this machine."""

    def __init__(self, workers: int, poll_seconds: float = 0.5):
        assert workers >= 1
        self.workers = workers
        self.poll_seconds = poll_seconds

    def run(self, jobs: Sequence[Job], report: Callable[[Mapping[str, State]], None]) -> Mapping[str, State]:
        """Run all jobs. A job whose ``after`` failed fails without being started.

        Processes still running when this call ends early (an interrupt) are terminated.
        """
        states: dict[str, State] = {job.name: "waiting" for job in jobs}
        assert len(states) == len(jobs), "two jobs of one name"
        running: dict[str, subprocess.Popen[bytes]] = {}
        try:
            while "waiting" in states.values() or running:
                for name, process in list(running.items()):
                    if process.poll() is not None:
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
            for process in running.values():
                process.wait()
        return states


def _start(job: Job) -> "subprocess.Popen[bytes]":
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        return subprocess.Popen(
            list(job.command),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **job.environment},
        )
