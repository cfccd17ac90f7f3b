"""What is to be labelled: the structures of a store, or of files that are put into one shard first."""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import lmdb
import numpy as np

from mffm.data import records
from mffm.data.readers import READERS, RejectedFrame, reader_name
from mffm.data.readers.convert import Wanted
from mffm.data.store import NO_CHARGE, Store
from mffm.errors import InputError
from mffm.frame import Frame

CHARGE_KEY = "charge"
SPIN_KEYS = ("spin_multiplicity", "multiplicity", "spin")  # the first that a file has


class Structures(Protocol):
    """Structures by index; cheap to open in any process."""

    n_atoms: np.ndarray

    def get(self, index: int) -> Frame:
        """Return a structure without labels."""
        ...


class OfStore:
    """The structures of a store by row."""

    def __init__(self, path: Path):
        self.store = Store(path)
        self.n_atoms = self.store.n_atoms

    def get(self, index: int) -> Frame:
        numbers, positions, cell, pbc = self.store.geometry(index)
        charge, spin = int(self.store.charge[index]), int(self.store.spin_multiplicity[index])
        return Frame(
            numbers,
            positions,
            cell,
            pbc,
            frame_id=self.store.frame_id(index),
            charge=None if charge == NO_CHARGE else charge,
            spin_multiplicity=spin or None,
            origin=f"{self.store.path}: row {index}",
        )


class OfShard:
    """The structures that ``prepare`` put into a folder, in the order of the files."""

    def __init__(self, folder: Path):
        columns = np.load(folder / "columns.npz")
        self.n_atoms, self._charge, self._spin = columns["n_atoms"], columns["charge"], columns["spin"]
        self._origins = str(folder)
        self._environment = lmdb.open(
            str(folder / "structures.lmdb"), subdir=False, readonly=True, lock=False, readahead=False, max_dbs=0
        )
        self._transaction = self._environment.begin(buffers=True)

    def get(self, index: int) -> Frame:
        record = self._transaction.get(records.row_key(index))
        charge, spin = int(self._charge[index]), int(self._spin[index])
        return Frame(
            *records.unpack_geometry(record),
            frame_id=records.unpack_frame_id(record),
            charge=None if charge == NO_CHARGE else charge,
            spin_multiplicity=spin or None,
            origin=f"structure {index}",
        )


@dataclass(frozen=True)
class Source:
    """What a run labels.

    Attributes:
        store: folder of a store, or None.
        files: of structures, where there is no store.
    """

    store: Path | None
    files: tuple[Path, ...] = ()

    @classmethod
    def of(cls, paths: Sequence[Path]) -> "Source":
        """Return the source of a command line.

        Raises:
            InputError: a path that is not there, several stores, or a store among files.
        """
        for path in paths:
            if not path.exists():
                raise InputError(f"{path}: no such file or store")
        folders = [path for path in paths if path.is_dir()]
        if not folders:
            return cls(None, tuple(path.resolve() for path in paths))
        if len(paths) > 1:
            raise InputError(f"{folders[0]}: a store is labelled alone; give one store, or files")
        Store(folders[0])
        return cls(folders[0].resolve())

    def describe(self) -> dict[str, Any]:
        """Return what a run is bound to, as JSON."""
        if self.store is not None:
            return {"store": str(self.store), "geometry": Store(self.store).geometry_fingerprint}
        return {
            "files": [str(path) for path in self.files],
            "sha256": [records.file_sha256(path) for path in self.files],
        }

    def open(self, folder: Path) -> Structures:
        """Open the structures; those of files are in the working folder."""
        return OfStore(self.store) if self.store is not None else OfShard(folder / "structures")


def read_files(files: Sequence[Path]) -> Iterator[Frame]:
    """Yield the structures of files, each with a frame_id: its own, or ``<file>-<index>``.

    Raises:
        InputError: a file cannot be read, a frame is no structure, a frame_id occurs twice.
    """
    seen: dict[bytes, str] = {}
    for path in files:
        index = -1
        for index, frame in enumerate(_frames(path)):
            frame.frame_id = frame.frame_id or f"{path.stem}-{index:05d}"
            digest = hashlib.blake2b(frame.frame_id.encode(), digest_size=12).digest()
            if digest in seen:
                raise InputError(
                    f"{path}: frame {index}: frame_id {frame.frame_id!r} occurs twice (first: {seen[digest]}); "
                    "give every structure its own, or remove the repeated one"
                )
            seen[digest] = f"{path.name}:{index}"
            yield frame
        if index < 0:
            raise InputError(f"{path}: no structures in it")


def _frames(path: Path) -> Iterator[Frame]:
    reader = READERS[reader_name(path)]
    for chunk in reader.chunks(path, _wanted(None), 0, 0):
        first = reader.parse(chunk, _wanted(None))
        spin = next((key for key in SPIN_KEYS if key in first.keys), None)
        parsed = reader.parse(chunk, _wanted(spin, first.keys))
        for frame in parsed.frames:
            if isinstance(frame, RejectedFrame):
                raise InputError(f"{frame.file}: frame {frame.index}: {frame.reason}; correct it or take it out")
            yield frame


def _wanted(spin: str | None, keys: set[str] | None = None) -> Wanted:
    """Return what is taken of a file: geometry, name, charge and spin; the name only where frames have one."""
    return Wanted(
        source="", labels=(), length=1.0, frame_key="frame_id" if keys and "frame_id" in keys else None, group_key=None,
        charge_key=CHARGE_KEY, spin_key=spin, split_key=None, weight_key=None,
    )  # fmt: skip


def prepare(files: Sequence[Path], folder: Path) -> None:
    """Put the structures of files into ``folder``, whole or not at all, for workers to find them by index."""
    if folder.is_dir():
        return
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    columns: dict[str, list[int]] = {"n_atoms": [], "charge": [], "spin": []}

    def packed() -> Iterator[tuple[int, bytes]]:
        for index, frame in enumerate(read_files(files)):
            columns["n_atoms"].append(frame.n_atoms)
            columns["charge"].append(NO_CHARGE if frame.charge is None else frame.charge)
            columns["spin"].append(frame.spin_multiplicity or 0)
            geometry = (frame.atomic_numbers, frame.positions, frame.cell, frame.pbc)
            yield index, records.pack_geometry(*geometry, frame.frame_id)

    try:
        records.write_shard(aside / "structures.lmdb", packed())
        arrays: dict[str, Any] = {name: np.array(values, np.int32) for name, values in columns.items()}
        np.savez(aside / "columns.npz", **arrays)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
