"""The end of an ingest: label layers, the index, the manifest. Deterministic, so that it may be done again after a
kill.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from mffm.config.data import DataConfig
from mffm.data import records
from mffm.data.records import SCHEMA_VERSION
from mffm.data.staging import Staging
from mffm.data.store import COLUMNS, ELEMENT_COLUMNS, combined_fingerprint
from mffm.fidelity import FidelityTable
from mffm.keys import ENERGY, PROPERTIES

_DTYPES = {
    "n_atoms": "<i4",
    "shard": "<i4",
    "frame_hash": "<u8",
    "geometry_hash": "<u8",
    "split": "|u1",
    "group": "<i4",
    "source": "<i2",
    "charge": "<i2",
    "spin": "<i2",
    "weight": "<f4",
    "element_start": "<i8",
    "element": "|u1",
    "element_count": "<i4",
}


def finish(staging: Staging, config: DataConfig, fidelities: FidelityTable) -> None:
    """Write what remains of a store whose sources were all read; the manifest, which makes it a store, comes last."""
    state = staging.state
    folder = staging.folder
    while (
        staging.n_flushed() < state["n_rows"]
    ):  # several where the run was stopped between the last commit and its shards
        staging.flush_shard()
    layers = []
    for k, source in enumerate(config.sources):
        if state["layer_rows"][k]:
            layers.append(_layer(staging, k, source.name, source.name))
    index = _index(staging, folder / "index")
    groups = staging.group_names()
    records.write_json(folder / "groups.json", groups)
    _rejected(staging, folder / "rejected.jsonl")
    geometry_fingerprint = hashlib.sha256(
        json.dumps(
            [
                SCHEMA_VERSION,
                [entry["content"] for entry in state["geometry"]],
                {name: digest for name, digest in index.items() if name != "shard.npy"},
                state["split_names"],
                groups if len(groups) < 10_000 else records.file_sha256(folder / "groups.json"),
            ],
            sort_keys=True,
        ).encode()
    ).hexdigest()
    records.write_json(
        folder / "manifest.json",
        {
            "schema_version": SCHEMA_VERSION,
            "name": folder.name,
            "n_frames": state["n_rows"],
            "shard_frames": staging.shard_frames,
            "fidelities": fidelities.to_list(),
            "sources": [{"name": s.name, "licence": s.licence, "citation": s.citation} for s in config.sources],
            "splits": state["split_names"],
            "groups": "groups.json",
            "geometry": state["geometry"],
            "index": index,
            "layers": layers,
            "geometry_fingerprint": geometry_fingerprint,
            "fingerprint": combined_fingerprint(geometry_fingerprint, [(x["name"], x["fingerprint"]) for x in layers]),
            "config_hash": state["config_hash"],
        },
    )


def _rejected(staging: Staging, path: Path) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in staging.rejected())
    records.publish(temporary, path)


def _index(staging: Staging, folder: Path) -> dict[str, str]:
    """Put the columns of all shards one behind the other; return the files' hashes."""
    folder.mkdir(exist_ok=True)
    parts = [staging.folder / "staging" / f"geometry-{k:05d}.npz" for k in range(len(staging.state["geometry"]))]
    n = staging.state["n_rows"]
    n_entries = sum(int(np.load(part)["n_elements"].sum()) for part in parts)
    hashes = {}
    for name in COLUMNS + ELEMENT_COLUMNS:
        length = n + 1 if name == "element_start" else n_entries if name.startswith("element") else n
        shape = (length, 2) if name.endswith("_hash") else (length,)
        path = folder / f"{name}.npy"
        temporary = folder / f"{name}.tmp.npy"
        column = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.dtype(_DTYPES[name]), shape=shape)
        at = total = 0
        for part in parts:
            with np.load(part) as columns:
                if name == "element_start":
                    values = total + np.cumsum(columns["n_elements"]) - columns["n_elements"]
                    total += int(columns["n_elements"].sum())
                else:
                    values = columns[name]
            column[at : at + len(values)] = values
            at += len(values)
        if name == "element_start":
            column[n] = total
        column.flush()
        del column
        records.publish(temporary, path)
        hashes[path.name] = records.file_sha256(path)
    return hashes


