"""What is forked from a server is like what an interpreter of its own runs."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest

from mffm.executor import process_of
from mffm.failures import is_running
from mffm.forked import COMMAND_LINE_BYTES, Server, can_fork

# All that a process has from whoever starts it, and what torch makes of it.
STATE = """
import os, signal, sys
descriptors = sorted(os.listdir("/proc/self/fd"))
import torch
print(sys.argv, os.getcwd(), sys.path[0], descriptors, __name__)
print({k: v for k, v in sorted(os.environ.items()) if k != "_"})
print(signal.pthread_sigmask(signal.SIG_BLOCK, []), [signal.getsignal(n) for n in (1, 2, 10, 12, 15, 17)])
print(open("/proc/self/cmdline").read().rstrip("\\0").split("\\0"))
print(torch.get_num_threads(), torch.cuda.is_initialized())
print(sys.stdin.read(), file=sys.stderr)
sys.exit(3)
"""


def test_it_has_the_state_of_an_interpreter_of_its_own(tmp_path: Path):
    options = {"cwd": tmp_path, "environment": {**forked.without_ranks(), "X": "a value"}}
    own = forked.run(["-c", STATE, "an argument", "ä"], **options)
    command = [sys.executable, "-c", STATE, "an argument", "ä"]
    with open(os.devnull) as nothing:
        fresh = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=options["environment"], stdin=nothing
        )
    assert own.stdout.splitlines() == fresh.stdout.splitlines()
    assert "an argument" in own.stdout
    assert "a value" in own.stdout
    assert (own.returncode, own.stderr) == (3, "\n")


def test_random_numbers_are_its_own():
    code = "import random, numpy as np, torch; print(random.random(), np.random.rand(), torch.rand(1).item())"
    first, second = (forked.run(["-c", code]).stdout.split() for _ in range(2))
    assert len({*first, *second}) == 6


def test_the_server_has_no_thread_that_a_fork_would_lose():
    forked.run(["-c", "pass"])
    server = forked._forked._server._server
    assert server is not None
    assert len(os.listdir(f"/proc/{server.pid}/task")) == 1


def test_cpu_time_is_of_the_process_and_of_what_it_waited_for():
    busy = "import time\nwhile time.process_time() < 0.5: pass"
    code = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {busy!r}]); {busy.replace('import time', '')}"
    )
    with open(os.devnull, "w") as nothing:
        process = forked.start(["-c", f"import time\n{code}"], nothing, nothing)
        assert process.wait(60) == 0
        idle = forked.start(["-c", "pass"], nothing, nothing)
        assert idle.wait(60) == 0
    assert process.cpu_seconds is not None
    assert idle.cpu_seconds is not None
    assert 1.0 <= process.cpu_seconds < 2.5
    assert idle.cpu_seconds < 1.0, "without the imports of the server"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_reach_it_and_it_is_found_by_its_arguments(number: int, tmp_path: Path):
    word = str(tmp_path / "run")
    with open(os.devnull, "w") as nothing:
        process = forked.start(["-c", "import time; time.sleep(60)", word], nothing, nothing)
        deadline = time.monotonic() + 20
        while process_of(word) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process_of(word) == process.pid
        process.send_signal(number)
        assert process.wait(20) == -number
    assert process_of(word) is None


def test_who_goes_away_while_asking_stops_nothing():
    forked.run(["-c", "pass"])
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(forked._forked._server.path)
        connection.sendall(b'{"arguments": ')
    assert forked.run(["-c", "raise SystemExit(4)"]).returncode == 4


def test_what_is_not_forked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    command = [sys.executable, "-m", "mffm"]
    monkeypatch.setattr("mffm.forked.GPUS", ())
    assert can_fork(command)
    assert not can_fork([*command, "x" * COMMAND_LINE_BYTES])
    monkeypatch.setattr("mffm.forked.GPUS", (str(tmp_path),))
    assert not can_fork(command)


# Of numpy's and of torch's pool, both begun after the fork.
THREADS = """
import numpy as np, torch
a = np.random.rand(600, 600)
assert torch.get_num_threads() == 2
for _ in range(3):
    assert np.allclose(a @ a, (torch.from_numpy(a) @ torch.from_numpy(a)).numpy())
    assert torch.randn(1 << 20).exp().sum() > 0
"""


@pytest.mark.slow
def test_a_server_that_is_killed_leaves_what_it_forked_and_begins_anew(tmp_path: Path):
    server = Server({"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}, folder=forked.ROOT)
    with open(os.devnull, "r+") as nothing:
        streams = [nothing.fileno()] * 3
        process = server.start(["-c", "import time; time.sleep(60)"], streams, tmp_path, os.environ)
        with (tmp_path / "errors").open("wb") as errors:
            pools = server.start(["-c", THREADS], [*streams[:2], errors.fileno()], tmp_path, os.environ)
            assert pools.wait() == 0, (tmp_path / "errors").read_text()
        assert server._server is not None
        server._server.kill()
        server._server.wait()
        assert process.poll() is None
        assert is_running(process.pid)
        process.terminate()
        assert process.wait() == -signal.SIGKILL, "nobody saw its end"
        assert process.cpu_seconds is None
        assert server.start(["-c", "raise SystemExit(4)"], streams, tmp_path, os.environ).wait() == 4
    folder = Path(server.path).parent
    assert folder.is_dir()
    server.stop()
    assert not folder.exists()
