"""Readers: a source file → frames in mffm's units. A new format is one module with ``chunks`` and ``parse``, and a
line here.
"""

from collections.abc import Iterator
from pathlib import Path

from mffm.config.data import SourceSpec
from mffm.data.readers import ase, ase_db, deepmd, extxyz, hdf5, structures_json, vasp
from mffm.data.readers.chunk import Chunk, Parsed, Reader
from mffm.data.readers.convert import RejectedFrame, Wanted, wanted
from mffm.errors import InputError
from mffm.frame import Frame

READERS: dict[str, Reader] = {
    "extxyz": Reader(extxyz.chunks, extxyz.parse),
    "ase": Reader(ase.chunks, ase.parse),
    "ase_db": Reader(ase_db.chunks, ase_db.parse),
    "json": Reader(structures_json.chunks, structures_json.parse),
    "hdf5": Reader(hdf5.chunks, hdf5.parse),
    "deepmd": Reader(deepmd.chunks, deepmd.parse, deepmd.companions),
    "vasp": Reader(vasp.chunks, vasp.parse),
}
_BY_SUFFIX = {
    ".extxyz": "extxyz",
    ".xyz": "extxyz",
    ".db": "ase_db",
    ".aselmdb": "ase_db",
    ".h5": "hdf5",
    ".hdf5": "hdf5",
}
_PACKED = (".gz", ".bz2", ".xz")


def reader_name(path: Path, name: str = "auto") -> str:
    """Return the reader for a file: the one named, or by the ending (``.gz`` and the like aside); anything else is left
    to ASE.
    """
    if name != "auto":
        return name
    if path.name == "type.raw":
        return "deepmd"
    suffixes = [s for s in path.suffixes if s not in _PACKED]
    return _BY_SUFFIX.get(suffixes[-1] if suffixes else "", "ase")


def read(path: str | Path, spec: SourceSpec, split_key: str | None = None) -> Iterator[Frame | RejectedFrame]:
    """Yield the frames of one file in its order, as a stream; a bad frame comes as ``RejectedFrame``.

    Raises:
        InputError: no such file, or one that cannot be read at all.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file (source {spec.name!r})")
    reader = READERS[reader_name(path, spec.reader)]
    want = wanted(spec, split_key)
    for chunk in reader.chunks(path, want, 0, 0):
        yield from reader.parse(chunk, want).frames


__all__ = ["READERS", "Chunk", "Parsed", "Reader", "RejectedFrame", "Wanted", "read", "reader_name", "wanted"]
