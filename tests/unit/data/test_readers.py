"""Readers: units, Voigt order, signs, what a bad frame and a bad file say."""

import bz2
import gzip
import lzma
import os
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect

from mffm.config.data import LabelSpec, SourceSpec
from mffm.data.readers import RejectedFrame, read, reader_name
from mffm.data.readers.convert import factor, formula
from mffm.data.readers.extxyz import parse_comment
from mffm.errors import InputError
from mffm.frame import Frame


def spec(labels=None, **options) -> SourceSpec:
    labels = labels or {"pbe": {"energy": "energy", "forces": "forces", "stress": "stress"}}
    return SourceSpec(name="set", path="-", licence="MIT", labels=labels, **options)


def one(path, source) -> Frame:
    (frame,) = read(path, source)
    assert isinstance(frame, Frame), frame
    return frame


def rejected(path, source) -> RejectedFrame:
    (frame,) = read(path, source)
    assert isinstance(frame, RejectedFrame)
    return frame


def atoms_with_results() -> Atoms:
    atoms = Atoms("SiO2", [[0, 0, 0], [1.6, 0, 0], [0, 1.6, 0]], cell=np.diag([4.0, 5.0, 6.0]), pbc=True)
    atoms.info.update(note="a b", charge=1)
    forces = np.arange(9.0).reshape(3, 3)
    atoms.calc = SinglePointCalculator(atoms, energy=-3.5, forces=forces, stress=np.arange(1.0, 7.0))
    return atoms


VOIGT = np.array([[1.0, 6, 5], [6, 2, 4], [5, 4, 3]])


