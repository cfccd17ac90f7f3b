"""The closed loop through a real SLURM: labels and trainings are jobs; an interrupted controller adopts them."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import active_loop
import forked
import pytest
import yaml

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600), pytest.mark.usefixtures("slurm")]

ROOT = Path(__file__).parents[2]


def command(config: Path, *more: str) -> list[str]:
    return ["-m", "mffm", "active", str(config), "--folder", str(config.parent / "run"), *more]


def names_of_jobs(begin: str) -> list[str]:
    asked = ["squeue", "--noheader", "--format=%j"]
    names = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    return [name for name in names if name.startswith(begin)]


def test_an_interrupted_loop_adopts_its_jobs(molecule_store: Path, tiny_release: Path, tmp_path: Path):
    here = active_loop.write(tmp_path / "here", molecule_store, tiny_release)
    assert forked.run(command(here)).returncode == 0
    there = active_loop.write(tmp_path / "there", molecule_store, tiny_release)
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"executor": "slurm", "time_minutes": 10}))
    asked = [sys.executable, *command(there, "--cluster", str(tmp_path / "cluster.yaml"))]
    try:
        for wanted in ("label-loop-", "loop-"):  # the first labels, the first training
            first = subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
            deadline = time.monotonic() + 200
            while not names_of_jobs(wanted):
                assert first.poll() is None, first.communicate()
                assert time.monotonic() < deadline, names_of_jobs("")
                time.sleep(0.2)
            first.send_signal(signal.SIGTERM)
            out, err = first.communicate(timeout=60)
            assert first.returncode == 75, out + err
            assert "what was submitted goes on without it" in err
        refused = forked.run(command(there))
        assert refused.returncode == 2
        assert "of an earlier start with --cluster" in refused.stderr
        done = subprocess.run(asked, capture_output=True, text=True, cwd=ROOT, timeout=400)
    finally:
        for name in {*names_of_jobs("label-loop-"), *names_of_jobs("loop-")}:
            subprocess.run(["scancel", "--name", name], timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr
    assert active_loop.ends(there) == active_loop.ends(here)