def _layer(staging: Staging, k: int, name: str, source: str) -> dict[str, Any]:
    """Write the label layer of source ``k``; return its entry for the manifest."""
    state = staging.state
    entries: list[dict[str, Any]] = state["layer_shards"][k]
    folder = staging.folder / "layers" / name

    def shard_done(entry: dict[str, Any], columns: dict[str, np.ndarray]) -> None:
        save_columns(staging.folder / "staging" / f"layer-{k}-{len(entries):05d}.npz", columns)
        entries.append(entry)
        staging.commit()

    def after(key: bytes) -> Iterator[tuple[int, bytes]]:
        return staging.layer_records(k, key)

    write_label_shards(folder, after, entries, staging.shard_frames, len(staging.layers[k]), shard_done)
    parts = [staging.folder / "staging" / f"layer-{k}-{i:05d}.npz" for i in range(len(entries))]
    return close_layer(folder, name, source, staging.layers[k], entries, parts)


def save_columns(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Write columns of one shard, aside first."""
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, **columns)  # type: ignore[arg-type]
    records.publish(temporary, path)


def write_label_shards(
    folder: Path,
    after: Callable[[bytes], Iterator[tuple[int, bytes]]],
    entries: Sequence[dict[str, Any]],
    shard_frames: int,
    n_fidelities: int,
    shard_done: Callable[[dict[str, Any], dict[str, np.ndarray]], None],
) -> None:
    """Write (row, label record) pairs as numbered shards, going on after ``entries``.

    Args:
        after: yields the pairs after a row key (all for b""); opened once a shard, so that no read transaction of the
        working
            file outlives a commit.
        shard_done: called with (entry, columns) of each shard; must append to ``entries``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    energy_bits = [1 << records.bit(f, ENERGY) for f in range(n_fidelities)]
    while True:
        rows: list[int] = []
        present: list[int] = []
        energies: list[bytes] = []
        stream = after(records.row_key(entries[-1]["last_row"]) if entries else b"")
        first = next(stream, None)
        if first is None:
            return

        def watched(
            pairs: Iterator[tuple[int, bytes]], rows: list[int], present: list[int], energies: list[bytes]
        ) -> Iterator[tuple[int, bytes]]:
            for row, record in pairs:
                mask = records.LABEL_HEADER.unpack_from(record)[2]
                rows.append(row)
                present.append(mask)
                energies.append(record[records.LABEL_HEADER.size :][: 8 * sum(bool(mask & b) for b in energy_bits)])
                yield row, record

        pairs = chain([first], islice(stream, shard_frames - 1))
        path = folder / f"labels-{len(entries):05d}.lmdb"
        entry = records.write_shard(path, watched(pairs, rows, present, energies))
        del pairs, stream  # ends the read transaction
        entry["first_row"], entry["last_row"] = rows[0], rows[-1]
        masks = np.array(present, np.uint64)
        energy = np.full((len(rows), n_fidelities), np.nan)
        has = (masks[:, None] & np.array(energy_bits, np.uint64)) != 0
        energy[has] = np.frombuffer(b"".join(energies), "<f8")
        columns = {"rows": np.array(rows, np.int64), "present": masks, "energy": np.ascontiguousarray(energy.T)}
        shard_done(entry, columns)


def close_layer(
    folder: Path, name: str, source: str, fidelities: Sequence[str], entries: list[dict[str, Any]], parts: list[Path]
) -> dict[str, Any]:
    """Write a layer's columns and layer.json; return its entry for the manifest."""
    n = sum(entry["n_frames"] for entry in entries)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "rows": ("<i8", (n,)),
        "present": ("<u8", (n,)),
        "energy": ("<f8", (len(fidelities), n)),
    }
    hashes = {}
    for column, (dtype, shape) in shapes.items():
        temporary = folder / f"{column}.tmp.npy"
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.dtype(dtype), shape=shape)
        at = 0
        for part in parts:
            with np.load(part) as columns:
                values = columns[column]
            array[..., at : at + values.shape[-1]] = values
            at += values.shape[-1]
        assert at == n
        array.flush()
        del array
        records.publish(temporary, folder / f"{column}.npy")
        hashes[f"{column}.npy"] = records.file_sha256(folder / f"{column}.npy")
    fingerprint = hashlib.sha256(
        json.dumps([SCHEMA_VERSION, source, list(fidelities), [entry["content"] for entry in entries]]).encode()
    ).hexdigest()
    records.write_json(
        folder / "layer.json",
        {
            "name": name,
            "source": source,
            "fidelities": list(fidelities),
            "properties": list(PROPERTIES),
            "shards": entries,
            "columns": hashes,
            "fingerprint": fingerprint,
        },
    )
    return {"name": name, "source": source, "fingerprint": fingerprint}