def test_extxyz_agrees_with_ase(write_frames, structures):
    frame = structures.crystal() | {"stress": VOIGT}
    path = write_frames("a.extxyz", [frame])
    ours = one(path, spec())
    theirs = one(path, spec(reader="ase"))
    for label in ("energy", "forces", "stress"):
        np.testing.assert_allclose(ours.labels["pbe", label], theirs.labels["pbe", label], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(ours.labels["pbe", "stress"], VOIGT)
    np.testing.assert_allclose(ours.positions, theirs.positions, atol=1e-12)
    np.testing.assert_allclose(ours.cell, frame["cell"], atol=1e-9)
    assert ours.pbc.all()
    assert ours.atomic_numbers.tolist() == [14, 8, 8, 6]


def test_six_numbers_are_voigt_in_ase_order(write_frames, structures):
    path = write_frames("a.extxyz", [structures.crystal() | {"stress": np.arange(1.0, 7.0)}])
    np.testing.assert_array_equal(one(path, spec()).labels["pbe", "stress"], VOIGT)


@pytest.mark.parametrize(
    ("prop", "unit", "expected"),
    [
        ("energy", "Hartree", 27.211386),
        ("energy", "kcal/mol", 0.0433641),
        ("energy", "kJ/mol", 0.01036427),
        ("energy", "Rydberg", 13.605693),
        ("energy", "meV", 1e-3),
        ("energy", None, 1.0),
        ("forces", "Hartree/bohr", 51.422067),
        ("forces", "kcal/mol/Angstrom", 0.0433641),
        ("forces", "kJ/mol/nm", 0.001036427),
        ("stress", "GPa", 0.006241509),
        ("stress", "kbar", 0.0006241509),
        ("stress", "Hartree/bohr^3", 183.631576),
    ],
)
def test_units(prop, unit, expected):
    assert factor(prop, LabelSpec(key="k", unit=unit)) == pytest.approx(expected, rel=1e-6)
    assert factor(prop, LabelSpec(key="k", unit=unit, negate=True)) == pytest.approx(-expected, rel=1e-6)


@pytest.mark.parametrize(
    ("prop", "unit"), [("energy", "Ha"), ("forces", "eV"), ("stress", "eV"), ("forces", "eV/inch")]
)
def test_unknown_unit_lists_the_known(prop, unit):
    with pytest.raises(InputError, match=r"known units|energy of"):
        factor(prop, LabelSpec(key="k", unit=unit))


def test_units_round_trip(write_frames, structures):
    """The same labels written in other units, signs and lengths come back the same."""
    frame = structures.crystal()
    other = {
        **frame,
        "positions": frame["positions"] / 0.529177210903,
        "cell": frame["cell"] / 0.529177210903,
        "energy": frame["energy"] / 27.211386245988,
        "forces": -frame["forces"] / 51.422067476,
        "stress": frame["stress"] * -np.linalg.det(frame["cell"]) / 27.211386245988,
    }
    labels = {
        "pbe": {
            "energy": {"key": "energy", "unit": "Hartree"},
            "forces": {"key": "forces", "unit": "Hartree/bohr", "negate": True},
            "stress": {"key": "stress", "unit": "Hartree", "virial": True},
        }
    }
    a = one(write_frames("a.extxyz", [frame]), spec())
    b = one(write_frames("b.extxyz", [other]), spec(labels, length_unit="bohr"))
    np.testing.assert_allclose(b.positions, a.positions, atol=1e-8)
    for prop in ("energy", "forces", "stress"):
        np.testing.assert_allclose(b.labels["pbe", prop], a.labels["pbe", prop], rtol=1e-6, atol=1e-7)


def test_ase_reader_and_database_take_calculator_results(tmp_path):
    atoms = atoms_with_results()
    ase.io.write(tmp_path / "a.traj", atoms)
    ase.io.write(tmp_path / "a.extxyz", atoms)
    with connect(tmp_path / "a.db") as database:
        database.write(atoms, key_value_pairs={"tag": "x7"}, data={"deep": {"a": 1}})
    from_traj = one(tmp_path / "a.traj", spec(charge_key="charge"))
    from_text = one(tmp_path / "a.extxyz", spec(charge_key="charge"))
    from_database = one(tmp_path / "a.db", spec(frame_key="tag"))
    for frame in (from_traj, from_text, from_database):
        assert float(frame.labels["pbe", "energy"]) == -3.5
        np.testing.assert_allclose(frame.labels["pbe", "forces"], np.arange(9.0).reshape(3, 3))
        np.testing.assert_allclose(frame.labels["pbe", "stress"], VOIGT)
    assert from_traj.charge == from_text.charge == 1
    assert from_database.frame_id == "x7"


def test_aselmdb(tmp_path):
    pytest.importorskip("ase_db_backends")
    with connect(str(tmp_path / "a.aselmdb"), type="aselmdb") as database:
        for _ in range(3):
            database.write(atoms_with_results(), data={"source": "s"})
    frames = list(read(tmp_path / "a.aselmdb", spec()))
    assert [float(f.labels["pbe", "energy"]) for f in frames] == [-3.5] * 3
    np.testing.assert_allclose(frames[0].labels["pbe", "stress"], VOIGT)


def test_comment_line():
    info = parse_comment(
        'Lattice="1 0 0" a=1 b="two words" c=\'x y\' d={1 2} e="_JSON [2, 3]" f=[[1, 2], [3, 4]] flag '
        'g="q \\"r\\"" h=T k=a,b'
    )
    assert info["b"] == "two words"
    assert info["c"] == "x y"
    assert info["d"] == "1 2"
    assert info["e"] == "_JSON [2, 3]"
    assert info["f"] == "[[1, 2], [3, 4]]"
    assert info["flag"] == "T"
    assert info["g"] == 'q "r"'
    assert (info["a"], info["h"], info["k"]) == ("1", "T", "a,b")


def test_gzip_is_read(tmp_path, write_frames, structures):
    path = write_frames("a.extxyz", [structures.crystal() for _ in range(3)])
    packed = tmp_path / "b.extxyz.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert reader_name(packed) == "extxyz"
    assert [f.positions.tolist() for f in read(packed, spec())] == [f.positions.tolist() for f in read(path, spec())]


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_packed_files_that_are_damaged(tmp_path, write_frames, structures, suffix, pack):
    whole = pack(write_frames("a.extxyz", [structures.crystal() for _ in range(60)]).read_bytes())
    packed = tmp_path / f"b.extxyz{suffix}"
    packed.write_bytes(whole)
    assert reader_name(packed) == "extxyz"
    assert len(list(read(packed, spec()))) == 60
    middle = len(whole) // 2
    for damaged in (whole[:-20], whole[:middle] + bytes(40) + whole[middle + 40 :]):
        packed.write_bytes(damaged)
        with pytest.raises(InputError, match=r"cannot be read beyond frame|expected the number of atoms"):
            list(read(packed, spec()))


def test_magnetic_moments(write_frames, structures):
    moments = np.array([[3.1], [0.0], [-0.1], [0.2]])
    first = structures.crystal() | {"m": moments, "columns": ("forces", "m")}
    wrong = structures.crystal() | {"m": np.zeros((4, 3)), "columns": ("forces", "m")}
    a, b, c = read(write_frames("a.extxyz", [first, structures.crystal(), wrong]), spec(magnetic_moments_key="m"))
    assert a.magnetic_moments.tolist() == moments.ravel().tolist()
    assert b.magnetic_moments is None
    assert "magnetic moments (m): expected one number an atom, [4], found [4, 3]" in c.reason


def test_a_charge_in_the_data_of_a_row_is_kept(tmp_path):
    """``AtomsRow.charge`` is 0.0 where the row has none; it must not hide the one that a set gives."""
    with connect(tmp_path / "a.db") as database:
        database.write(atoms_with_results(), data={"charge": -2, "spin": 3})
    frame = one(tmp_path / "a.db", spec(charge_key="charge", spin_multiplicity_key="spin"))
    assert (frame.charge, frame.spin_multiplicity) == (-2, 3)


def test_an_aselmdb_that_was_cut_is_an_error(tmp_path):
    """LMDB would end the process: it maps what the header says is there."""
    pytest.importorskip("ase_db_backends")
    path = tmp_path / "a.aselmdb"
    with connect(str(path), type="aselmdb") as database:
        for _ in range(40):
            database.write(atoms_with_results())
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:9000] + whole[9013:], b"text"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="damaged or cut short: LMDB cannot read it"):
            list(read(path, spec()))


