"""JSON of pymatgen structures: nestings, streaming of large files, what has lost its structure."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mffm.config.base import validate
from mffm.config.data import SourceSpec
from mffm.data.readers import RejectedFrame, read, structures_json
from mffm.errors import InputError
from mffm.frame import Frame

REAL = pytest.mark.skipif("MFFM_DATA" not in os.environ, reason="MFFM_DATA (folder of the published sets) is not set")


def spec(**options: Any) -> SourceSpec:
    content = {"name": "set", "path": "-", "licence": "MIT", "reader": "json", "labels": {"pbe": {"energy": "energy"}}}
    return validate(SourceSpec, content | options, "test")


def record(k: int, **more: Any) -> dict[str, Any]:
    structure = {
        "lattice": {"matrix": [[4.0 + k / 100, 0, 0], [0, 4, 0], [0, 0, 4]]},
        "sites": [{"species": [{"element": "Si", "occu": 1}], "abc": [0, 0, 0], "xyz": [0, 0, 0]}],
    }
    return {"structure": structure, "energy": -float(k)} | more


def energies(path: Path, source: SourceSpec | None = None) -> list[float]:
    frames = list(read(path, source or spec()))
    assert all(isinstance(f, Frame) for f in frames), [f for f in frames if isinstance(f, RejectedFrame)]
    return [-float(f.labels["pbe", "energy"]) for f in frames]


NESTINGS = {
    "list": lambda r: json.dumps(r),
    "lines": lambda r: "\n".join(json.dumps(x) for x in r),
    "mapping": lambda r: json.dumps({f"k{i}": x for i, x in enumerate(r)}),
    "mapping of mappings": lambda r: json.dumps({"a": {str(i): x for i, x in enumerate(r[:4])}, "b": {"z": r[4]}}),
    "entries": lambda r: json.dumps({"entries": r}),
    "paths of relaxations": lambda r: json.dumps(
        {"agm1": [{"functional": "PBE", "steps": r[:2]}, {"input": {"kpoints": {"n": 1}}, "steps": r[2:3]}],
         "agm2": [{"steps": r[3:]}]}
    ),
    "one record": lambda r: json.dumps(r[0]),
}  # fmt: skip


@pytest.mark.parametrize("small", [True, False], ids=["at once", "streamed"])
@pytest.mark.parametrize("nesting", NESTINGS)
def test_nestings(nesting: str, small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not small:
        if nesting in ("lines", "one record"):
            pytest.skip("a large record is not cut")
        monkeypatch.setattr(structures_json, "_SMALL", 100)
        monkeypatch.setattr(structures_json, "_BLOCK", 64)
    path = tmp_path / "a.json"
    path.write_text(NESTINGS[nesting]([record(k) for k in range(5)]))
    assert energies(path) == ([0] if nesting == "one record" else [0, 1, 2, 3, 4])


def test_names_on_the_way_and_values_above(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    steps = [record(0, data={"mat_id": "m0"}), record(1, data={"mat_id": "m1"})]
    path.write_text(json.dumps({"agm1": [{"functional": "PBE", "steps": steps}]}))
    frames = list(read(path, spec(frame_key="data.mat_id", group_key="id_0")))
    assert [(f.frame_id, f.group) for f in frames] == [("m0", "agm1"), ("m1", "agm1")]
    frames = list(read(path, spec(frame_key="id_3", group_key="functional")))
    assert [(f.frame_id, f.group) for f in frames] == [("0", "PBE"), ("1", "PBE")]


def test_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mffm.data.readers import READERS, plain
    from mffm.data.readers.convert import wanted

    monkeypatch.setattr(plain, "CHUNK_FRAMES", 3)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([record(k) for k in range(8)]))
    reader, want = READERS["json"], wanted(spec())
    first = next(reader.chunks(path, want, 0, 0))
    rest = list(reader.chunks(path, want, first.next_position, first.first + first.n))
    assert [c.first for c in rest] == [3, 6]
    frames = [f for c in [first, *rest] for f in reader.parse(c, want).frames]
    assert [-float(f.labels["pbe", "energy"]) for f in frames] == list(range(8))


def test_what_has_lost_its_structure_is_reported(tmp_path: Path) -> None:
    records = [record(k) for k in range(5)]
    records[1]["structurE"] = records[1].pop("structure")
    records[2]["structure"]["sites"][0]["species"] = [{"element": "Si", "occu": 0.5}, {"element": "Ge", "occu": 0.5}]
    records[3]["structure"]["sites"][0]["xyz"] = [1.0, 0, 0]
    for content in (
        records,
        {"entries": records},
        {f"k{i}": r for i, r in enumerate(records)},
        {"mp-1": dict(enumerate(records))},
    ):
        path = tmp_path / "a.json"
        path.write_text(json.dumps(content))
        frames = list(read(path, spec()))
        assert [isinstance(f, Frame) for f in frames] == [True, False, False, False, True]
        assert "no structure in it; keys energy, structurE" in frames[1].reason
        assert "not occupied by one element alone" in frames[2].reason
        assert "xyz and abc of its sites differ by 1 Å" in frames[3].reason


@pytest.mark.parametrize("small", [True, False], ids=["at once", "streamed"])
def test_damage_is_told_with_its_place(small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not small:
        monkeypatch.setattr(structures_json, "_SMALL", 100)
    path = tmp_path / "a.json"
    text = json.dumps({f"k{k}": record(k) for k in range(5)})
    for damaged, what in (
        (text[:-300], "cut short"),
        (text.replace('"energy"', '"energy', 1), "not valid JSON at character"),
        (text.replace('"k2"', '"k1"'), "'k1' is given twice"),
        (text.replace('"energy"', '"structure"', 1), "'structure' is given twice"),
        ("[" * 5000, "JSON"),
        ('{"a": 1}', "no record with a structure"),
        ("", "no record with a structure"),
        ("\x00\x01", "not valid JSON"),
    ):
        path.write_text(damaged)
        with pytest.raises(InputError, match=what):
            list(read(path, spec()))
    path.write_bytes(text.encode()[:200] + b"\xff\xfe" + text.encode()[200:])
    with pytest.raises(InputError, match="cannot be read"):
        list(read(path, spec()))
    packed = tmp_path / "a.json.gz"
    packed.write_bytes(gzip.compress(text.encode())[:-9])
    with pytest.raises(InputError, match="cannot be read"):
        list(read(packed, spec()))


def test_molecules(tmp_path: Path) -> None:
    from pymatgen.core import Molecule

    molecule = Molecule("OH", [[0, 0, 0], [0, 0, 0.97]], charge=-1, spin_multiplicity=1)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"molecule": molecule.as_dict(), "energy": -1.0}]))
    keys = {"charge_key": "structure.charge", "spin_multiplicity_key": "structure.spin_multiplicity"}
    (frame,) = read(path, spec(**keys))
    assert (frame.charge, frame.spin_multiplicity, frame.pbc.any()) == (-1, 1, False)
    np.testing.assert_allclose(frame.positions[1], [0, 0, 0.97])


@REAL
def test_matpes_elements_in_place() -> None:
    """The published element references of MatPES, beside the extxyz that was derived from them."""
    folder = Path(os.environ["MFFM_DATA"]) / "matpes_elements_pbe_r2scan"
    frames = {}
    for name, level in (("matpes-pbe", "PBE"), ("matpes-r2scan", "r2SCAN")):
        path = folder / f"MatPES-{level}-Element-Refs.json.gz"
        source = validate(SourceSpec, {"name": "a", "preset": name, "path": str(path), "frame_key": "id_0"}, "test")
        frames[level] = list(read(path, source))
        assert [type(f) for f in frames[level]] == [Frame] * 89
    derived = {"name": "a", "path": "-", "licence": "BSD-3", "group_key": "functional", "frame_key": "element"}
    labels = {"x": {"energy": "energy", "forces": "forces",
                    "stress": {"key": "stress_raw_voigt_kbar", "unit": "kbar", "negate": True}}}  # fmt: skip
    theirs = list(read(folder / "elements.extxyz", validate(SourceSpec, derived | {"labels": labels}, "test")))
    ours = [f for level in frames.values() for f in level]
    by_energy = {round(float(f.labels["x", "energy"]), 6): f for f in theirs}
    for frame in ours:
        (fidelity,) = {f for f, _ in frame.labels}
        other = by_energy[round(float(frame.labels[fidelity, "energy"]), 6)]
        np.testing.assert_allclose(frame.positions, other.positions, atol=1e-5)
        for prop in ("forces", "stress"):
            np.testing.assert_allclose(frame.labels[fidelity, prop], other.labels["x", prop], atol=1e-6)


@REAL
def test_order_of_matpes_stresses_is_the_one_that_symmetry_leaves_as_it_is() -> None:
    from pymatgen.core import Structure
    from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

    path = Path(os.environ["MFFM_DATA"]) / "matpes_elements_pbe_r2scan" / "MatPES-PBE-Element-Refs.json.gz"
    published = json.loads(gzip.decompress(path.read_bytes()))
    source = validate(SourceSpec, {"name": "a", "preset": "matpes-pbe", "path": str(path), "frame_key": "id_0"}, "test")
    moved: Counter[str] = Counter()
    for frame in read(path, source):
        if frame.frame_id not in (
            "As",
            "B",
            "Bi",
            "Ga",
            "P",
            "Pu",
            "Sb",
            "Se",
        ):  # off the diagonal by 0.5 kbar and more
            continue
        structure = Structure.from_dict(published[frame.frame_id]["structure"])
        operations = SpacegroupAnalyzer(structure, 0.01).get_symmetry_operations(cartesian=True)
        stress = frame.labels["pbe_matpes", "stress"]
        xx, yy, zz, yz, xz, xy = stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
        of_vasp = np.array([[xx, yz, xy], [yz, yy, xz], [xy, xz, zz]])  # had the file VASP's xx yy zz xy yz zx
        for name, tensor in (("ASE", stress), ("VASP", of_vasp)):
            moved[name] += (
                max(np.abs(o.rotation_matrix @ tensor @ o.rotation_matrix.T - tensor).max() for o in operations)
                > 0.1 * 6.24e-4
            )
    assert moved == {"ASE": 0, "VASP": 8}
