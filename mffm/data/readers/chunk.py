"""What a reader hands from the process that reads to the processes that parse."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mffm.data.readers.convert import RejectedFrame, Wanted
from mffm.frame import Frame

# Frames handed over at a time: large enough that handing over costs nothing, small enough for any memory.
CHUNK_FRAMES = 256


class Chunk(NamedTuple):
    """Some frames of a file, not parsed yet.

    ``first`` is the index of the first one in its file; reading goes on at ``next_position`` with frame ``first + n``.
    """

    path: str
    first: int
    n: int
    next_position: int
    payload: Any


class Parsed(NamedTuple):
    """Frames in the file's order, and the names of all values that the file was seen to have."""

    frames: list[Frame | RejectedFrame]
    keys: set[str]


def no_companions(path: Path) -> list[Path]:
    del path
    return []


class Reader(NamedTuple):
    """How a format is read: ``chunks(path, want, start, first)`` in one process, ``parse(chunk, want)`` in any.

    ``companions(path)`` are the files besides the one named that frames depend on.
    """

    chunks: Callable[[Path, Wanted, int, int], Iterator[Chunk]]
    parse: Callable[[Chunk, Wanted], Parsed]
    companions: Callable[[Path], list[Path]] = no_companions
