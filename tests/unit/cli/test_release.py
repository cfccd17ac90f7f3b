"""``mffm release``: options that could not be followed are refused, not dropped."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from mffm.cli import app
from mffm.errors import InputError


def release(*arguments: object) -> None:
    CliRunner().invoke(app, ["release", *map(str, arguments)], catch_exceptions=False)


@pytest.mark.parametrize(
    "options", [("--fidelity", "pbe"), ("--uncertainty",), ("--store", "stores/x"), ("--weights", "raw")]
)
def test_a_push_without_a_target_takes_no_option_that_changes_the_release(options: tuple[str, ...]):
    with pytest.raises(InputError, match=r"--push me/x of my-release as it is: .* name a TARGET to write first"):
        release("my-release", "--push", "me/x", "--public", *options)
    with pytest.raises(InputError, match="--pull fetches a release as it is"):
        release("me/x", "my-copy", "--pull", *options)


def test_a_pull_makes_no_folder_of_a_files_name(tmp_path: Path):
    with pytest.raises(InputError, match=r"x\.safetensors: a pull writes a folder"):
        release("me/x", tmp_path / "x.safetensors", "--pull")
    assert list(tmp_path.iterdir()) == []
