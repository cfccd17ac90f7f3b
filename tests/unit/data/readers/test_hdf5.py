"""HDF5 of molecules: shapes, names, links, damage; the real COMP6 file in place."""

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mffm.config.base import validate
from mffm.config.data import SourceSpec
from mffm.data.readers import RejectedFrame, read
from mffm.data.readers.hdf5 import _formal_charge
from mffm.errors import InputError
from mffm.frame import Frame


def spec(**options: Any) -> SourceSpec:
    content = {"name": "set", "path": "-", "licence": "MIT", "labels": {"dft": {"energy": "energies", "forces": "f"}}}
    return validate(SourceSpec, content | options, "test")


def group(file: Any, name: str, n_frames: int = 3, n_atoms: int = 4, **datasets: Any) -> Any:
    rng = np.random.default_rng(n_frames)
    made = file.create_group(name)
    content = {
        "coordinates": rng.normal(size=(n_frames, n_atoms, 3)),
        "species": np.array([b"O"] * n_atoms),
        "energies": -np.arange(n_frames, dtype=float),
        "f": rng.normal(size=(n_frames, n_atoms, 3)),
    }
    for key, value in (content | datasets).items():
        if value is not None:
            made[key] = value
    return made


@pytest.mark.parametrize(
    "change",
    [{}, {"species": np.full(4, 8)}, {"species": np.full((4, 1), 8)}, {"species": np.full((3, 4), 8)},
     {"species": np.array(["O"] * 4, object)}],
)  # fmt: skip
def test_numbers_of_every_kind(change: dict[str, Any], tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        group(file, "m", **change)
    frames = list(read(tmp_path / "a.h5", spec(group_key="group", frame_key="frame")))
    assert [f.atomic_numbers.tolist() for f in frames] == [[8] * 4] * 3
    assert [float(f.labels["dft", "energy"]) for f in frames] == [0, -1, -2]
    assert [(f.group, f.frame_id) for f in frames] == [("m", f"m/{k}") for k in range(3)]


def test_three_atoms_and_three_frames_are_not_mixed_up(tmp_path: Path) -> None:
    """[3, 3, 3] are frames of atoms; [3] with a value a frame, not an atom; [3, 3] of a frame its forces."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        made = group(file, "m", 3, 3)
        forces = made["f"][()]
    for k, frame in enumerate(read(tmp_path / "a.h5", spec())):
        np.testing.assert_allclose(frame.labels["dft", "forces"], forces[k])


def test_one_bad_group_does_not_take_the_others_along(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        group(file, "a good")
        group(file, "b numbers", species=np.full(7, 8))
        group(file, "c unknown", species=np.array([b"Xx"] * 4))
        group(file, "d none", species=None)
        group(file, "e flat", coordinates=np.zeros((3, 12)))
        file.create_group("f nothing")["energies"] = np.zeros(3)
        group(file, "g text", coordinates=np.zeros((3, 4, 2)))
        file["h link"] = h5py.SoftLink("/nowhere")
        group(file, "i forces", f=np.zeros((3, 4, 2)))
        group(file, "j good")
    frames = list(read(tmp_path / "a.h5", spec()))
    assert [f.reason.split(":")[0] for f in frames if isinstance(f, RejectedFrame)] == [
        "h link", *["b numbers"] * 3, *["c unknown"] * 3, *["d none"] * 3, *["e flat"] * 3,
        *["f nothing"] * 3, *["g text"] * 3, *["forces (f)"] * 3,
    ]  # fmt: skip
    assert sum(isinstance(f, Frame) for f in frames) == 6


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["energies"] = np.zeros(3)
        group(file, "train/m")
    with pytest.raises(InputError, match=r"no group 'val' \(hdf5.groups\); groups: energies, train"):
        list(read(path, spec(hdf5={"groups": ["train", "val"]})))
    with pytest.raises(InputError, match=r"no group has positions, by the name xyz.*give hdf5.positions"):
        list(read(path, spec(hdf5={"positions": "xyz"})))
    assert len(list(read(path, spec(hdf5={"groups": ["train"]})))) == 3
    whole = path.read_bytes()
    for damaged in (whole[:500], b"text", b""):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="not readable as HDF5"):
            list(read(path, spec()))


@pytest.mark.parametrize(
    ("smiles", "charge"),
    [("[O-:1][H:2]", -1), ("[Ca+2]", 2), ("[Ca++]", 2), ("[NH3+:1][CH2:2]C([O-:3])=O", 0), ("CCO", 0), ("[13CH4]", 0),
     ("[Cl-].[Na+]", 0), ("[C@@H](C-N)O", 0), ("[S:1](=[O:2])(=[O:3])([O-:4])[O-:5]", -2)],
)  # fmt: skip
def test_formal_charge_of_smiles(smiles: str, charge: int) -> None:
    assert _formal_charge(smiles) == charge


@pytest.mark.skipif("MFFM_DATA" not in os.environ, reason="MFFM_DATA (folder of the published sets) is not set")
def test_s66x8_in_place() -> None:
    path = Path(os.environ["MFFM_DATA"]) / "comp6_s66x8" / "s66x8_wb97x6-31gd.h5"
    labels = {"wb97x": {"energy": {"key": "energies", "unit": "Hartree"},
                        "forces": {"key": "forces", "unit": "Hartree/Angstrom", "negate": True}}}  # fmt: skip
    frames = list(read(path, spec(labels=labels, group_key="group_1")))
    assert len(frames) == 528
    assert all(isinstance(f, Frame) for f in frames)
    assert len({f.group for f in frames}) == 66
    # Forces and energies belong together: minus the work of the mean force along a dimer's curve is the difference.
    work, difference = [], []
    for a, b in pairwise(frames):
        if a.group == b.group and a.n_atoms == b.n_atoms and np.abs(a.positions - b.positions).max() < 0.5:
            mean = 0.5 * (a.labels["wb97x", "forces"] + b.labels["wb97x", "forces"])
            work.append(-float((mean * (b.positions - a.positions)).sum()))
            difference.append(float(b.labels["wb97x", "energy"] - a.labels["wb97x", "energy"]))
    assert len(work) > 100
    assert np.dot(work, difference) / np.dot(work, work) == pytest.approx(1, abs=0.15)
