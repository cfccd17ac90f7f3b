"""What the doctor reads: stores, data YAMLs and plain files, as one row of frames with places and random access.

Frames of files are written once to a scratch file in mffm's own records, so that a frame can be read again without
parsing its file and memory holds a few numbers a frame. A store is read in place.
"""

import json
import mmap
import re
import struct
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from mffm.config.base import load
from mffm.config.data import DataConfig, LabelSpec, SourceSpec
from mffm.data import records
from mffm.data.checks import frame_fault
from mffm.data.doctor.measure import Measured, measure
from mffm.data.guess import ENERGY_NAME, NO_TOTAL_ENERGY, Keys, guess, level, read_keys
from mffm.data.ingest import source_files
from mffm.data.readers import READERS, RejectedFrame, Wanted, reader_name, wanted
from mffm.data.readers.chunk import CHUNK_FRAMES, Chunk
from mffm.data.report import kind_of
from mffm.data.store import Store
from mffm.data.workers import Workers
from mffm.errors import InputError
from mffm.frame import Frame
from mffm.keys import ENERGY, Property

UNNAMED = "unnamed"  # the fidelity of a plain file whose keys name none
MIN_DISTANCE = 0.3  # Å, ingest's default
EXAMPLES = 20  # of rejected frames kept for the report, a kind
# A key that says which calculation or material a frame is of: frames with the same one belong into one split.
ID_NAME = re.compile(
    r"^(mptrj_traj|material|mp|task|traj(ectory)?|alexandria|oqmd|structure|system|compound|mol(ecule)?)_?id$"
)


@dataclass
class Rejected:
    """Frames that an ingest leaves out: how many for each kind of reason, and the first of each with their places."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def add(self, place: str, reason: str) -> None:
        kind = kind_of(reason)
        self.counts[kind] = self.counts.get(kind, 0) + 1
        shown = self.examples.setdefault(kind, [])
        if len(shown) < EXAMPLES:
            shown.append((place, reason))


class Item(NamedTuple):
    """A frame of a file, measured, and as it goes to the scratch file."""

    measured: Measured
    record: bytes  # length of the geometry's record, that record, the labels' record
    charge: int | None
    spin: int | None


class Settings(NamedTuple):
    """What a worker needs besides the chunk."""

    reader: str
    want: Wanted
    fidelities: tuple[str, ...]
    min_distance: float


def of_file(chunk: Chunk, settings: Settings) -> list[Item | str]:
    """Return the frames of a file's chunk, and the reasons of those that an ingest leaves out; runs in any process."""
    number = {f: k for k, f in enumerate(settings.fidelities)}
    items: list[Item | str] = []
    for frame in READERS[settings.reader].parse(chunk, settings.want).frames:
        fault = frame.reason if isinstance(frame, RejectedFrame) else frame_fault(frame, settings.min_distance)
        if fault or isinstance(frame, RejectedFrame):
            items.append(fault)
            continue
        geometry = records.pack_geometry(frame.atomic_numbers, frame.positions, frame.cell, frame.pbc, "")
        labels = records.pack_labels({(number[f], p): v for (f, p), v in frame.labels.items()}, frame.n_atoms)
        record = struct.pack("<q", len(geometry)) + geometry + labels
        items.append(Item(measure(frame, settings.fidelities), record, frame.charge, frame.spin_multiplicity))
    return items


def of_store(chunk: Chunk, settings: None) -> list[Measured]:
    """Return the rows of a store's chunk, measured; runs in any process."""
    del settings
    store = _store(chunk.path)
    return [measure(store.frame(row), store.fidelities.names) for row in range(chunk.first, chunk.first + chunk.n)]


@lru_cache(maxsize=4)
def _store(path: str) -> Store:
    return Store(path)


