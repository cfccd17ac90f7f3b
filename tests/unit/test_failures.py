"""Reports of dead ranks: the cause comes first, and a zombie counts as gone."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from mffm.failures import Report, first_line, is_running, reports


def test_the_cause_comes_before_those_that_only_lost_others(tmp_path: Path):
    lost = Report("7.0", 0, 2, "n1", "lost the other ranks: Timed out", "last finished step 3", "mffm resume")
    died = replace(lost, rank=1, host="n2", what="died: KeyError: 'x'", tail_title="traceback:", tail=["a", "b"])
    lost.write(tmp_path)
    path, text = died.write(tmp_path)
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime + 5))
    assert reports(tmp_path, "7.0")[0] == path
    assert reports(tmp_path, "8.0") == []
    assert first_line(path) == "rank 1 of 2 on n2 died: KeyError: 'x'"
    assert "newest checkpoint none" in text
    assert text.endswith("traceback:\n  a\n  b\n")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step-00000040\n")
    assert "last finished step 3, newest checkpoint step 40" in died.text(tmp_path)


def test_a_zombie_does_not_run():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert is_running(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has asked
    assert not is_running(child.pid)
    child.communicate()
    assert not is_running(child.pid)
