"""Which checkpoint a resume takes: the newest whole one, whatever happened to the others."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mffm.errors import InputError
from mffm.training.checkpoint import newest_whole


def flip_step(path: Path) -> None:
    text = path.read_text()
    assert '"step": 6' in text
    path.write_text(text.replace('"step": 6', '"step": 7', 1))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "not UTF-8": lambda p: p.write_bytes(b"\xff\xfe" + p.read_bytes()),
    "a list": lambda p: p.write_text("[1, 2]"),
    "cut off": lambda p: p.write_text(p.read_text()[:100]),
    "no digests": lambda p: p.write_text(p.read_text().replace('"sha256"', '"sha257"')),
    "another step": flip_step,
    "gone": lambda p: p.unlink(),
}


@pytest.fixture
def folder(tiny_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_run / "checkpoints", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_passed_over(folder: Path, damage: str) -> None:
    DAMAGE[damage](folder / "step-00000006" / "state.json")
    found = newest_whole(folder)
    assert found is not None
    path, state, warnings = found
    assert (path.name, state.step, len(warnings)) == ("step-00000003", 3, 1)
    assert "step-00000006" in warnings[0]


def test_a_garbled_latest_does_not_matter_but_a_missing_checkpoint_does(folder: Path) -> None:
    (folder / "latest").write_bytes(b"\xff\xfe\x00")
    assert newest_whole(folder)[0].name == "step-00000006"
    (folder / "latest").write_text("step-00000006\n")
    for step in folder.glob("step-*"):
        shutil.rmtree(step)
    with pytest.raises(InputError, match="latest names 'step-00000006', which is not there"):
        newest_whole(folder)
    (folder / "latest").unlink()
    assert newest_whole(folder) is None
