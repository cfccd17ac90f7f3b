"""Processes that begin with their imports done: ``forked.run(["-m", "mffm", ...])`` instead of ``subprocess.run``.

``import torch, deepspeed`` costs seconds of CPU and the suite starts hundreds of commands. A server (``python forked.py
SOCKET``, one for each process of pytest) imports them, then forks a process for each request: it runs ``-m MODULE``,
``-c CODE`` or ``SCRIPT`` as the interpreter would, with its own folder, environment, output, signals and exit code.
Request: the descriptors of stdin, stdout and stderr, and a line of JSON; answers: a line with the process id, a
line with its exit code. What is about starting up itself (time, torchrun, the launcher) starts real interpreters.
"""

import atexit
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from importlib import import_module
from pathlib import Path
from typing import IO, Any

# What a training imports in its course; an optimiser's first step alone takes torch._dynamo with it.
PRELOADED = (
    "torch", "deepspeed", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "matplotlib.pyplot",
    "matplotlib.backends.backend_agg", "vesin", "ase.io", "mffm.cli", "mffm.training.loop", "mffm.evaluate",
)  # fmt: skip


def be(arguments: list[str]) -> None:
    """Run what an interpreter that is started with these arguments would run."""
    kind, rest = arguments[0], arguments[1:]
    if kind == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(arguments[0])
        runpy.run_path(kind, run_name="__main__")


def become(request: dict[str, Any], descriptors: list[int]) -> None:
    """Make this process the one that was asked for."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    added = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    sys.path[1:1] = added
    random.seed()
    np = import_module("numpy")
    np.random.seed()


def keep(connection: socket.socket, listener: socket.socket) -> list[str] | None:
    """Fork the process that a connection asks for and tell its id and exit code; in it, return its arguments."""
    text, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while not text.endswith(b"\n"):
        text += connection.recv(1 << 20)
    request = json.loads(text)
    child = os.fork()
    if not child:
        listener.close()
        connection.close()
        become(request, descriptors)
        return list(request["arguments"])
    for descriptor in descriptors:
        os.close(descriptor)
    try:
        connection.sendall(f"{child}\n".encode())
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        connection.sendall(f"{status}\n".encode())
    except (BrokenPipeError, ConnectionResetError):  # whoever asked is gone
        pass
    return None


def serve(path: str) -> list[str]:
    """Answer requests; return only in a process that has been asked for, with its arguments."""
    for module in PRELOADED:
        import_module(module)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            sys.exit()  # the suite is gone
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        arguments = keep(connection, listener)
        if arguments is None:
            os._exit(0)
        return arguments


def without_ranks() -> dict[str, str]:
    """Return this process's environment less what a training in it has left: rank, and a port that is taken."""
    left = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE")
    return {k: v for k, v in os.environ.items() if k not in (*left, "MASTER_ADDR", "MASTER_PORT")}


class Process:
    """A process that was forked, with what the tests need of ``subprocess.Popen``."""

    def __init__(self, path: str, arguments: list[str], streams: list[int], cwd: Path, environment: dict[str, str]):
        self.returncode: int | None = None
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(path)
        request = {"arguments": arguments, "folder": str(cwd), "environment": environment}
        socket.send_fds(self._connection, [b" "], streams)  # JSON may begin with it
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        self._told = b""
        self.pid = self._line(None)

    def _line(self, seconds: float | None) -> int:
        deadline = None if seconds is None else time.monotonic() + seconds
        while b"\n" not in self._told:
            left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1e3
            ready = select.poll()  # not select, which refuses descriptors above 1024
            ready.register(self._connection, select.POLLIN)
            if not ready.poll(left):
                raise TimeoutError
            more = self._connection.recv(100)
            assert more, "the process that forks is gone"
            self._told += more
        line, _, self._told = self._told.partition(b"\n")
        return int(line)

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code.

        Raises:
            subprocess.TimeoutExpired: it runs still.
        """
        if self.returncode is None:
            try:
                self.returncode = self._line(timeout)
            except TimeoutError:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0) from None
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        try:
            return self.wait(0.0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        """Send a signal, if it runs still."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)


class Server:
    """The process that forks the others; it starts at the first request."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="forked-")
        self._path = str(Path(self._folder.name) / "socket")
        self._server: subprocess.Popen[bytes] | None = None

    def start(
        self,
        arguments: list[str],
        output: IO[Any],
        error: IO[Any],
        cwd: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> Process:
        """Start a process."""
        self._begin()
        environment = without_ranks() if environment is None else environment
        with open(os.devnull) as nothing:
            streams = [nothing.fileno(), output.fileno(), error.fileno()]
            return Process(self._path, arguments, streams, cwd or Path.cwd(), environment)

    def _begin(self) -> None:
        if self._server is None:
            command = [sys.executable, __file__, self._path]
            self._server = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=Path(__file__).parents[1])
            while not os.path.exists(self._path):
                assert self._server.poll() is None
                time.sleep(0.02)

    def command(self, folder: Path) -> Path:
        """Write an executable ``mffm`` for shells, which runs the command line in a process that is forked."""
        self._begin()
        path = folder / "mffm"
        line = f'exec "{sys.executable}" -S -E "{__file__}" "{self._path}" -m mffm "$@"'
        path.write_text(f"#!/bin/sh\n{line}\n")
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

    def stop(self) -> None:
        """End it."""
        if self._server is not None:
            assert self._server.stdin is not None
            self._server.stdin.close()
            self._server.wait(30)
        self._folder.cleanup()


def in_the_place_of(path: str, arguments: list[str]) -> int:
    """Run a process with this one's streams, folder, environment and signals; return its exit code."""
    process = Process(path, arguments, [0, 1, 2], Path.cwd(), dict(os.environ))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda sent, _: process.send_signal(sent))
    code = process.wait()
    return code if code >= 0 else 128 - code


server = Server()
run, start, ranks, command = server.run, server.start, server.ranks, server.command
atexit.register(server.stop)

if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(in_the_place_of(sys.argv[1], sys.argv[2:]))
    be(serve(sys.argv[1]))
