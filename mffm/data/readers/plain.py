"""What readers of binary and nested formats hand over: frames as plain arrays and mappings, cheap to send to another
process, or the reason why one cannot be read.
"""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mffm.data.readers.chunk import CHUNK_FRAMES, Chunk, Parsed
from mffm.data.readers.convert import RejectedFrame, Wanted, build
from mffm.errors import InputError
from mffm.frame import Frame


class Plain(NamedTuple):
    """A frame before any conversion.

    Attributes:
        numbers: [n] int. positions: [n, 3]. cell: [3, 3] rows, zeros or None where there is none. pbc: [3].
        info: values of the frame; None for one that is there and was not asked for. arrays: values per atom.
    """

    numbers: Any
    positions: Any
    cell: Any
    pbc: Any
    info: dict[str, Any]
    arrays: dict[str, Any]


class Unreadable(NamedTuple):
    """A frame that is there and cannot be read; it is reported as rejected."""

    reason: str


def chunked(path: Path, frames: Iterator[Plain | Unreadable], start: int) -> Iterator[Chunk]:
    """Yield frames some at a time, passing over the first ``start`` (formats have no common seek)."""
    frames = islice(frames, start, None)
    index = start
    while batch := list(islice(frames, CHUNK_FRAMES)):
        yield Chunk(str(path), index, len(batch), index + len(batch), batch)
        index += len(batch)


def parse(chunk: Chunk, want: Wanted) -> Parsed:
    """Return the frames of a chunk of plain ones."""
    keys: set[str] = set()
    frames: list[Frame | RejectedFrame] = []
    for index, item in enumerate(chunk.payload, chunk.first):
        if isinstance(item, Unreadable):
            frames.append(RejectedFrame(chunk.path, index, item.reason, want.source))
            continue
        keys.update(item.info)
        keys.update(item.arrays)
        cell = item.cell if item.cell is not None and np.any(item.cell) else None
        frames.append(
            build(item.numbers, item.positions, cell, item.pbc, item.info, item.arrays, want, chunk.path, index)
        )
    return Parsed(frames, keys)


def open_binary(path: Path) -> BinaryIO:
    """Open a file for reading; gzip, bzip2 and xz by the ending.

    Raises:
        InputError: it cannot be opened.
    """
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        return opener(path, "rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


# What damage of a compressed file raises while it is read.
DAMAGED = (OSError, EOFError, lzma.LZMAError, zlib.error)
