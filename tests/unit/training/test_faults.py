"""What one rank reports: its own faults, not bad input that its user sees anyway, and not what another rank caused."""

from pathlib import Path

import pytest

from mffm import distributed
from mffm.distributed import Process, Ranks
from mffm.errors import InputError
from mffm.failures import START_VARIABLE, Report, node_name
from mffm.training.faults import Faults, is_lost_peer


def fail(faults: Faults, error: Exception) -> list[str]:
    """Let an error pass through the context twice, as through the loop's and the run's; return the reports."""
    with pytest.raises(type(error)), faults, faults:
        raise error
    folder = faults.run / "failures"
    return [path.read_text() for path in sorted(folder.iterdir())] if folder.exists() else []


def test_a_fault_is_reported_with_its_traceback(tmp_path: Path):
    faults = Faults(tmp_path, Ranks())
    faults.step = lambda: 12
    (report,) = fail(faults, KeyError("x"))
    assert report.startswith(f"rank 0 of 1 on {node_name()} died: KeyError: 'x'\n")
    assert "last finished step 12" in report
    assert "raise error" in report
    assert faults.said.endswith(report)


def test_bad_input_alone_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    faults = Faults(tmp_path, Ranks())
    assert fail(faults, InputError("bad value")) == []
    assert faults.said == "error: bad value\n"
    monkeypatch.setenv(START_VARIABLE, "7.1")  # nobody looks at the terminal of a submitted job
    (report,) = fail(Faults(tmp_path, Ranks()), InputError("bad value\nmore"))
    assert "died: bad value\nmore\nstart 7.1" in report
    assert "go on with: python -m launch.submit" in report


@pytest.mark.parametrize(
    "message",
    [
        "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711",
        "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 20000ms for recv operation to complete",
        "NCCL error in: ProcessGroupNCCL.cpp, remote process exited or there was a network error",
    ],
)
def test_a_survivor_points_to_the_cause(message: str, tmp_path: Path):
    faults = Faults(tmp_path, Ranks(0, 2, 0))
    cause, text = Report(faults.start, 1, 2, "n2", "died: KeyError: 'x'", "step 3", "mffm resume").write(tmp_path)
    assert fail(faults, RuntimeError(message)) == [text]
    assert faults.said.endswith(f"ends because of another: rank 1 of 2 on n2 died: KeyError: 'x'; report: {cause}\n")


def test_a_survivor_reports_for_a_process_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import subprocess
    import sys

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    monkeypatch.setattr(distributed, "_processes", [Process(node_name(), 1), Process(node_name(), gone.pid)])
    faults = Faults(tmp_path, Ranks(0, 2, 0))
    (report,) = fail(faults, RuntimeError("Connection closed by peer"))
    assert report.startswith(f"rank 1 of 2 on {node_name()} died: its process {gone.pid} is gone")
    assert "Reported by rank 0" in report


def test_ranks_that_noticed_nothing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mffm.training.faults.CAUSE_SECONDS", 0.2)
    monkeypatch.setattr(distributed, "_processes", [])
    faults = Faults(tmp_path, Ranks(0, 3, 0))
    Report(faults.start, 2, 3, "n2", "lost the other ranks: Timed out", "step 3", "mffm resume").write(tmp_path)
    report, _ = fail(faults, RuntimeError("Timed out waiting 20000ms"))
    assert report.startswith(f"rank 0 of 3 on {node_name()} lost the other ranks: Timed out waiting 20000ms\n")
    assert "Rank(s) 1 noticed nothing so far" in report
    assert [p.name for p in (tmp_path / "failures").iterdir() if p.name.startswith(".")] == []


def test_other_errors_are_the_ranks_own():
    assert not is_lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"))
    assert not is_lost_peer(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert not is_lost_peer(RuntimeError("CUDA error: the launch timed out and was terminated"))
    assert not is_lost_peer(RuntimeError("DataLoader timed out after 10 seconds"))
    assert is_lost_peer(RuntimeError("Timed out waiting 20000ms for recv operation to complete"))
    assert not is_lost_peer(InputError("Connection closed by peer"))
    assert not is_lost_peer(KeyError("timeout"))
