"""Every data YAML in configs/data loads, and its sources have what it names."""

from pathlib import Path

import pytest
from ase.io import iread

from mffm.config.base import load
from mffm.config.data import DataConfig

ROOT = Path(__file__).parents[3]
YAMLS = sorted((ROOT / "configs" / "data").glob("*.yaml"))


def test_there_are_some() -> None:
    assert {path.stem for path in YAMLS} >= {"molecules", "crystals", "alloys"}


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_loads(path: Path) -> None:
    config = load(DataConfig, path)
    assert config.sources
    assert all(source.licence for source in config.sources)


@pytest.mark.parametrize("name", ["molecules", "crystals", "alloys"])
def test_keys_and_holdout_are_in_the_file(name: str) -> None:
    config = load(DataConfig, ROOT / "configs" / "data" / f"{name}.yaml")
    (source,) = config.sources
    assert isinstance(source.path, str)
    frames = list(iread(ROOT / "configs" / "data" / source.path))
    assert source.frame_key is not None
    assert source.group_key is not None
    assert len({frame.info[source.frame_key] for frame in frames}) == len(frames)
    for fidelity, properties in source.labels.items():
        for prop in properties:
            key = source.label(fidelity, prop).key
            place = "arrays" if prop == "forces" else "info"
            assert all(key in getattr(frame, place) for frame in frames)
    groups = {frame.info[source.group_key] for frame in frames}
    held_out = set(config.splits.holdout["ood"])
    assert held_out < groups
    marked = {frame.info[source.group_key] for frame in frames if frame.info.get("holdout")}
    assert not marked or marked == held_out
    assert config.cutoffs == [5.0]
