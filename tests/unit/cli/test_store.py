"""The store commands from the command line: what they say, and bad input as one message with exit code 2."""

import pytest
from typer.testing import CliRunner

from mffm.cli import app
from mffm.data.store import Store
from mffm.errors import InputError


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(app, ["store", *map(str, arguments)])


def test_stats_subset_split_and_stage(molecule_store, tmp_path, run):
    store = Store(molecule_store)
    shown = run("stats", molecule_store)
    assert shown.exit_code == 0, shown.output
    assert f"{store.n_frames} structures, {int(store.n_atoms.sum()):,} atoms" in shown.output
    for part in ("gfn2", "forces", "neighbors of an atom within 4 Å", "structures with an element: "):
        assert part in shown.output
    ids = tmp_path / "ids.txt"
    ids.write_text("\n".join(store.frame_id(row) for row in (1, 5, 8)) + "\n\n")
    done = run("subset", molecule_store, tmp_path / "three", "--ids", ids)
    assert done.exit_code == 0, done.output
    assert f"3 of {store.n_frames} structures" in done.output
    assert Store(tmp_path / "three").frame_id(2) == store.frame_id(8)
    done = run("split", tmp_path / "three", tmp_path / "anew", "--fraction", "a=0.5", "--fraction", "b=0.5")
    assert done.exit_code == 0, done.output
    assert Store(tmp_path / "anew").split_names == ("a", "b")
    done = run("stage", tmp_path / "anew", tmp_path / "node" / "anew")
    assert done.exit_code == 0, done.output
    assert "copied and checked" in done.output
    assert "there already" in run("stage", tmp_path / "anew", tmp_path / "node" / "anew").output
    assert "all files whole" in run("verify", tmp_path / "node" / "anew").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("stats", "{absent}"), "no store there"),
        (("subset", "{store}", "{new}", "--fidelity", "hf"), "hf"),
        (("subset", "{store}", "{new}", "--ids", "{empty}"), "expected frame ids, one a line (.txt), or structures"),
        (("split", "{store}", "{new}", "--fraction", "train"), "--fraction train: expected a name, = and a value"),
        (("split", "{store}", "{new}", "--fraction", "train=0.5"), "sum to 1"),
        (("split", "{store}", "{new}", "--holdout", "ood=nothing"), "no structure has that group"),
        (("merge", "{new}", "{store}", "{store}"), "the same store twice"),
        (("stage", "{store}", "{full}"), "holds something that is no store"),
    ],
)
def test_bad_input_is_one_message(molecule_store, tmp_path, run, arguments, message):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    places = {name: tmp_path / name for name in ("absent", "new", "empty", "full")}
    done = run(*(a.format(store=molecule_store, **places) for a in arguments))
    assert isinstance(done.exception, InputError), done.output
    assert message in str(done.exception)
    assert not (tmp_path / "new").exists()
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
