"""Part files: what a worker has read lies here until the writer of its shard takes it, so that no record goes through
the process that orders the frames.

Every process appends to files of its own, whose names are drawn at random: the frames of a store and their order do not
depend on them. What a killed process had appended and nobody committed is never looked at.
"""

import os
import secrets
import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from mffm.data import records
from mffm.errors import InputError

PART_BYTES = 1 << 28  # a part is closed beyond: few files, none of them huge
_MOST_OPEN = 128
EXTENT = struct.Struct("<QQI")


class Extent(NamedTuple):
    """Where a record lies."""

    part: int
    offset: int
    length: int


class _Writing:
    """The part that this process appends to."""

    def __init__(self, folder: Path):
        self.part = secrets.randbits(64)
        self.offset = 0
        self.file = part_path(folder, self.part).open("xb", buffering=0)
        records.fsync_folder(folder)


_writing: dict[tuple[int, Path], _Writing] = {}


def part_path(folder: Path, part: int) -> Path:
    return folder / f"{part:016x}.part"


def append(folder: Path, payloads: Sequence[bytes]) -> list[Extent]:
    """Append records to this process's part in ``folder``; every process may read them at once, ``sync`` makes them
    durable.
    """
    key = (os.getpid(), folder)
    writing = _writing.get(key)
    if writing is not None and writing.offset > PART_BYTES:
        writing.file.close()
        writing = None
    if writing is None:
        writing = _writing[key] = _Writing(folder)
    extents = []
    offset = writing.offset
    for payload in payloads:
        extents.append(Extent(writing.part, offset, len(payload)))
        offset += len(payload)
    content = memoryview(b"".join(payloads))
    while content:  # a disk that gets full takes less than it was given, then raises
        content = content[writing.file.write(content) :]
    writing.offset = offset
    return extents


def close(folder: Path) -> None:
    """Close this process's part in ``folder``."""
    writing = _writing.pop((os.getpid(), folder), None)
    if writing is not None:
        writing.file.close()


def sync(folder: Path, parts: Iterable[int]) -> None:
    """Make parts durable, whoever wrote them."""
    for part in sorted(parts):
        with part_path(folder, part).open("rb") as file:
            os.fsync(file.fileno())


class PartReader:
    """Reads records by extent; keeps a bounded number of files open. Use it as a context manager."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._open: OrderedDict[int, int] = OrderedDict()

    def __enter__(self) -> "PartReader":
        return self

    def __exit__(self, *exception: object) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def get(self, part: int, offset: int, length: int) -> bytes:
        """Return a record.

        Raises:
            InputError: the part is missing or shorter than it was.
        """
        descriptor = self._open.get(part)
        if descriptor is None:
            if len(self._open) >= _MOST_OPEN:
                os.close(self._open.popitem(last=False)[1])
            try:
                descriptor = os.open(part_path(self.folder, part), os.O_RDONLY)
            except FileNotFoundError as error:
                raise self._damaged(part, "the file is missing") from error
            self._open[part] = descriptor
        content = os.pread(descriptor, length, offset)
        if len(content) != length:
            raise self._damaged(part, f"it ends before byte {offset + length}")
        return content

    def _damaged(self, part: int, what: str) -> InputError:
        store = self.folder.parent.parent
        return InputError(f"{part_path(self.folder, part)}: damaged ({what}); delete {store} and ingest again")