def test_a_key_missing_in_some_frames_is_an_absent_label(write_frames, structures):
    full = structures.crystal()
    bare = {k: v for k, v in structures.crystal().items() if k not in ("energy", "stress")}
    none = structures.crystal() | {"energy": "null"}
    first, second, third = read(write_frames("a.extxyz", [full, bare, none]), spec())
    assert ("pbe", "energy") in first.labels
    assert set(second.labels) == {("pbe", "forces")}
    assert ("pbe", "energy") not in third.labels


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"energy": "nan"}, "nan"),
        ({"energy": "inf"}, "inf"),
        ({"energy": "abc"}, "not numeric"),
        ({"energy": "1 2"}, "one number"),
        ({"forces": np.full((4, 3), np.nan)}, "nan"),
        ({"forces": np.zeros((4, 2))}, r"expected shape \[4, 3\]"),
        ({"stress": [1.0, 2, 3, 4, 5]}, "found 5"),
        ({"stress": [np.inf] * 6}, "inf"),
        ({"stress": [1.0, 2, 3, 0, 5, 6, 7, 8, 9]}, "not symmetric"),
        ({"numbers": np.array([119, 8, 8, 6])}, "119.*outside 1..118"),
        ({"numbers": np.array([0, 8, 8, 6])}, "outside 1..118"),
        ({"positions": np.full((4, 3), np.nan)}, "positions"),
        ({"positions": 1e12 * np.eye(4, 3)}, r"positions: 1e\+12 Å at \[0, 0\], farther than"),
        ({"energy": "-inf"}, r"^energy \(energy\): -inf$"),
        ({"energy": "1e13"}, r"^energy \(energy\): 1e\+13, beyond 1e\+12 eV: damage"),
        ({"forces": np.full((4, 3), -1e300)}, r"^forces \(forces\): 1e\+300, beyond"),
        ({"cell": 2e6 * np.eye(3)}, r"^the cell: .*expected 3×3 numbers up to 1e\+06 Å"),
        ({"cell": np.zeros((3, 3))}, r"no cell volume, pbc \[True, True, True\]; give it a cell"),
    ],
)
def test_bad_frames_are_rejected_with_place_and_value(write_frames, structures, change, reason):
    good = structures.crystal()
    path = write_frames("a.extxyz", [good, good | change, good])
    frames = list(read(path, spec()))
    assert [type(f) for f in frames] == [Frame, RejectedFrame, Frame]
    assert frames[1].origin == f"{path}:1"
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(frames[1].reason)


