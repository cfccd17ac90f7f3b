"""Systems of DeePMD-kit: mixed types, no cell, arrays that do not fit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mffm.config.base import validate
from mffm.config.data import SourceSpec
from mffm.data.readers import RejectedFrame, read, reader_name
from mffm.errors import InputError


def spec() -> SourceSpec:
    return validate(SourceSpec, {"name": "a", "preset": "deepmd-npy", "path": "-", "fidelity": "pbe"}, "test")


def system(folder: Path, types: str = "0\n1\n1\n", kinds: str = "O\nH\n", **arrays: Any) -> Path:
    rng = np.random.default_rng(0)
    n = len(types.split())
    content = {
        "coord": rng.normal(size=(4, 3 * n)),
        "box": np.tile(9 * np.eye(3).ravel(), (4, 1)),
        "energy": -np.arange(4.0),
        "force": rng.normal(size=(4, 3 * n)).astype("f4"),
    } | arrays
    (folder / "set.000").mkdir(parents=True)
    (folder / "type.raw").write_text(types)
    (folder / "type_map.raw").write_text(kinds)
    for name, value in content.items():
        if value is not None:
            np.save(folder / "set.000" / f"{name}.npy", value)
    return folder / "type.raw"


def test_water(tmp_path: Path) -> None:
    path = system(tmp_path / "water")
    assert reader_name(path) == "deepmd"
    frames = list(read(path, spec()))
    assert [f.atomic_numbers.tolist() for f in frames] == [[8, 1, 1]] * 4
    assert [float(f.labels["pbe", "energy"]) for f in frames] == [0, -1, -2, -3]
    np.testing.assert_allclose(frames[2].labels["pbe", "forces"].ravel(), np.load(path.parent / "set.000/force.npy")[2])
    assert frames[0].group == "water"
    assert frames[0].pbc.all()


def test_without_a_cell(tmp_path: Path) -> None:
    path = system(tmp_path / "water", box=None)
    with pytest.raises(InputError, match=r"box.npy is missing.*nopbc"):
        list(read(path, spec()))
    (tmp_path / "water" / "nopbc").touch()
    assert not next(iter(read(path, spec()))).pbc.any()


def test_mixed_types_with_padding(tmp_path: Path) -> None:
    """``deepmd/npy/mixed``: type.raw is all 0, real_atom_types.npy says the elements, -1 pads."""
    types = np.array([[0, 1, 1], [0, 1, -1], [1, 1, -1], [0, 0, 5]])
    path = system(tmp_path / "mixed", "0\n0\n0\n", real_atom_types=types)
    frames = list(read(path, spec()))
    assert [f.atomic_numbers.tolist() for f in frames[:3]] == [[8, 1, 1], [8, 1], [1, 1]]
    assert frames[1].labels["pbe", "forces"].shape == (2, 3)
    assert isinstance(frames[3], RejectedFrame)
    assert "type 5 of an atom; type_map.raw has 2" in frames[3].reason


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"coord": np.zeros((4, 8))}, r"coord.npy: shape \[4, 8\].*expected \[frames, 9\] for the 3 atoms"),
        ({"coord": None}, "no coord.npy"),
        ({"coord": np.array([["a"] * 9])}, "coord.npy: shape"),
        ({"energy": np.zeros(3)}, r"energy.npy: shape \[3\], but coord.npy has 4 frames"),
        ({"box": np.zeros((4, 6))}, r"box.npy has shape \[4, 6\]"),
        ({"types": "0\nx\n1\n"}, "type.raw: expected whole numbers"),
        ({"kinds": "O\nXx\n"}, "'Xx' is no element"),
        ({"kinds": ""}, "type_map.raw: empty"),
    ],
)
def test_what_does_not_fit(change: dict[str, Any], what: str, tmp_path: Path) -> None:
    path = system(tmp_path / "water", **change)
    with pytest.raises(InputError, match=what):
        list(read(path, spec()))


def test_pickled_and_cut_arrays(tmp_path: Path) -> None:
    path = system(tmp_path / "water")
    energy = tmp_path / "water" / "set.000" / "energy.npy"
    whole = energy.read_bytes()
    np.save(energy, np.array([1.0, "a", None, {}], object), allow_pickle=True)
    with pytest.raises(InputError, match=r"energy.npy: not readable"):
        list(read(path, spec()))
    for damaged in (whole[:-9], whole[:40], b"", b"text"):
        energy.write_bytes(damaged)
        with pytest.raises(InputError, match=r"energy.npy: not readable"):
            list(read(path, spec()))


def test_dpdata_reads_what_the_test_writes(tmp_path: Path) -> None:
    """The layout is dpdata's own."""
    dpdata = pytest.importorskip("dpdata")
    path = system(tmp_path / "water")
    theirs = dpdata.LabeledSystem(str(path.parent), fmt="deepmd/npy")
    ours = list(read(path, spec()))
    np.testing.assert_allclose(theirs["coords"], [f.positions for f in ours])
    np.testing.assert_allclose(theirs["forces"], [f.labels["pbe", "forces"] for f in ours], atol=1e-6)
