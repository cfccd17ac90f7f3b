"""A real SLURM on this host for the tests of this folder, shared by the workers of pytest-xdist."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "local_slurm.sh"
FOLDER = Path(tempfile.gettempdir()) / "mffm-slurm-test"  # one place: a munge socket's path must be short
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")


def why_not() -> str | None:
    """Return why there can be no SLURM here."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install -y --no-install-recommends slurm-wlm munge"
    return None if os.geteuid() == 0 else "the daemons of SLURM must be started by root"


@contextmanager
def _users() -> Iterator[dict[str, int]]:
    """The processes that use the SLURM, under a lock."""
    path = FOLDER.with_suffix(".users")
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        users = {pid: 1 for pid in file.read().split() if Path("/proc", pid).exists()}
        yield users
        file.seek(0)
        file.truncate()
        file.write(" ".join(users))
        file.flush()
        if not users:
            path.unlink()


def _script(command: str) -> None:
    # Output to a file: the daemons inherit it, and would keep a pipe open.
    with tempfile.TemporaryFile("w+") as output:
        environment = {**os.environ, "SLURM_TEST_DIR": str(FOLDER)}
        done = subprocess.run(
            [str(SCRIPT), command], env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL, timeout=60
        )
        output.seek(0)
        assert done.returncode == 0, output.read()


@pytest.fixture(scope="session")
def slurm() -> Iterator[None]:
    """A running SLURM of two virtual nodes; the environment is set for its clients."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    me = str(os.getpid())
    with _users() as users:
        _script("start")
        users[me] = 1
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(FOLDER / "slurm.conf")
    yield
    if before is None:
        del os.environ["SLURM_CONF"]
    else:
        os.environ["SLURM_CONF"] = before
    with _users() as users:
        users.pop(me, None)
        if not users:
            _script("stop")
