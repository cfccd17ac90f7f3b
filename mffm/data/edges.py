"""Edge counts: a sidecar of the store per cutoff, computed by an explicit command, never inside a training job."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from mffm.data import records, statistics
from mffm.data.store import Store, edge_folders
from mffm.data.workers import Workers
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
    with records.disk_errors_explained(folder):
        counts = _counts(store, blocks, cutoff, workers)
        return write_edges(folder, cutoff, store.n_frames, counts, store.n_atoms, store.geometry_fingerprint)


def write_edges(
    folder: Path,
    cutoff: float,
    n_frames: int,
    counts: Iterable[np.ndarray],
    n_atoms: np.ndarray,
    geometry_fingerprint: str,
) -> Path:
    """Write edge counts, row by row, as a sidecar with their histogram; return the file.

    Args:
        folder: of the sidecars.
        cutoff: Å.
        n_frames: of the store.
        counts: directed edges of consecutive rows, block by block.
        n_atoms: [n_frames].
        geometry_fingerprint: of the store.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"cutoff-{cutoff:g}.npy"
    temporary = folder / f"cutoff-{cutoff:g}.tmp.npy"
    column = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.dtype("<i4"), shape=(n_frames,))
    digest = hashlib.sha256()
    per_atom: dict[str, int] = {}
    first = total = 0
    for block in counts:
        values = np.ascontiguousarray(block, "<i4")
        column[first : first + len(values)] = values
        digest.update(values.data)
        total += int(values.sum(dtype=np.int64))
        statistics.add_histogram(
            per_atom, statistics.histogram(np.rint(values / n_atoms[first : first + len(values)]).astype(np.int64))
        )
        first += len(values)
    assert first == n_frames
    column.flush()
    del column
    records.publish(temporary, path)
    records.write_json(
        path.with_suffix(".json"),
        {
            "cutoff": cutoff,
            "n_edges": total,
            "neighbors_per_atom": dict(sorted(per_atom.items(), key=lambda item: int(item[0]))),
            "sha256": digest.hexdigest(),
            "geometry_fingerprint": geometry_fingerprint,
        },
    )
    return path


def _counts(store: Store, blocks: list[tuple[int, int]], cutoff: float, workers: int) -> Iterator[np.ndarray]:
    with Workers(min(workers, len(blocks))) as pool:
        for _, counts in pool.in_order((None, _count, (store, first, last, cutoff)) for first, last in blocks):
            yield counts


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
