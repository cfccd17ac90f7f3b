"""The state of a job, with and without accounting; a wait that always ends."""

import time
from collections.abc import Callable

import pytest

from launch.state import named, slurm_state, slurm_states, wait

FORGOTTEN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
AWAY = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"


def test_scontrol_then_sacct_then_squeue(program: Callable[[str, str], None]):
    for name in ("scontrol", "sacct", "squeue"):
        program(name, FORGOTTEN)
    assert slurm_state("12") == "UNKNOWN"
    program("squeue", "echo PENDING")
    assert slurm_state("12") == "PENDING"
    program("sacct", "echo 'CANCELLED by 1000'")
    assert slurm_state("12") == "CANCELLED"
    program("scontrol", 'echo "JobId=13 ArrayJobId=12 ArrayTaskId=0 JobState=RUNNING Reason=None"')
    assert slurm_state("12_0") == "RUNNING"


def test_many_jobs_are_asked_for_at_once(program: Callable[[str, str], None]):
    program("squeue", '[ "$8" = 12,13 ] && printf "12_0 COMPLETED\\n12_1 RUNNING\\n"')
    asked = ["12_0", "12_1", "13"]
    assert slurm_states(asked) == {"12_0": "COMPLETED", "12_1": "RUNNING", "13": "UNKNOWN"}
    program("squeue", FORGOTTEN)
    assert slurm_states(asked) == dict.fromkeys(asked, "UNKNOWN")
    program("squeue", AWAY)
    assert slurm_states(asked) == dict.fromkeys(asked, "NO_ANSWER")
    assert slurm_states([]) == {}


def test_accounting_that_is_switched_off_is_no_answer(program: Callable[[str, str], None]):
    program("scontrol", FORGOTTEN)
    program("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    program("squeue", AWAY)
    assert slurm_state("12") == "UNKNOWN"


@pytest.mark.parametrize("sacct", ["exit 0", "echo 'sacct: error: Connection refused' >&2; exit 1"])
def test_an_outage_is_no_word_on_the_job(program: Callable[[str, str], None], sacct: str):
    """Not even where accounting answers, and has no entry of the job yet."""
    for name in ("scontrol", "squeue"):
        program(name, AWAY)
    program("sacct", sacct)
    assert slurm_state("12") == "NO_ANSWER"
    assert named("trial") == "NO_ANSWER"
    program("squeue", "exit 0")
    assert slurm_state("12") == "UNKNOWN"
    assert named("trial") is None
    program("squeue", "echo 12; echo 13")
    assert named("trial") == "12"


def test_a_wait_ends_in_an_outage(program: Callable[[str, str], None]):
    for name in ("scontrol", "sacct", "squeue"):
        program(name, "exec sleep 20")
    started = time.monotonic()
    assert wait(["12", "13"], 1.0) == {"12": "NO_ANSWER", "13": "NO_ANSWER"}
    assert time.monotonic() - started < 5
    for name in ("scontrol", "sacct", "squeue"):
        program(name, AWAY)
    assert wait(["12"], 0.5, poll_seconds=0.1) == {"12": "NO_ANSWER"}
    assert time.monotonic() - started < 10


def test_a_wait_ends(program: Callable[[str, str], None]):
    program("scontrol", 'echo "JobState=RUNNING"')
    started = time.monotonic()
    assert wait(["12"], 0.5, poll_seconds=0.1) == {"12": "RUNNING"}
    assert time.monotonic() - started < 5
    program("scontrol", 'echo "JobState=NODE_FAIL"')
    assert wait(["12", "13"], 60) == {"12": "NODE_FAIL", "13": "NODE_FAIL"}