def test_unknown_element_symbol(tmp_path):
    (tmp_path / "a.xyz").write_text("1\nenergy=1\nXx 0 0 0\n")
    assert "'Xx'" in rejected(tmp_path / "a.xyz", spec()).reason


def test_stress_without_a_cell_is_rejected(write_frames, structures):
    path = write_frames("a.extxyz", [structures.molecule() | {"stress": np.zeros(6)}])
    assert "no cell volume" in rejected(path, spec()).reason


def test_cut_file(tmp_path, write_frames, structures):
    path = write_frames("a.extxyz", [structures.crystal() for _ in range(3)])
    path.write_bytes(path.read_bytes()[:-90])
    frames = list(read(path, spec()))
    assert isinstance(frames[2], RejectedFrame)
    assert "cut short" in frames[2].reason


def test_unreadable_files(tmp_path, write_frames, structures):
    with pytest.raises(InputError, match="no such file"):
        list(read(tmp_path / "absent.xyz", spec()))
    (tmp_path / "text.xyz").write_text("hello\nworld\n")
    with pytest.raises(InputError, match="frame 0: expected the number of atoms, found 'hello'"):
        list(read(tmp_path / "text.xyz", spec()))
    for n in (-5, 10**20):
        (tmp_path / "count.xyz").write_text(f"{n}\n\nH 0 0 0\n")
        with pytest.raises(InputError, match=f"frame 0: {n} atoms; expected a number from 0 to"):
            list(read(tmp_path / "count.xyz", spec()))
    (tmp_path / "a.db").write_bytes(os.urandom(4000))
    with pytest.raises(InputError, match="not readable as an ASE database"):
        list(read(tmp_path / "a.db", spec()))
    (tmp_path / "a.traj").write_bytes(os.urandom(4000))
    with pytest.raises(InputError, match="ASE cannot read"):
        list(read(tmp_path / "a.traj", spec()))
    packed = write_frames("b.extxyz", [structures.crystal() for _ in range(50)])
    (tmp_path / "b.extxyz.gz").write_bytes(gzip.compress(packed.read_bytes())[:-200])
    with pytest.raises(InputError, match="cannot be read beyond frame"):
        list(read(tmp_path / "b.extxyz.gz", spec()))


def test_formula():
    assert formula(np.array([8, 6, 1, 1, 6, 1])) == "C2H3O"
    assert formula(np.array([8, 14, 8])) == "O2Si"


@pytest.mark.skipif("MFFM_DATA" not in os.environ, reason="MFFM_DATA (folder of the published sets) is not set")
def test_real_sets_agree_with_ase():
    folder = Path(os.environ["MFFM_DATA"])
    for name, labels in (
        ("ladders/crystals.extxyz", {"pbe": {"energy": "energy_pbe", "forces": "forces_pbe", "stress": "stress_pbe"}}),
        ("mattersim_pbe/mptrj-random-1k.xyz", None),
    ):
        ours = list(read(folder / name, spec(labels)))[:40]
        theirs = list(read(folder / name, spec(labels, reader="ase")))[:40]
        for a, b in zip(ours, theirs, strict=True):
            assert a.labels.keys() == b.labels.keys()
            np.testing.assert_allclose(a.cell, b.cell, atol=1e-12)
            for key, value in a.labels.items():
                np.testing.assert_allclose(value, b.labels[key], atol=1e-12)
