"""The state of a job, with and without accounting; a wait that always ends."""

import time
from collections.abc import Callable

from launch.state import slurm_state, wait


def test_scontrol_then_sacct_then_squeue(program: Callable[[str, str], None]):
    for name in ("scontrol", "sacct", "squeue"):
        program(name, "exit 1")
    assert slurm_state("12") == "UNKNOWN"
    program("squeue", "echo PENDING")
    assert slurm_state("12") == "PENDING"
    program("sacct", "echo 'CANCELLED by 1000'")
    assert slurm_state("12") == "CANCELLED"
    program("scontrol", 'echo "JobId=13 ArrayJobId=12 ArrayTaskId=0 JobState=RUNNING Reason=None"')
    assert slurm_state("12_0") == "RUNNING"


def test_accounting_that_is_switched_off_is_no_answer(program: Callable[[str, str], None]):
    program("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    program("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    program("squeue", "exit 1")
    assert slurm_state("12") == "UNKNOWN"


def test_a_wait_ends(program: Callable[[str, str], None]):
    program("scontrol", 'echo "JobState=RUNNING"')
    started = time.monotonic()
    assert wait(["12"], 0.5, poll_seconds=0.1) == {"12": "RUNNING"}
    assert time.monotonic() - started < 5
    program("scontrol", 'echo "JobState=NODE_FAIL"')
    assert wait(["12", "13"], 60) == {"12": "NODE_FAIL", "13": "NODE_FAIL"}
