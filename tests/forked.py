"""Processes that begin with their imports done: ``forked.run(["-m", "mffm", ...])`` instead of ``subprocess.run``.

The suite starts hundreds of commands; `mffm.forked` forks them from one server for each process of pytest. What is
about starting up itself (time, torchrun, the launcher) starts real interpreters.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from mffm.forked import Process, Server

ROOT = Path(__file__).parents[1]


def without_ranks() -> dict[str, str]:
    """Return this process's environment less what a training in it has left: rank, and a port that is taken."""
    left = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE")
    return {k: v for k, v in os.environ.items() if k not in (*left, "MASTER_ADDR", "MASTER_PORT")}


class Forked:
    """Starts and runs processes that one server forks."""

    def __init__(self) -> None:
        self._server = Server(folder=ROOT)

    def start(
        self,
        arguments: list[str],
        output: IO[Any],
        error: IO[Any],
        cwd: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> Process:
        """Start a process."""
        environment = without_ranks() if environment is None else environment
        with open(os.devnull) as nothing:
            streams = [nothing.fileno(), output.fileno(), error.fileno()]
            return self._server.start(arguments, streams, cwd or Path.cwd(), environment)

    def command(self, folder: Path) -> Path:
        """Write an executable ``mffm`` for shells, which runs the command line in a process that is forked."""
        self._server.begin()
        path = folder / "mffm"
        found = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}"
        code = f"{found}; import forked; sys.exit(forked.in_the_place_of('{self._server.path}', sys.argv[1:]))"
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S -c "{code}" -m mffm "$@"\n')
        path.chmod(0o755)
        return path

    def run(
        self,
        arguments: list[str],
        timeout: float = 280.0,
        cwd: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> "subprocess.CompletedProcess[str]":
        """Run a process to its end and return its code and output.

        Raises:
            subprocess.TimeoutExpired: it takes longer; it has been killed.
        """
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as error:
            process = self.start(arguments, output, error, cwd, environment)
            try:
                code = process.wait(timeout)
            finally:
                process.kill()
                output.seek(0)
                error.seek(0)
            return subprocess.CompletedProcess(arguments, code, output.read(), error.read())

    def ranks(self, n: int, arguments: list[str], timeout: float = 280.0) -> "subprocess.CompletedProcess[str]":
        """Run the ranks of one job, with what torchrun tells them; when one fails, the others are ended."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        deadline = time.monotonic() + timeout
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as error:
            started = []
            for rank in range(n):
                own = {k: str(v) for k, v in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
                started.append(self.start(arguments, output, error, environment={**without_ranks(), **own}))
            try:
                while any(process.poll() is None for process in started):
                    if time.monotonic() > deadline:
                        raise subprocess.TimeoutExpired(arguments, timeout)
                    if any(process.returncode for process in started):
                        break
                    time.sleep(0.02)
            finally:
                for process in started:
                    process.send_signal(signal.SIGTERM)
                codes = [process.wait(60.0) for process in started]
                output.seek(0)
                error.seek(0)
            return subprocess.CompletedProcess(arguments, max(map(abs, codes)), output.read(), error.read())


def in_the_place_of(path: str, arguments: Sequence[str]) -> int:
    """Run a process with this one's streams, folder, environment and signals; return its exit code."""
    process = Process(path, arguments, [0, 1, 2], Path.cwd(), dict(os.environ))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda sent, _: process.send_signal(sent))
    code = process.wait()
    return code if code >= 0 else 128 - code


_forked = Forked()
run, start, ranks, command = _forked.run, _forked.start, _forked.ranks, _forked.command
