"""Edge counts: a sidecar of the store per cutoff, computed by an explicit command, never inside a training job."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from mffm.data import records
from mffm.data.store import Store, edge_folders
from mffm.errors import InputError

_BLOCK = 2000  # rows a task: a second of work for crystals


def _count(store: Store, first: int, last: int, cutoff: float) -> np.ndarray:
    from mffm.data.neighbors import count

    counts = np.empty(last - first, np.int32)
    for i, row in enumerate(range(first, last)):
        _, positions, cell, pbc = store.geometry(row)
        counts[i] = count(positions, cell, pbc, cutoff)
    return counts


def count_edges(store_path: str | Path, cutoff: float, workers: int = 1) -> Path:
    """Count the directed edges of every frame within ``cutoff`` Å; return the file.

    It is written into the store, or into ``$MFFM_CACHE`` where the store cannot be written.

    Raises:
        InputError: neither can be written, or the cutoff is not positive.
    """
    if not cutoff > 0:
        raise InputError(f"cutoff {cutoff:g} Å: expected a positive number")
    store = Store(store_path)
    folder = _writable_folder(store)
    blocks = [(first, min(first + _BLOCK, store.n_frames)) for first in range(0, store.n_frames, _BLOCK)]
    path = folder / f"cutoff-{cutoff:g}.npy"
    temporary = folder / f"cutoff-{cutoff:g}.tmp.npy"
    try:
        column = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.dtype("<i4"), shape=(store.n_frames,))
        for (first, last), counts in zip(blocks, _counts(store, blocks, cutoff, workers), strict=True):
            column[first:last] = counts
        column.flush()
        total = int(column.sum(dtype=np.int64))
        digest = hashlib.sha256(column.tobytes()).hexdigest()
        del column
        records.publish(temporary, path)
        records.write_json(
            path.with_suffix(".json"),
            {
                "cutoff": cutoff,
                "n_edges": total,
                "sha256": digest,
                "geometry_fingerprint": store.geometry_fingerprint,
            },
        )
    except OSError as error:
        explained = records.disk_error(error, path)
        if explained is None:
            raise
        raise explained from error
    return path


def _counts(store: Store, blocks: list[tuple[int, int]], cutoff: float, workers: int) -> Iterator[np.ndarray]:
    if workers <= 1 or len(blocks) == 1:
        for first, last in blocks:
            yield _count(store, first, last, cutoff)
        return
    with ProcessPoolExecutor(min(workers, len(blocks)), mp_context=get_context("spawn")) as pool:
        yield from pool.map(
            _count, [store] * len(blocks), [b[0] for b in blocks], [b[1] for b in blocks], [cutoff] * len(blocks)
        )


def _writable_folder(store: Store) -> Path:
    for folder in edge_folders(store.path, store.geometry_fingerprint):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise InputError(
        f"{store.path}: cannot be written; set MFFM_CACHE to a folder that can, here and where the store is read"
    )
