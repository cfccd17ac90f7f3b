"""Extended XYZ, read as a stream: ``n``, a line of ``key=value``, n lines of columns as ``Properties`` says.

Only the columns and keys that are asked for become numbers, which makes it about an order of magnitude faster than
ASE's reader (`tools/bench_store.py` measures both). A file may be packed with gzip, bzip2 or xz.
"""

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers

from mffm.data.readers import plain
from mffm.data.readers.chunk import CHUNK_FRAMES, Chunk, Parsed
from mffm.data.readers.convert import BadFrameError, RejectedFrame, Wanted, build
from mffm.errors import InputError

# key=value, where a value is "…" or '…' (\" inside), {…}, […] with nesting left to the value, or a word; or a bare key.
_PAIR = re.compile(
    r"""(?P<key>"(?:\\.|[^"\\])*"|[^\s=]+)                     # key
        (?:\s*=\s*(?:"(?P<double>(?:\\.|[^"\\])*)"
                 |'(?P<single>(?:\\.|[^'\\])*)'
                 |\{(?P<brace>[^}]*)\}
                 |(?P<bracket>\[(?:[^\[\]]|\[(?:[^\[\]]|\[[^\[\]]*\])*\])*\])
                 |(?P<word>[^\s]*)))?""",
    re.VERBOSE,
)
_PROPERTIES = re.compile(r"^(?:[^:]+:[RILS]:\d+)(?::[^:]+:[RILS]:\d+)*$")
_MOST_ATOMS = 10_000_000  # of a frame; more is damage, and would be read into memory before it is noticed
_TRUE = {"T", "True", "TRUE", "true", "1"}
_FALSE = {"F", "False", "FALSE", "false", "0"}
_columns_known: dict[str, dict[str, tuple[int, int]]] = {}


def parse_comment(line: str) -> dict[str, str]:
    """Return the ``key=value`` pairs of a comment line as text; a bare key is "T"."""
    info: dict[str, str] = {}
    for match in _PAIR.finditer(line):
        key, double, single, brace, bracket, word = match.groups()
        if key[0] == '"':
            key = key[1:-1]
        value = "T"
        if double is not None:
            value = double.replace('\\"', '"').replace("\\\\", "\\") if "\\" in double else double
        else:
            for found in (single, brace, bracket, word):
                if found is not None:
                    value = found
                    break
        info[key] = value
    return info


def columns(properties: str) -> dict[str, tuple[int, int]]:
    """Return ``name → (first column, number of columns)`` of a Properties value."""
    found = _columns_known.get(properties)
    if found is None:
        if not _PROPERTIES.match(properties):
            raise BadFrameError(f"Properties={properties!r} is not name:type:count:…")
        parts = properties.split(":")
        found, start = {}, 0
        for name, count in zip(parts[0::3], parts[2::3], strict=True):
            found[name] = (start, int(count))
            start += int(count)
        found[""] = (0, start)
        _columns_known[properties] = found
    return found


def _pbc(text: str | None, has_cell: bool) -> np.ndarray:
    if text is None:
        return np.full(3, has_cell)
    words = text.removeprefix("_JSON").replace("[", " ").replace("]", " ").replace(",", " ").split()
    if len(words) == 1:
        words = words * 3
    if len(words) != 3 or any(w not in _TRUE and w not in _FALSE for w in words):
        raise BadFrameError(f"pbc={text!r}: expected three of T and F")
    return np.array([w in _TRUE for w in words])


def _numbers(species: list[bytes]) -> list[int]:
    numbers = []
    for word in species:
        symbol = word.decode("ascii", "replace")
        z = atomic_numbers.get(symbol)
        if z is None:
            if not symbol.isdigit():
                raise BadFrameError(f"element {symbol!r} is outside the table 1..118")
            z = int(symbol)
        numbers.append(z)
    return numbers


def _array(tokens: list[bytes], width: int, place: tuple[int, int], name: str) -> np.ndarray:
    start, count = place
    try:
        array = np.array([list(map(float, tokens[start + c :: width])) for c in range(count)])
    except ValueError as error:
        raise BadFrameError(f"column {name!r}: {error}") from error
    return array.T


