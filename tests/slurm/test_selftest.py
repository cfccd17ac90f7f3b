"""``mffm selftest`` on a real SLURM of two nodes, and on one whose nodes have no Python."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600), pytest.mark.usefixtures("slurm")]

ROOT = Path(__file__).parents[2]


def selftest(cluster: str, folder: Path) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
    """Return the process and the outcome of every check."""
    command = [sys.executable, "-m", "mffm", "selftest", "--cluster", cluster, "--folder", str(folder), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, cwd=ROOT)
    assert (folder / "selftest.json").is_file(), done.stdout + done.stderr
    results = json.loads((folder / "selftest.json").read_text())["results"]
    return done, {r["name"]: r["outcome"] for r in results}


def test_all_checks_pass_on_two_nodes(tmp_path: Path):
    done, outcomes = selftest("slurm_local", tmp_path / "selftest")
    assert set(outcomes.values()) == {"passed"}, done.stdout + done.stderr
    assert len(outcomes) >= 10
    assert done.returncode == 0
    ranks = json.loads((tmp_path / "selftest" / "selftest.json").read_text())["environment"]
    assert [rank["host"] for rank in ranks] == ["n1", "n2"]


def test_nodes_without_python_fail_with_the_reason(tmp_path: Path):
    content = yaml.safe_load((ROOT / "configs" / "clusters" / "slurm_local.yaml").read_text())
    path = tmp_path / "broken.yaml"
    path.write_text(yaml.safe_dump({**content, "python": "/no/such/python"}))
    done, outcomes = selftest(str(path), tmp_path / "selftest")
    assert done.returncode == 1
    assert set(outcomes.values()) == {"failed", "n/a"}
    assert outcomes["environment"] == "failed"
    assert "/no/such/python" in (tmp_path / "selftest" / "selftest.md").read_text()
    assert "Traceback" not in done.stderr
