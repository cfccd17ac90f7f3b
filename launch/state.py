"""The state of SLURM jobs, with or without accounting: scontrol, else sacct, else squeue; and a wait that ends."""

import re
import subprocess
import time
from collections.abc import Sequence

TERMINAL = frozenset(
    {
        "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
        "REVOKED", "TIMEOUT",
    }
)  # fmt: skip
UNKNOWN = "UNKNOWN"


def slurm_state(job_id: str) -> str:
    """Return SLURM's state of a job (``12``) or of a task of an array (``12_0``), UNKNOWN where nobody knows it.

    scontrol and squeue know a job until some minutes after its end (``MinJobAge``); sacct for ever, but only on
    clusters with accounting.
    """
    for ask in (_scontrol, _sacct, _squeue):
        state = ask(job_id)
        if state is not None:
            return state
    return UNKNOWN


def wait(job_ids: Sequence[str], timeout_seconds: float, poll_seconds: float = 1.0) -> dict[str, str]:
    """Wait until all jobs have ended, or the time is over; return the last states.

    A job that SLURM no longer knows is UNKNOWN and counts as ended: nothing more will ever be heard of it.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        states = {job_id: slurm_state(job_id) for job_id in job_ids}
        if all(s in TERMINAL or s == UNKNOWN for s in states.values()) or time.monotonic() > deadline:
            return states
        time.sleep(poll_seconds)


def node_address(name: str) -> str:
    """Return the address that SLURM has for a node, the name itself where it has none."""
    found = re.search(r"\bNodeAddr=(\S+)", _output(["scontrol", "-o", "show", "node", name]))
    return found[1] if found else name


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _scontrol(job_id: str) -> str | None:
    found = re.search(r"\bJobState=(\w+)", _output(["scontrol", "-o", "show", "job", job_id]))
    return found[1] if found else None


def _sacct(job_id: str) -> str | None:
    """``-X``: the job, not its steps. The state may read ``CANCELLED by 1000``."""
    words = _output(["sacct", "-X", "--noheader", "--parsable2", "-o", "State", "-j", job_id]).split()
    return words[0] if words else None


def _squeue(job_id: str) -> str | None:
    words = _output(["squeue", "-h", "-t", "all", "-o", "%T", "-j", job_id]).split()
    return words[0] if words else None