def parse_frame(n: int, comment: bytes, block: bytes, want: Wanted, file: str, index: int, keys: set[str]) -> Any:
    """Return the ``Frame`` or ``RejectedFrame`` of one frame's text; ``keys`` collects the names that the file has."""
    try:
        info = parse_comment(comment.decode("utf-8", "replace"))
        place = columns(info.pop("Properties", "") or info.pop("properties", "") or "species:S:1:pos:R:3")
        keys.update(info)
        keys.update(place)
        tokens = block.split()
        width = place[""][1]
        if len(tokens) != n * width:
            raise BadFrameError(
                f"{n} atoms with {width} columns are {n * width} values, found {len(tokens)}: "
                "a line is cut short or too long"
            )
        if "pos" not in place:
            raise BadFrameError("Properties has no 'pos'")
        kind = next((k for k in ("species", "Z", "numbers", "atomic_numbers") if k in place), None)
        if kind is None:
            raise BadFrameError("Properties has no 'species'")
        numbers = np.array(_numbers(tokens[place[kind][0] :: width]), np.int64)
        arrays = {name: _array(tokens, width, place[name], name) for name in want.array_keys if name in place}
        positions = _array(tokens, width, place["pos"], "pos")
        lattice = info.get("Lattice", info.get("lattice"))
        cell = None
        if lattice is not None:
            values = [float(x) for x in lattice.replace(",", " ").replace("[", " ").replace("]", " ").split()]
            if len(values) != 9:
                raise BadFrameError(f"Lattice has {len(values)} numbers, expected 9")
            cell = np.array(values).reshape(3, 3)
        pbc = _pbc(info.get("pbc"), cell is not None)
    except BadFrameError as error:
        return RejectedFrame(file, index, str(error), want.source)
    except ValueError as error:
        return RejectedFrame(file, index, f"not readable: {error}", want.source)
    return build(numbers, positions, cell, pbc, info, arrays, want, file, index)


def chunks(path: Path, want: Wanted, start: int = 0, first: int = 0) -> Iterator[Chunk]:
    """Yield the text of ``CHUNK_FRAMES`` frames at a time.

    Args:
        start: byte at which to go on, ``first``: index of the frame there (both from an earlier chunk).
    """
    del want
    index = first
    with plain.open_binary(path) as file:
        try:
            if start:
                file.seek(start)
            frames: list[tuple[int, bytes, bytes]] = []
            while True:
                line = file.readline()
                if not line:
                    break
                if not line.strip():  # blank lines between frames or at the end
                    continue
                try:
                    n = int(line)
                except ValueError as error:
                    shown = line[:60].decode("utf-8", "replace").strip()
                    raise InputError(
                        f"{path}: frame {index + len(frames)}: expected the number of atoms, found {shown!r}; "
                        "not an (extended) XYZ file, or the frame before it has a wrong count"
                    ) from error
                if not 0 <= n <= _MOST_ATOMS:
                    raise InputError(
                        f"{path}: frame {index + len(frames)}: {n} atoms; expected a number from 0 to {_MOST_ATOMS:,}; "
                        "not an (extended) XYZ file, or the frame before it has a wrong count"
                    )
                comment = file.readline()
                frames.append((n, comment, b"".join(islice(file, n))))
                if len(frames) == CHUNK_FRAMES:
                    yield Chunk(str(path), index, len(frames), file.tell(), frames)
                    index += len(frames)
                    frames = []
            if frames:
                yield Chunk(str(path), index, len(frames), file.tell(), frames)
        except plain.DAMAGED as error:
            raise InputError(f"{path}: cannot be read beyond frame {index} ({error})") from error


def parse(chunk: Chunk, want: Wanted) -> Parsed:
    """Return the frames of a chunk."""
    keys: set[str] = set()
    frames = [
        parse_frame(n, comment, block, want, chunk.path, chunk.first + i, keys)
        for i, (n, comment, block) in enumerate(chunk.payload)
    ]
    keys.discard("")
    return Parsed(frames, keys)