class StorePart:
    """A store, read in place; what its ingest rejected is in its ``rejected.jsonl``."""

    def __init__(self, path: Path):
        self.store = Store(path)
        self.n = self.store.n_frames
        self.fidelities: Sequence[str] = self.store.fidelities.names
        self.rejected = Rejected()
        self.notes: list[str] = []
        listed = path / "rejected.jsonl"
        if listed.is_file():
            with listed.open(encoding="utf-8") as file:
                for line in file:
                    entry = json.loads(line)
                    self.rejected.add(f"{entry['file']}:{entry['index']}", entry["reason"])

    def measured(self, workers: int) -> Iterator[Measured]:
        starts = range(0, self.n, CHUNK_FRAMES)
        chunks = (Chunk(str(self.store.path), s, min(CHUNK_FRAMES, self.n - s), 0, None) for s in starts)
        with Workers(workers) as run:
            for _, found in run.over_chunks(of_store, chunks, None):
                yield from found

    def frame(self, row: int) -> Frame:
        return self.store.frame(row)

    def place(self, row: int) -> str:
        return f"{self.store.path}: row {row} ({self.store.frame_id(row)})"

    def source(self, row: int) -> str:
        return self.store.source_names[int(self.store.source[row])]


class FilePart:
    """One file of a source. ``measured`` reads it, once; after that ``frame`` takes frames from the scratch file."""

    def __init__(self, path: Path, spec: SourceSpec, split_key: str | None, min_distance: float, name: str):
        self.path, self.spec, self.name = path, spec, name
        self.n = 0
        self.fidelities: Sequence[str] = list(spec.labels)
        self.rejected = Rejected()
        self.notes: list[str] = []
        want = wanted(spec, split_key)
        self._settings = Settings(reader_name(path, spec.reader), want, tuple(self.fidelities), min_distance)
        self._spool = tempfile.TemporaryFile(prefix="mffm-doctor-")  # noqa: SIM115 (closed with the part)
        self._start, self._index = array("q"), array("q")
        self._about: list[tuple[str, str, int | None, int | None]] = []  # group, split, charge, spin
        self._map: mmap.mmap | None = None

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
        self._spool.close()

    def measured(self, workers: int) -> Iterator[Measured]:
        at = 0
        known: dict[tuple[str, str, int | None, int | None], tuple[str, str, int | None, int | None]] = {}
        chunks = READERS[self._settings.reader].chunks(self.path, self._settings.want, 0, 0)
        with Workers(workers) as run:
            for chunk, items in run.over_chunks(of_file, chunks, self._settings):
                for index, item in enumerate(items, chunk.first):
                    if isinstance(item, str):
                        self.rejected.add(f"{self.path}:{index}", item)
                        continue
                    self._spool.write(item.record)
                    self._start.append(at)
                    self._index.append(index)
                    at += len(item.record)
                    about = (item.measured.group, item.measured.split, item.charge, item.spin)
                    self._about.append(known.setdefault(about, about))
                    self.n += 1
                    yield item.measured
        self._start.append(at)
        self._spool.flush()

    def frame(self, row: int) -> Frame:
        if self._map is None:
            self._map = mmap.mmap(self._spool.fileno(), 0, access=mmap.ACCESS_READ)
        content = self._map[self._start[row] : self._start[row + 1]]
        (length,) = struct.unpack_from("<q", content)
        numbers, positions, cell, pbc = records.unpack_geometry(content[8 : 8 + length])
        labels = records.unpack_all_labels(content[8 + length :])
        group, split, charge, spin = self._about[row]
        return Frame(
            numbers, positions, cell, pbc, {(self.fidelities[k], p): np.array(v) for (k, p), v in labels.items()},
            group=group, split=split, charge=charge, spin_multiplicity=spin,
        )  # fmt: skip

    def place(self, row: int) -> str:
        return f"{self.path}:{self._index[row]}"

    def source(self, row: int) -> str:
        del row
        return self.name


