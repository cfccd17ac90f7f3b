"""Reports of ranks that died: ``RUN/failures/<start>-rank-<r>.txt``, one format whoever writes them. Needs no torch.

mffm reports its own exceptions; the launcher's task, or else a surviving rank, reports for a process that is gone.
A start is ``<job id>.<requeues>`` where launch.submit started the ranks, else the time of the start.
"""

import os
import platform
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

START_VARIABLE = "MFFM_START"  # the launcher names the start through it
LOST = "lost the other ranks"  # in the first line of a report that names no cause


@dataclass(frozen=True)
class Report:
    """What is known of the end of a rank.

    Attributes:
        host: name of its machine.
        what: the rest of the first line, e.g. ``died: exit code 3``.
        progress: e.g. ``last finished step 12``.
        go_on: command that goes on with the run.
        hint: further lines, or empty.
        tail_title, tail: traceback, or the last lines of a log.
    """

    start: str
    rank: int
    n_ranks: int
    host: str
    what: str
    progress: str
    go_on: str
    hint: str = ""
    tail_title: str = ""
    tail: Sequence[str] = ()

    def text(self, run: Path) -> str:
        """Return the report as it is written."""
        lines = [
            f"rank {self.rank} of {self.n_ranks} on {self.host} {self.what}",
            *self.hint.splitlines(),
            f"start {self.start}, {time.strftime('%Y-%m-%dT%H:%M:%S%z')}; {self.progress}, "
            f"newest checkpoint {newest_checkpoint(run) or 'none'}",
            f"run {run}",
            f"go on with: {self.go_on}",
        ]
        if self.tail:
            lines += [self.tail_title, *(f"  {line}" for line in self.tail)]
        return "\n".join(lines) + "\n"

    def write(self, run: Path) -> tuple[Path, str]:
        """Write the report aside and rename it, and return path and text: a reader never sees half of it."""
        path, text = path_of(run, self.start, self.rank), self.text(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
        aside.write_text(text)
        os.replace(aside, path)
        return path, text


def path_of(run: Path, start: str, rank: int) -> Path:
    """Return where the report of a rank belongs."""
    return run / "failures" / f"{start}-rank-{rank}.txt"


def reports(run: Path, start: str) -> list[Path]:
    """Return the reports of a start: first those that name a cause, and of these the oldest first."""
    return sorted((run / "failures").glob(f"{start}-rank-*.txt"), key=lambda p: (not is_cause(p), p.stat().st_mtime))


def is_cause(path: Path) -> bool:
    """Return whether a report says why its rank died, and not only that others were lost."""
    return LOST not in first_line(path)


def first_line(path: Path) -> str:
    """Return the first line of a report: which rank, where, of what."""
    with path.open(errors="replace") as file:
        return file.readline().rstrip("\n")


def newest_checkpoint(run: Path) -> str | None:
    """Return ``step 200`` for the checkpoint that ``latest`` names, None where there is none."""
    try:
        name = (run / "checkpoints" / "latest").read_text().strip()
    except OSError:
        return None
    digits = name.removeprefix("step-")
    return f"step {int(digits)}" if digits.isdigit() else None


def node_name() -> str:
    """Return the name by which SLURM, or else the network, knows this machine."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def ending(code: int) -> str:
    """Return an exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "a signal"
    return f"killed by {name} ({-code})"


def is_running(pid: int) -> bool:
    """Return whether a process of this machine runs; a zombie does not. True where there is no /proc to ask."""
    if platform.system() != "Linux":
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
