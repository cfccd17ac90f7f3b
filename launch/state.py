"""The state of SLURM jobs, with or without accounting: scontrol, else sacct, else squeue; and a wait that ends."""

import math
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
UNKNOWN = "UNKNOWN"  # the controller answered that it does not know the job: it is over
NO_ANSWER = "NO_ANSWER"  # the controller is away, or cannot be reached: nothing is known, ask again later
NO_SUCH_JOB = "Invalid job id specified"
ANSWER_SECONDS = 30.0  # of one program; SLURM's own MessageTimeout is 10 s by default


def slurm_state(job_id: str, timeout_seconds: float = math.inf) -> str:
    """Return SLURM's state of a job (``12``) or of a task of an array (``12_0``), else UNKNOWN or NO_ANSWER.

    scontrol and squeue know a job until some minutes after its end (``MinJobAge``); sacct for ever, but only on
    clusters with accounting. UNKNOWN is the word of scontrol or squeue: that sacct has no entry says nothing of a job
    that was submitted just now.
    """
    deadline = time.monotonic() + timeout_seconds
    denied = False
    for ask in (_SCONTROL, _SACCT, _SQUEUE):
        state = _ask(ask, job_id, deadline - time.monotonic())
        if state not in (UNKNOWN, NO_ANSWER):
            return state
        denied |= state == UNKNOWN and ask is not _SACCT
    return UNKNOWN if denied else NO_ANSWER


def slurm_states(job_ids: Sequence[str]) -> dict[str, str]:
    """Return SLURM's states of many jobs and tasks of arrays, asked with one question.

    One that squeue does not list is UNKNOWN.
    """
    if not job_ids:
        return {}
    jobs = ",".join(dict.fromkeys(job_id.partition("_")[0] for job_id in job_ids))
    done = _run(["squeue", "-h", "-r", "-t", "all", "-o", "%i %T", "-j", jobs], ANSWER_SECONDS)
    if done is None or (done.returncode != 0 and NO_SUCH_JOB not in done.stderr):
        return dict.fromkeys(job_ids, NO_ANSWER)
    found = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    return {job_id: found.get(job_id, UNKNOWN) for job_id in job_ids}


def named(name: str) -> str | None:
    """Return the job of a name that is queued or runs, None where SLURM has none, NO_ANSWER where it does not say."""
    done = _run(["squeue", "-h", "-o", "%i", "--name", name], ANSWER_SECONDS)
    if done is None or done.returncode != 0:
        return NO_ANSWER
    return next(iter(done.stdout.split()), None)


def wait(job_ids: Sequence[str], timeout_seconds: float, poll_seconds: float = 1.0) -> dict[str, str]:
    """Wait until all jobs have ended, or the time is over; return the last states.

    A job that SLURM no longer knows is UNKNOWN and counts as ended: nothing more will ever be heard of it. One of
    which nothing was heard is NO_ANSWER, and is asked for again.
    """
    deadline = time.monotonic() + timeout_seconds
    states = dict.fromkeys(job_ids, NO_ANSWER)
    while True:
        for job_id in states:
            state = slurm_state(job_id, deadline - time.monotonic())
            if state != NO_ANSWER or time.monotonic() < deadline:  # else the question was cut short
                states[job_id] = state
        left = deadline - time.monotonic()
        if all(s in TERMINAL or s == UNKNOWN for s in states.values()) or left <= 0:
            return states
        time.sleep(min(poll_seconds, left))


def node_address(name: str) -> str:
    """Return the address that SLURM has for a node, the name itself where it has none."""
    done = _run(["scontrol", "-o", "show", "node", name], ANSWER_SECONDS)
    found = re.search(r"\bNodeAddr=(\S+)", done.stdout) if done is not None and done.returncode == 0 else None
    return found[1] if found else name


_SCONTROL = ("scontrol", "-o", "show", "job")
_SACCT = ("sacct", "-X", "--noheader", "--parsable2", "-o", "State", "-j")  # -X: the job, not its steps
_SQUEUE = ("squeue", "-h", "-t", "all", "-o", "%T", "-j")


def _run(command: Sequence[str], seconds: float) -> "subprocess.CompletedProcess[str] | None":
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired):
        return None


def _ask(program: Sequence[str], job_id: str, seconds: float) -> str:
    """Return what one program says; sacct's state may read ``CANCELLED by 1000``."""
    done = _run([*program, job_id], min(seconds, ANSWER_SECONDS)) if seconds > 0 else None
    if done is None:
        return NO_ANSWER
    if done.returncode != 0:
        return UNKNOWN if NO_SUCH_JOB in done.stderr else NO_ANSWER
    if program is _SCONTROL:
        found = re.search(r"\bJobState=(\w+)", done.stdout)
        return found[1] if found else NO_ANSWER
    return next(iter(done.stdout.split()), UNKNOWN)
