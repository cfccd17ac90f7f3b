"""Stand-ins: programs of SLURM as shell scripts, and an ``mffm`` that only sleeps, dies or saves."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import mffm

STAND_IN = """
import os, pathlib, signal, sys, time
rank, folder = int(os.environ["RANK"]), pathlib.Path(sys.argv[2])
folder = folder if sys.argv[1] == "resume" else folder.parent
print("stand-in", sys.argv[1], "rank", rank, "of", os.environ["WORLD_SIZE"], os.environ["MASTER_ADDR"], flush=True)
(folder / f"{sys.argv[1]}-{rank}").touch()
while len(list(folder.glob(f"{sys.argv[1]}-*"))) < int(os.environ["WORLD_SIZE"]): time.sleep(0.05)  # as a rendezvous
if sys.argv[1] == "resume":
    sys.exit(0)
{body}
"""


FORGOTTEN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
AWAY = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Return a function that puts a shell script of a name in front of PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def make(name: str, body: str) -> None:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    return make


@pytest.fixture
def slurm_programs(program: Callable[[str, str], None], tmp_path: Path) -> Path:
    """A SLURM that numbers jobs from 8, keeps the scripts it was given and forgets every job; return its folder."""
    folder = tmp_path / "jobs"
    folder.mkdir()
    program("sbatch", f'n=$(ls {folder} | wc -l); n=$((n + 8)); cp "$1" {folder}/$n.sh; echo Submitted batch job $n')
    program("srun", "exit 1")
    program("scontrol", FORGOTTEN)
    program("sacct", "exit 1")
    program("squeue", f'case "$*" in *--name*) exit 0;; esac; {FORGOTTEN}')
    return folder


@pytest.fixture
def slurm_away(program: Callable[[str, str], None]) -> Callable[[], None]:
    """Return a function that takes SLURM's controller and its accounting away."""

    def away() -> None:
        for name in ("scontrol", "sacct", "squeue", "sbatch"):
            program(name, AWAY)

    return away


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that replaces ``python -m mffm`` in the working directory by a script."""

    def make(body: str) -> None:
        package = tmp_path / "work" / "mffm"
        package.mkdir(parents=True)
        # What the launcher imports of mffm is the real one's.
        (package / "__init__.py").write_text(f"__path__.append({str(Path(mffm.__file__).parent)!r})\n")
        (package / "__main__.py").write_text(STAND_IN.replace("{body}", body))
        monkeypatch.chdir(tmp_path / "work")

    return make
