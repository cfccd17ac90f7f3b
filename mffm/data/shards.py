"""The writers of shards: each shard is made by one call, in any process, from the part files."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mffm.data import records, statistics
from mffm.data.parts import PartReader
from mffm.keys import ENERGY

Entry = dict[str, Any]  # of a shard in the manifest; its statistics are taken out before

# One staged structure: what the index keeps of it, where its record lies, edges per cutoff that is counted.
_HEAD = [
    ("split", "u1"),
    ("source", "<i2"),
    ("group", "<i4"),
    ("charge", "<i2"),
    ("spin", "<i2"),
    ("weight", "<f4"),
    ("frame_hash", "<u8", (2,)),
    ("geometry_hash", "<u8", (2,)),
]
_EXTENT = [("part", "<u8"), ("offset", "<u8"), ("length", "<u4")]
STAGED_LABELS = np.dtype([("row", "<i8"), *_EXTENT])


def staged_structure(n_cutoffs: int) -> np.dtype:
    """Return the dtype of a staged structure."""
    return np.dtype([*_HEAD, *_EXTENT, ("edges", "<i4", (n_cutoffs,))])


def write_geometry_shard(folder: Path, number: int, first: int, staged: bytes, cutoffs: Sequence[float]) -> Entry:
    """Write one geometry shard of a store, and beside it its columns of the index.

    Args:
        folder: of the store.
        number: of the shard.
        first: row of the first structure.
        staged: ``staged_structure(len(cutoffs))`` of every structure.
        cutoffs: Å, that edges were counted for.
    """
    table = np.frombuffer(staged, staged_structure(len(cutoffs)))
    columns = {name: np.ascontiguousarray(table[name]) for name in (str(field[0]) for field in _HEAD)}
    with PartReader(folder / "staging" / "parts") as parts:
        geometry = (parts.get(*extent) for extent in _extents(table))
        entry = geometry_shard(folder / "geometry" / f"{number:05d}.lmdb", first, geometry, columns)
    columns["shard"] = np.full(len(table), number, np.int32)
    for k, cutoff in enumerate(cutoffs):
        columns[edge_column(cutoff)] = np.ascontiguousarray(table["edges"][:, k])
    save_columns(folder / "staging" / f"geometry-{number:05d}.npz", columns)
    return entry


def edge_column(cutoff: float) -> str:
    return f"edges-{cutoff:g}"


def _extents(table: np.ndarray) -> Iterable[tuple[int, int, int]]:
    return zip(*(table[name].tolist() for name in ("part", "offset", "length")), strict=True)


def geometry_shard(path: Path, first: int, geometry: Iterable[bytes], columns: dict[str, np.ndarray]) -> Entry:
    """Write geometry records as one shard; add the columns that follow from them, give the entry with statistics."""
    sizes: list[tuple[int, int]] = []
    elements: list[np.ndarray] = []
    counts: list[np.ndarray] = []

    def watched() -> Iterator[tuple[int, bytes]]:
        for row, record in enumerate(geometry, first):
            histogram = np.bincount(records.unpack_geometry(record)[0])
            present = np.flatnonzero(histogram)
            elements.append(present.astype(np.uint8))
            counts.append(histogram[present].astype(np.int32))
            sizes.append((len(present), int.from_bytes(record[:4], "little")))
            yield row, record

    entry = records.write_shard(path, watched())
    columns["n_elements"] = np.array([a for a, _ in sizes], np.int64)
    columns["n_atoms"] = np.array([b for _, b in sizes], np.int32)
    columns["element"] = np.concatenate(elements)
    columns["element_count"] = np.concatenate(counts)
    entry["statistics"] = statistics.of_geometry(columns["n_atoms"], columns["element"])
    return entry


def write_label_shard(
    folder: Path, staging: Path, layer: int, number: int, staged: bytes, name: str, fidelities: Sequence[str]
) -> Entry:
    """Write one label shard of a store, and its columns into the working folder.

    Args:
        folder: of the store.
        staging: its working folder.
        layer: index of the layer, ``name`` its name.
        number: of the shard in the layer.
        staged: ``STAGED_LABELS`` of every row.
        fidelities: of the layer.
    """
    table = np.frombuffer(staged, STAGED_LABELS)
    with PartReader(staging / "parts") as parts:
        pairs = ((row, parts.get(*x)) for row, x in zip(table["row"].tolist(), _extents(table), strict=True))
        entry, columns = label_shard(folder / "layers" / name / label_file(number), pairs, fidelities)
    save_columns(staging / f"layer-{layer}-{number:05d}.npz", columns)
    return entry


def label_file(number: int) -> str:
    return f"labels-{number:05d}.lmdb"


def label_shard(
    path: Path, pairs: Iterable[tuple[int, bytes]], fidelities: Sequence[str]
) -> tuple[Entry, dict[str, np.ndarray]]:
    """Write (row, label record) pairs, rows ascending, as one shard; return its entry with statistics, its columns."""
    energy_bits = [1 << records.bit(f, ENERGY) for f in range(len(fidelities))]
    rows: list[int] = []
    present: list[int] = []
    energies: list[bytes] = []
    seen = statistics.LabelStatistics(len(fidelities))

    def watched() -> Iterator[tuple[int, bytes]]:
        for row, record in pairs:
            mask = records.LABEL_HEADER.unpack_from(record)[2]
            rows.append(row)
            present.append(mask)
            energies.append(record[records.LABEL_HEADER.size :][: 8 * sum(bool(mask & b) for b in energy_bits)])
            seen.add(record)
            yield row, record

    entry = records.write_shard(path, watched())
    entry["first_row"], entry["last_row"] = rows[0], rows[-1]
    entry["statistics"] = seen.result(fidelities)
    masks = np.array(present, np.uint64)
    energy = np.full((len(rows), len(fidelities)), np.nan)
    has = (masks[:, None] & np.array(energy_bits, np.uint64)) != 0
    energy[has] = np.frombuffer(b"".join(energies), "<f8")
    return entry, {"rows": np.array(rows, np.int64), "present": masks, "energy": np.ascontiguousarray(energy.T)}


def save_columns(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Write columns of one shard, aside first."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp.npz")
    np.savez(temporary, **columns)  # type: ignore[arg-type]
    records.publish(temporary, path)
