"""Every command block of the guide that is marked `<!-- test -->` runs, in order, in a copy of the project."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).parents[2]
MARKED = re.compile(r"<!-- test -->\n```console\n(.*?)```", re.DOTALL)
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "data" / "README.md"])
WITH_COMMANDS = [p for p in PAGES if MARKED.search(p.read_text())]


@pytest.mark.docs
@pytest.mark.timeout(1200)  # the study of a tutorial has more trainings than a page of the guide
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda p: p.name)
def test_marked_commands_run(page: Path, tmp_path: Path):
    if "$MFFM_DATA" in page.read_text() and "MFFM_DATA" not in os.environ:
        pytest.skip(f"{page.name} takes public data from $MFFM_DATA, which is not set")
    for name in ("configs", "data", "tools", "docs/studies"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / ".bin").mkdir()
    forked.command(tmp_path / ".bin")
    path = f"{tmp_path / '.bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**forked.without_ranks(), "PATH": path, "OMP_NUM_THREADS": "1"}
    for block in MARKED.findall(page.read_text()):
        for line in block.splitlines():
            if not line.startswith("$ ") or ("${MFFM_DATA}" in line and "MFFM_DATA" not in os.environ):
                continue
            done = subprocess.run(
                ["bash", "-c", line[2:]], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
            )
            assert done.returncode == 0, f"{page.name}: {line}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"


def test_pages_have_commands_that_are_run():
    assert {"data.md", "train.md", "how_many_labels.md"} <= {p.name for p in WITH_COMMANDS}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_inside_the_project_exist(page: Path):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_mffm_commands_of_every_block_exist(page: Path):
    from typer.main import get_command

    from mffm.cli import app

    known = set(get_command(app).commands)
    for block in re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL):
        for command in re.findall(r"^\$ mffm (\S+)", block, re.MULTILINE):
            assert command in known, f"{page}: mffm {command}"
