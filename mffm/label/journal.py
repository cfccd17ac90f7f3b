"""What was computed: append-only files of records, one writer each. A cut-off or damaged end is ignored by readers.

Record, little-endian::

    "MFLJ" | length of JSON u32 | length of labels u32 | CRC32 of both u32 | JSON | energy f8, forces 3n×f8, stress 9×f8

Labels are those that ``has`` in the JSON names, in this order. Forces stay float64; the store rounds them.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mffm.errors import InputError
from mffm.keys import ENERGY, FORCES, PROPERTIES, STRESS, Property
from mffm.label.level import Label

HEADER = struct.Struct("<4sIII")
MAGIC = b"MFLJ"
OPEN_FILES = 200
SYNC_SECONDS = 1.0  # a kill loses nothing that was written; a power cut at most this


@dataclass(frozen=True)
class Limits:
    """Limits of one structure; None: none."""

    seconds: float | None = None
    gigabytes: float | None = None


@dataclass(frozen=True)
class Record:
    """One attempt to label one structure.

    Attributes:
        index: of the structure in its source.
        error_class: of `mffm.label.level.ERROR_CLASSES`; empty where there is a label.
        cpu_ns, wall_ns: of the calculation; CPU time is not known of a worker that died.
        info: what the level tells besides: ``t1_diagnostic``, ``repeated``, ``kmesh``.
        limit: ``seconds`` or ``gigabytes`` that a ``resource`` failure ran into.
    """

    index: int
    frame_id: str
    attempt: int
    status: str
    error_class: str = ""
    error: str = ""
    cpu_ns: int | None = None
    wall_ns: int = 0
    converged: bool | None = None
    info: dict[str, Any] = field(default_factory=dict)
    limit: dict[str, float] = field(default_factory=dict)

    @property
    def is_label(self) -> bool:
        return self.status == "ok"

    def is_final(self, limits: Limits, most_attempts: int) -> bool:
        """Return whether another attempt would say the same: not for a crash, nor for a limit that is now higher."""
        if self.is_label or self.error_class in ("input", "convergence"):
            return True
        if self.error_class == "resource":
            now = {"seconds": limits.seconds, "gigabytes": limits.gigabytes}
            raised = [now[name] is None or now[name] > was for name, was in self.limit.items()]  # type: ignore[operator]
            return not (raised and all(raised)) and (bool(self.limit) or self.attempt >= most_attempts)
        return self.attempt >= most_attempts


def pack(record: Record, label: Label | None) -> bytes:
    """Return a record as it is written."""
    values: dict[Property, Any] = {}
    if label is not None:
        values = {ENERGY: label.energy, FORCES: label.forces, STRESS: label.stress}
    has = [prop for prop in PROPERTIES if values.get(prop) is not None]
    data = b"".join(np.ascontiguousarray(values[prop], "<f8").tobytes() for prop in has)
    text = json.dumps({**asdict(record), "has": has}).encode()
    return HEADER.pack(MAGIC, len(text), len(data), zlib.crc32(text + data)) + text + data


class Journal:
    """A journal file that one process appends to.

    Raises:
        OSError: a full disk; what was appended before stays whole.
    """

    def __init__(self, folder: Path, name: str):
        folder.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(folder / f"{name}.journal", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._size = 0

    def append(self, record: Record, label: Label | None) -> None:
        """Write one record."""
        data = pack(record, label)
        written = 0
        try:
            while written < len(data):
                written += os.write(self._fd, data[written:])
        except OSError:
            os.ftruncate(self._fd, self._size)
            os.lseek(self._fd, self._size, os.SEEK_SET)
            raise
        self._size += written

    def sync(self) -> None:
        """Wait until all is on the disk."""
        os.fsync(self._fd)

    def close(self) -> None:
        self.sync()
        os.close(self._fd)


def read(path: Path) -> Iterator[tuple[Record, dict[Property, np.ndarray], int]]:
    """Yield (record, labels, offset) of the whole records of a journal, up to the first that is cut off or damaged."""
    with path.open("rb") as file:
        offset = 0
        while found := _next(file):
            record, labels, size = found
            yield record, labels, offset
            offset += size


def _next(file: BinaryIO) -> tuple[Record, dict[Property, np.ndarray], int] | None:
    head = file.read(HEADER.size)
    if len(head) < HEADER.size:
        return None
    magic, n_text, n_data, crc = HEADER.unpack(head)
    if magic != MAGIC:
        return None
    content = file.read(n_text + n_data)
    if len(content) < n_text + n_data or zlib.crc32(content) != crc:
        return None
    fields = json.loads(content[:n_text])
    has = fields.pop("has")
    values = np.frombuffer(content[n_text:], "<f8")
    labels: dict[Property, np.ndarray] = {}
    start = 0
    rest = len(values) - sum({ENERGY: 1, STRESS: 9}.get(prop, 0) for prop in has)  # of the forces
    for prop in has:
        size, shape = {ENERGY: (1, ()), FORCES: (rest, (-1, 3)), STRESS: (9, (3, 3))}[prop]
        labels[prop] = values[start : start + size].reshape(shape)
        start += size
    return Record(**fields), labels, HEADER.size + n_text + n_data


class Ledger:
    """What counts of every structure: where its label is, or its newest failure.

    Attributes:
        file, offset: [n] of each structure's label among ``paths``; file -1 where there is none.
        failures: structure → newest failure, of those without a label.
    """

    def __init__(self, paths: Sequence[Path], n: int):
        self.paths = list(paths)
        self.file, self.offset = np.full(n, -1, np.int32), np.zeros(n, np.int64)
        self.failures: dict[int, Record] = {}
        for k, path in enumerate(self.paths):
            for record, _, offset in read(path):
                self._add(record, k, offset)

    def _add(self, record: Record, file: int, offset: int) -> None:
        index = record.index
        if record.is_label:
            self.file[index], self.offset[index] = file, offset
            self.failures.pop(index, None)
        elif self.file[index] < 0:
            old = self.failures.get(index)
            if old is None or record.attempt >= old.attempt:
                self.failures[index] = record

    @property
    def labelled(self) -> np.ndarray:
        """Return the structures that have a label, ascending."""
        return np.flatnonzero(self.file >= 0)

    def labels(self, indices: Iterable[int]) -> Iterator[tuple[Record, dict[Property, np.ndarray]]]:
        """Yield record and labels of structures that have one."""
        with ExitStack() as stack:
            files: dict[int, BinaryIO] = {}
            for index in indices:
                k = int(self.file[index])
                if k not in files:
                    if len(files) == OPEN_FILES:
                        stack.close()
                        files.clear()
                    files[k] = stack.enter_context(self.paths[k].open("rb"))
                files[k].seek(int(self.offset[index]))
                found = _next(files[k])
                if found is None:
                    raise InputError(f"{self.paths[k]}: damaged at byte {self.offset[index]}; give the command again")
                yield found[0], found[1]
