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


def test_solids_hold_out_single_frames() -> None:
    """The split of every structure of configs/data/solids.yaml that is not drawn, by what its name says."""
    config = load(DataConfig, ROOT / "configs" / "data" / "solids.yaml")
    frames = {}
    for source in config.sources:
        assert source.group_key == source.frame_key
        assert isinstance(source.path, str)
        for frame in iread(ROOT / "configs" / "data" / source.path):
            frames[frame.info["frame_id"]] = frame.info
    split_of = {name: split for split, names in config.splits.holdout.items() for name in names}
    assert sum(len(names) for names in config.splits.holdout.values()) == len(split_of) == 19 + 26 + 24
    assert set(split_of) < set(frames)
    ends = {"MgO", "CaO", "AlP", "BP"}
    held = {n for n, info in frames.items() if info.get("holdout") or info.get("compound") in ends}
    assert held == {n for n, split in split_of.items() if split in ("uncovered", "ood")}
    ideal = {n for n, info in frames.items() if info.get("ideal")}
    assert ideal - {n for n, split in split_of.items() if split in ("ideal", "ood")} == {"alloy-rocksalt-NaKCl-0-0"}
    assert {n for n, split in split_of.items() if split == "ideal"} < ideal
