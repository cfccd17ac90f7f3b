"""The kill test with few kills: every phase of a save once, and one at a random moment."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_training_survives_a_kill_in_every_phase_of_a_save(tmp_path: Path):
    command = [sys.executable, str(ROOT / "tools" / "kill_test.py"), "--kills", "6", "--random", "1", "--steps", "120"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=560)
    assert done.returncode == 0, done.stdout + done.stderr
    kills = {
        name: (int(n), int(lost))
        for name, n, lost in re.findall(r"^\| (.*?) \| (\d+) \|.*\| (\d+) \|$", done.stdout, re.M)
    }
    phases = {name: found for name, found in kills.items() if name.startswith("save: ")}
    assert [n for n, _ in phases.values()] == [1] * 5, done.stdout
    assert [lost for _, lost in phases.values()] == [10, 10, 10, 10, 0], done.stdout
    assert "bit for bit" in done.stdout
