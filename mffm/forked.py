"""Processes that begin with their imports done, on Linux: what ``python -m MODULE`` runs, without its start-up.

``import torch, deepspeed`` and an optimiser's first step, which takes torch._dynamo with it, cost some seconds of CPU.
A server imports them once, then forks a process for each request. It has the folder, environment, streams, signals and
command line (``ps``, ``/proc/<pid>/cmdline``) of an interpreter that is started, and random numbers of its own. The
server ends with the process that began it; what it has forked goes on.

Request: the descriptors of stdin, stdout and stderr, and a line of JSON. Answers: a line with the process id, a line
with its exit code and CPU time.
"""

import atexit
import ctypes
import gc
import json
import os
import platform
import random
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from mffm.failures import is_running

# What a training imports in its course. What is not installed is left to the process that needs it.
PRELOADED = (
    "torch", "mffm.training.loop", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor",
    "matplotlib.pyplot", "matplotlib.backends.backend_agg", "vesin", "ase.io", "mffm.cli", "mffm.evaluate",
)  # fmt: skip
COMMAND_LINE_BYTES = 1 << 15
READY = b"ready\n"
GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
GPUS = ("/dev/nvidiactl", "/dev/kfd")  # after an import has looked at a GPU, what is forked cannot use it


def can_fork(command: Sequence[str]) -> bool:
    """Return whether a server can fork what a command runs: on Linux, without a GPU, no huge command line."""
    fits = sum(len(os.fsencode(word)) + 1 for word in command) <= COMMAND_LINE_BYTES
    return fits and platform.system() == "Linux" and not any(os.path.exists(path) for path in GPUS)


# The server


def main() -> None:
    """Be the server of the socket in ``sys.argv[1]``, and in a process that it has forked, that process."""
    _be(_serve(sys.argv[1]))


def _serve(path: str) -> list[str]:
    """Answer requests; return only in a process that was asked for, with its arguments."""
    _show_command_line(["mffm.forked"])
    # What is sent to the whole group, as Ctrl-C is, is for the others; to a child, it waits until that is itself.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
    for module in PRELOADED:
        with suppress(ModuleNotFoundError):
            import_module(module)
    # OpenBLAS, which has begun its threads where it may have several, ends them before a fork by itself.
    assert threading.active_count() == 1, f"threads that a fork would lose: {threading.enumerate()}"
    gc.collect()
    gc.freeze()  # else a collection in a process copies the pages of all that was imported
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    at_child = signal.signal(signal.SIGCHLD, lambda *_: None)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    os.write(1, READY)
    with open(os.devnull, "w") as nothing:  # whoever reads the controller's output must not wait for this process
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    children: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([listener, sys.stdin, woken], [], [])
        if sys.stdin in ready:  # the controller is gone
            shutil.rmtree(os.path.dirname(path))
            os._exit(0)
        if woken in ready:
            os.read(woken, 4096)
        _tell_ends(children)
        if listener not in ready:
            continue
        connection, _ = listener.accept()
        descriptors: list[int] = []
        try:
            request, descriptors = _received(connection)
            child = os.fork()
        except OSError:  # whoever asked is gone, or there is no room for a process: the connection's end tells it
            for open_file in (connection.detach(), *descriptors):
                os.close(open_file)
            continue
        if not child:
            signal.set_wakeup_fd(-1)
            os.close(woken)
            os.close(wake)
            for other in (listener, connection, *children.values()):
                other.close()
            signal.signal(signal.SIGCHLD, at_child)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            _become(request, descriptors)
            return list(request["arguments"])
        for descriptor in descriptors:
            os.close(descriptor)
        children[child] = connection
        _tell(connection, f"{child}\n")


