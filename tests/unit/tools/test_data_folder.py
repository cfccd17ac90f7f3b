"""data/: whole, small, counted right, and its README's commands run."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DATA = ROOT / "data"
README = (DATA / "README.md").read_text()


def n_frames(path: Path) -> int:
    return sum("Properties=" in line for line in path.read_text().splitlines())


def test_sums() -> None:
    sums = dict(reversed(line.split()) for line in (DATA / "SHA256SUMS").read_text().splitlines())
    assert set(sums) == {path.name for path in DATA.glob("*.extxyz")}
    for name, digest in sums.items():
        assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == digest, name


def test_sizes() -> None:
    sizes = {path.name: path.stat().st_size for path in DATA.iterdir()}
    assert max(sizes.values()) < 5_000_000
    del sizes["shipped.safetensors"]
    assert sum(sizes.values()) < 10_000_000


def test_counts_in_the_readme() -> None:
    rows = dict(re.findall(r"^\| `(\w+\.extxyz)` \| (\d+)", README, re.MULTILINE))
    assert rows == {path.name: str(n_frames(path)) for path in DATA.glob("*.extxyz")}


def test_frame_ids_are_unique_over_all_files() -> None:
    names = [n for path in DATA.glob("*.extxyz") for n in re.findall(r"frame_id=(\S+)", path.read_text())]
    assert len(names) == len(set(names)) == sum(n_frames(path) for path in DATA.glob("*.extxyz"))


def commands(text: str) -> list[str]:
    """Return the commands of the ``console`` blocks that are marked for testing."""
    blocks = re.findall(r"<!-- test -->\n+```console\n(.*?)```", text, re.DOTALL)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ ")]


@pytest.mark.slow
@pytest.mark.usefixtures("label_codes")
def test_the_extend_commands(tmp_path: Path) -> None:
    for name in ("data", "tools", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "configs").unlink()
    (tmp_path / "configs" / "data").mkdir(parents=True)
    (tmp_path / "configs" / "data" / "molecules.yaml").write_text((ROOT / "configs/data/molecules.yaml").read_text())
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = commands(README)
    assert len(found) == 3
    for command in found:
        done = subprocess.run(
            command,
            shell=True,
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            timeout=250,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert n_frames(tmp_path / "more.extxyz") == 4
    from mffm.data.store import Store

    assert Store(tmp_path / "stores" / "more").n_frames == n_frames(DATA / "molecules.extxyz") + 4
