"""Frames of a store that a file names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mffm.data.identity import digest16
from mffm.data.readers.ase import structures_of
from mffm.errors import InputError

if TYPE_CHECKING:
    from mffm.data.store import Store

_BLOCK = 1 << 19  # hashes at a time
_EXPECTED = "expected frame ids, one a line (.txt), or structures with a frame_id"


def rows_in(store: Store, file: Path) -> np.ndarray:
    """Return the rows of a store (int64, ascending) that a file names.

    Args:
        file: frame ids, one a line, where it ends in .txt; else structures with a ``frame_id``, as of ``mffm select``.

    Raises:
        InputError: no such file, nothing in it, a structure without a frame_id, or one that the store has not.
    """
    if not file.is_file():
        raise InputError(f"{file}: no such file; {_EXPECTED}")
    if file.suffix == ".txt":
        ids = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    else:
        try:
            given = [atoms.info.get("frame_id") for atoms in structures_of(file)]
        except InputError as error:
            raise InputError(f"{error}; {_EXPECTED}") from error
        if None in given:
            raise InputError(
                f"{file}: frame {given.index(None)}: has no frame_id; choose from this store: mffm select RELEASE "
                f"{store.path}"
            )
        ids = list(map(str, given))
    if not ids:
        raise InputError(f"{file}: names no frame; {_EXPECTED}")
    try:
        return rows_named(store, ids)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def rows_named(store: Store, ids: Sequence[str]) -> np.ndarray:
    """Return the rows of frame ids, ascending; one that is given twice counts once.

    Raises:
        InputError: an id that does not exist.
    """
    if not ids:
        return np.zeros(0, np.int64)
    wanted = np.array(sorted(set(ids)))
    keys = np.frombuffer(b"".join(digest16(name) for name in wanted.tolist()), "<u8").reshape(-1, 2)
    order = np.argsort(keys[:, 0], kind="stable")
    first = keys[order, 0]
    rows = np.full(len(wanted), -1, np.int64)
    for start in range(0, store.n_frames, _BLOCK):
        hashes = np.asarray(store.frame_hash[start : start + _BLOCK])
        at = np.minimum(np.searchsorted(first, hashes[:, 0]), len(first) - 1)
        same = (keys[order[at]] == hashes).all(axis=1)
        rows[order[at[same]]] = start + np.flatnonzero(same)
    if (rows < 0).any():
        absent = wanted[rows < 0]
        raise InputError(
            f"{store.path}: no frame has the id {str(absent[0])!r}, as {len(absent)} of {len(wanted)} ids; "
            f"ids look like {store.frame_id(0)!r}"
        )
    return np.sort(rows)