def _received(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Return a request.

    Raises:
        ConnectionError: whoever asks was gone before it had said all.
    """
    text, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while not text.endswith(b"\n"):
        more = connection.recv(1 << 20)
        if not more:
            for descriptor in descriptors:
                os.close(descriptor)
            raise ConnectionError
        text += more
    return json.loads(text), descriptors


def _tell_ends(children: dict[int, socket.socket]) -> None:
    for child in list(children):
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            with children.pop(child) as connection:
                seconds = usage.ru_utime + usage.ru_stime
                _tell(connection, f"{os.waitstatus_to_exitcode(status)} {seconds:.6f}\n")


def _tell(connection: socket.socket, line: str) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):  # whoever asked is gone
        connection.sendall(line.encode())


def _become(request: Mapping[str, Any], descriptors: Sequence[int]) -> None:
    """Make this process the one that was asked for."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    _show_command_line([sys.executable, *request["arguments"]])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    added = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    sys.path[1:1] = added
    random.seed()
    import_module("numpy").random.seed()
    import_module("torch").default_generator.seed()


def _show_command_line(words: Sequence[str]) -> None:
    """Write a command line over this process's own, which the server's last argument has made long enough."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin, end = int(fields[45]), int(fields[46])  # arg_start and arg_end of proc(5), after pid and name
    text = b"".join(os.fsencode(word) + b"\0" for word in words)
    assert len(text) <= end - begin, f"a command line of {len(text)} bytes for {end - begin}"
    ctypes.memmove(begin, text.ljust(end - begin, b"\0"), end - begin)


def _be(arguments: list[str]) -> None:
    """Run what an interpreter that is started with these arguments would run: ``-m``, ``-c`` or a script."""
    kind, rest = arguments[0], arguments[1:]
    if kind == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        exec(compile(rest[0], "<string>", "exec"), module.__dict__)
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(arguments[0])
        runpy.run_path(kind, run_name="__main__")


# Who asks


class Process:
    """A process that was forked, with what is needed of ``subprocess.Popen``.

    Attributes:
        returncode: None while it runs; -9, too, where the server was gone before it ended.
        cpu_seconds: CPU time of it and of what it waited for, without the server's imports; None while it runs and
            where the server was gone.
    """

    def __init__(
        self, path: str, arguments: Sequence[str], streams: Sequence[int], folder: Path, environment: Mapping[str, str]
    ):
        self.returncode: int | None = None
        self.cpu_seconds: float | None = None
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(path)
        request = {"arguments": list(arguments), "folder": str(folder), "environment": dict(environment)}
        socket.send_fds(self._connection, [b" "], streams)  # JSON may begin with it
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        self._told = b""
        words = self._line(None)
        if words is None:
            raise ConnectionError("the process that forks is gone")
        self.pid = int(words[0])

    def _line(self, seconds: float | None) -> list[str] | None:
        """Return the words of an answer; None where the server is gone.

        Raises:
            TimeoutError: there is none yet.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while b"\n" not in self._told:
            left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1e3
            ready = select.poll()  # not select, which refuses descriptors above 1024
            ready.register(self._connection, select.POLLIN)
            if not ready.poll(left):
                raise TimeoutError
            more = self._connection.recv(100)
            if not more:
                return None
            self._told += more
        line, _, self._told = self._told.partition(b"\n")
        return line.decode().split()

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code.

        Raises:
            subprocess.TimeoutExpired: it runs still.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            try:
                words = self._line(timeout)
            except TimeoutError:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0) from None
            if words is not None:
                self.returncode, self.cpu_seconds = int(words[0]), float(words[1])
            elif not is_running(self.pid):
                self.returncode = -signal.SIGKILL
            elif deadline is not None and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            else:
                time.sleep(0.02)
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

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)


class Server:
    """The process that forks the others. It begins at the first request, anew where it was killed.

    Args:
        environment: variables of the server beside this process's own: imports read some, as OMP_NUM_THREADS.
        folder: where it begins; this process's where not given.
    """

    def __init__(self, environment: Mapping[str, str] | None = None, folder: Path | None = None):
        self._environment, self._cwd = dict(environment or {}), folder
        self._server: subprocess.Popen[bytes] | None = None
        self.path = ""
        atexit.register(self.stop)

    def begin(self) -> None:
        """Begin, unless it has.

        Raises:
            ConnectionError: it came to its end; why is on stderr.
        """
        if self._server is not None and self._server.poll() is None:
            return
        self.stop()
        self.path = str(Path(tempfile.mkdtemp(prefix="mffm-forked-")) / "socket")
        command = [sys.executable, "-c", "from mffm.forked import main; main()", self.path, "." * COMMAND_LINE_BYTES]
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=self._cwd,
            env={**os.environ, **self._environment},
        )  # fmt: skip
        assert self._server.stdout is not None
        is_ready = False
        try:
            with self._server.stdout as told:
                is_ready = READY in told
        finally:
            if not is_ready:
                self.stop()
        if not is_ready:
            raise ConnectionError("the process that forks came to its end as it began")

    def start(
        self, arguments: Sequence[str], streams: Sequence[int], folder: Path, environment: Mapping[str, str]
    ) -> Process:
        """Start a process; ``streams`` are the descriptors of its stdin, stdout and stderr.

        Raises:
            ConnectionError: the server came to its end.
        """
        self.begin()
        return Process(self.path, arguments, streams, folder, environment)

    def stop(self) -> None:
        """End the server; what it has forked goes on."""
        if self._server is not None:
            assert self._server.stdin is not None
            self._server.kill()
            self._server.wait()
            self._server.stdin.close()
            self._server = None
            shutil.rmtree(os.path.dirname(self.path), ignore_errors=True)
