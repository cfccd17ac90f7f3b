"""``mffm benchmark``: a release at two fidelities side by side, unknown elements as failures, data that are missing."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mffm.cli import app
from mffm.errors import InputError


def run(*arguments: str) -> str:
    """Run the command in this process and return what it prints."""
    done = CliRunner().invoke(app, ["benchmark", *arguments])
    if isinstance(done.exception, Exception) and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.slow
def test_a_release_at_two_fidelities(tiny_release: Path, public_data: Path, tmp_path: Path):
    run(
        str(tiny_release), "--data", str(public_data), "--output", str(tmp_path), "--workers", "1", "--limit", "2",
        "--fidelity", "gfn2", "--fidelity", "pbe", "--task", "lambench/wiggle150-mini", "--task", "lambench/elastic",
        "--task", "lambench/wiggle150",
    )  # fmt: skip
    scores = {
        f: json.loads((tmp_path / f / "lambench" / "wiggle150-mini" / "score.json").read_text())
        for f in ("gfn2", "pbe")
    }
    assert scores["gfn2"]["metrics"]["MAE"] != scores["pbe"]["metrics"]["MAE"]
    # One of the two conformers is of benzylpenicillin: its sulfur is a failure by structure, not of the suite.
    assert [list(s["failed"]) for s in scores.values()] == [["bpn-1"], ["bpn-1"]]
    assert "element S is unknown to" in scores["pbe"]["failed"]["bpn-1"][1]
    identity = json.loads((tmp_path / "pbe" / "lambench" / "elastic" / "identity.json").read_text())
    assert (identity["fidelity"], len(identity["weights_sha256"])) == ("pbe", 64)
    page = (tmp_path / "report.md").read_text()
    assert "| metric | gfn2 | pbe | gain |" in page
    elastic = json.loads((tmp_path / "gfn2" / "lambench" / "elastic" / "score.json").read_text())
    assert elastic["metrics"]["success_rate"] == 0
    assert all("is unknown to" in why for _, why in elastic["failed"].values())
    assert "element " in page
    assert "is unknown to" in page
    assert "`lambench/Wiggle150.traj` | absent" in page


@pytest.mark.slow
def test_the_fidelity_of_a_release_must_be_said(tiny_release: Path, public_data: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"no fidelity given and there is no default.*it has: gfn2, pbe"):
        run(
            str(tiny_release), "--data", str(public_data), "--output", str(tmp_path), "--workers", "1",
            "--task", "lambench/wiggle150-mini",
        )  # fmt: skip


def test_data_are_checked(public_data: Path, tmp_path: Path):
    output = run("--check-data", str(public_data), "--task", "lambench/elastic", "--task", "lambench/wiggle150")
    assert "present" in output
    assert "absent" in output
    assert "10.1021" in output
    with pytest.raises(InputError, match="no such folder"):
        run("--check-data", str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "x"], "give the potential"),
        (["ase:ase.calculators.emt:EMT", "--suite", "matbench"], "no suite 'matbench'"),
        (["ase:ase.calculators.emt:EMT", "--task", "elastic"], "no task 'elastic'"),
        (["ase:ase.calculators.emt:EMT", "--data", "x", "--with", "mode"], "expected name=value"),
        (["ase:ase.calculators.emt:EMT", "--data", "x"], "x: no such folder"),
        (["ase:ase.calculators.emt:EMT", "--data", "x", "--fidelity-map", "elastic=pbe"], "no task 'elastic'"),
        (["ase:ase.calculators.emt:EMT", "--data", "x", "--fidelity", "pbe"], "'pbe' with ase:.*: a factory has none"),
        (
            ["ase:ase.calculators.emt:EMT", "--data", "x", "--fidelity-map", "lambench/elastic=pbe"],
            "a factory has none; give its own argument by --with",
        ),
    ],
)
def test_mistakes_are_told(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MFFM_DATA", raising=False)
    with pytest.raises(InputError, match=message):
        run(*arguments)