class Frames:
    """The frames of all inputs, one behind the other."""

    def __init__(self, parts: Sequence[StorePart | FilePart], id_keys: Mapping[str, str] | None = None):
        self.parts = list(parts)
        self.id_keys = dict(id_keys or {})  # source → key that its groups are values of
        self.fidelities = list(dict.fromkeys(f for part in self.parts for f in part.fidelities))
        self._ends: list[int] = []

    def __enter__(self) -> "Frames":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for part in self.parts:
            if isinstance(part, FilePart):
                part.close()

    @property
    def n(self) -> int:
        return sum(part.n for part in self.parts)

    def measured(self, workers: int = 1) -> Iterator[tuple[int, Measured, str, list[int]]]:
        """Yield (row, numbers, source, indices of its labels' fidelities); once, before a frame is asked for by row.

        Args:
            workers: processes that read and measure.
        """
        row = 0
        self._ends = []
        for part in self.parts:
            places = [self.fidelities.index(f) for f in part.fidelities]
            for local, found in enumerate(part.measured(workers)):
                yield row, found, part.source(local), places
                row += 1
            self._ends.append(row)

    def _find(self, row: int) -> tuple[StorePart | FilePart, int]:
        k = bisect_right(self._ends, row)
        return self.parts[k], row - (self._ends[k - 1] if k else 0)

    def frame(self, row: int) -> Frame:
        part, local = self._find(int(row))
        return part.frame(local)

    def place(self, row: int) -> str:
        part, local = self._find(int(row))
        return part.place(local)


def open_inputs(paths: Sequence[Path], keys: Mapping[Property, str] | None = None) -> Frames:
    """Open stores (folders), data YAMLs and files of structures.

    Args:
        keys: property → key of plain files, where the guess is not to be trusted; an energy key given is the only one.

    Raises:
        InputError: nothing there, or something that cannot be read.
    """
    parts: list[StorePart | FilePart] = []
    id_keys: dict[str, str] = {}
    for path in paths:
        if path.is_dir():
            parts.append(StorePart(path))
        elif path.suffix in (".yaml", ".yml"):
            parts += _of_yaml(path)
        else:
            part = _of_file(path, keys or {}, [p.name for p in parts if isinstance(p, FilePart)])
            if part.spec.group_key is not None:
                id_keys[part.name] = part.spec.group_key
            parts.append(part)
    return Frames(parts, id_keys)


def _of_yaml(path: Path) -> list[FilePart]:
    config = load(DataConfig, path, [])
    return [
        FilePart(file, source, config.splits.key, config.min_distance, source.name)
        for source in config.sources
        for file in source_files(source, path.parent)
    ]


def _of_file(path: Path, given: Mapping[Property, str], names: Sequence[str]) -> FilePart:
    found = read_keys(path)
    labels, notes, charge, spin = _labels(found, given)
    group = next((key for key in sorted(found.names) if ID_NAME.match(key)), None)
    name = str(path) if path.name in names else path.name
    spec = SourceSpec(
        name="file", path=str(path), licence="unknown", labels=labels, group_key=group, charge_key=charge,
        spin_multiplicity_key=spin,
    )  # fmt: skip
    part = FilePart(path, spec, "split" if "split" in found.names else None, MIN_DISTANCE, name)
    part.notes = notes
    return part


Labels = dict[str, dict[Property, LabelSpec | str]]


def _labels(found: Keys, given: Mapping[Property, str]) -> tuple[Labels, list[str], str | None, str | None]:
    """Return the labels of a plain file, a fidelity for each level that its energy keys name."""
    energies = sorted(k for k in found.numbers if ENERGY_NAME.search(k) and not NO_TOTAL_ENERGY.search(k))
    energies = [k for k in energies if "free" not in k.lower()] or energies
    if ENERGY in given:
        energies = [given[ENERGY]]
    labels: Labels = {}
    notes: list[str] = []
    charge = spin = None
    for key in energies:
        try:
            guessed = guess(found, {**given, ENERGY: key}, "-")
        except InputError as error:
            raise InputError(f"{error}; or describe the file in a data YAML and give that") from error
        labels.setdefault(level(key) or UNNAMED, dict(guessed.labels))
        charge, spin = guessed.charge_key, guessed.spin_multiplicity_key
        notes += guessed.notes if len(energies) == 1 else ()
    if not labels:
        notes.append("no key looks like a total energy: only its structures are examined (--energy KEY names one)")
        labels = {UNNAMED: {ENERGY: LabelSpec(key="energy")}}
    return labels, notes, charge, spin
