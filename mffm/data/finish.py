"""The end of an ingest: label layers, the index, the manifest. Deterministic, so that it may be done again after a
kill.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mffm.data import records, statistics
from mffm.data.edges import write_edges
from mffm.data.records import SCHEMA_VERSION
from mffm.data.shards import Entry, edge_column, label_file, label_shard
from mffm.data.staging import Staging
from mffm.data.store import COLUMNS, ELEMENT_COLUMNS, combined_fingerprint
from mffm.data.workers import Meter, Workers
from mffm.fidelity import FidelityTable
from mffm.keys import PROPERTIES

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


def finish(
    staging: Staging,
    contents: "Contents",
    layers: Sequence[tuple[str, str]],
    config_hash: str,
    workers: Workers,
    progress: bool = False,
) -> None:
    """Write what remains of a store whose sources were all read; the manifest, which makes it a store, comes last.

    Args:
        staging: where everything is.
        contents: what the manifest says; splits and groups are the working file's.
        layers: name and source of every label layer.
        config_hash: of what the store is made from.
        workers: that write the shards.
        progress: show how far the labels are.
    """
    state = staging.state
    folder = staging.folder
    while staging.start_shard():
        staging.collect(workers.workers)
    staging.collect()
    written = [
        _layer(staging, k, name, source, workers, progress)
        for k, (name, source) in enumerate(layers)
        if state["layer_rows"][k]
    ]
    parts = [folder / "staging" / f"geometry-{k:05d}.npz" for k in range(len(state["geometry"]))]
    contents = contents._replace(splits=state["split_names"], groups=staging.group_names())
    _rejected(staging, folder / "rejected.jsonl")
    write_manifest(folder, contents, state["geometry"], parts, written, state["cutoffs"], config_hash)


class Contents(NamedTuple):
    """What a manifest says besides its shards."""

    name: str
    fidelities: FidelityTable
    sources: list[dict[str, str]]
    shard_frames: int
    splits: Sequence[str] = ()
    groups: Sequence[str] = ()
    made_from: dict[str, Any] | None = None  # what was done to which stores, for one made of stores


def geometry_fingerprint(
    entries: Sequence[Entry], index: dict[str, str], splits: Sequence[str], groups: Sequence[str], folder: Path
) -> str:
    """Return the fingerprint of a store's structures; ``folder`` has the groups.json of ``groups``."""
    content = [
        SCHEMA_VERSION,
        [entry["content"] for entry in entries],
        {name: digest for name, digest in index.items() if name != "shard.npy"},
        list(splits),
        list(groups) if len(groups) < 10_000 else records.file_sha256(folder / "groups.json"),
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(
    folder: Path,
    contents: Contents,
    entries: Sequence[Entry],
    parts: Sequence[Path],
    layers: Sequence[dict[str, Any]],
    cutoffs: Sequence[float],
    config_hash: str,
) -> None:
    """Write the index, the groups, the edge counts and at last the manifest of a store whose shards are there.

    Args:
        folder: of the store.
        contents: see there.
        entries, parts: of every geometry shard, the entry with its statistics and the file of its columns.
        layers: entries of the label layers.
        cutoffs: Å, that the columns have edge counts for.
        config_hash: of what the store was made from.
    """
    n = sum(entry["n_frames"] for entry in entries)
    index = _index(parts, n, folder / "index")
    records.write_json(folder / "groups.json", list(contents.groups))
    fingerprint = geometry_fingerprint(entries, index, contents.splits, contents.groups, folder)
    n_atoms = np.load(folder / "index" / "n_atoms.npy", mmap_mode="r")
    for cutoff in cutoffs:
        counts = (_column(part, edge_column(cutoff)) for part in parts)
        write_edges(folder / "edges", cutoff, n, counts, n_atoms, fingerprint)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "name": contents.name,
        "n_frames": n,
        "shard_frames": contents.shard_frames,
        "fidelities": contents.fidelities.to_list(),
        "sources": contents.sources,
        "splits": list(contents.splits),
        "groups": "groups.json",
        "geometry": [_plain(entry) for entry in entries],
        "index": index,
        "layers": list(layers),
        "statistics": statistics.add_geometry(entry["statistics"] for entry in entries),
        "geometry_fingerprint": fingerprint,
        "fingerprint": combined_fingerprint(fingerprint, [(x["name"], x["fingerprint"]) for x in layers]),
        "config_hash": config_hash,
    }
    if contents.made_from is not None:
        manifest["made_from"] = contents.made_from
    records.write_json(folder / "manifest.json", manifest)


def _plain(entry: Entry) -> Entry:
    """Return the entry of a shard without its statistics: the manifest has those of all shards together."""
    return {key: value for key, value in entry.items() if key != "statistics"}


def _column(part: Path, name: str) -> np.ndarray:
    with np.load(part) as columns:
        values: np.ndarray = columns[name]
    return values


def _rejected(staging: Staging, path: Path) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in staging.rejected())
    records.publish(temporary, path)


def _index(parts: Sequence[Path], n: int, folder: Path) -> dict[str, str]:
    """Put the columns of all shards one behind the other; return the files' hashes."""
    folder.mkdir(exist_ok=True)
    n_entries = sum(int(_column(part, "n_elements").sum()) for part in parts)
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


def _layer(staging: Staging, k: int, name: str, source: str, workers: Workers, progress: bool) -> dict[str, Any]:
    """Write the label layer of source ``k``; return its entry for the manifest."""
    entries: list[Entry] = staging.state["layer_shards"][k]
    folder = staging.folder / "layers" / name
    folder.mkdir(parents=True, exist_ok=True)
    under_way: deque[Future[Entry]] = deque()
    with Meter(staging.state["layer_rows"][k], progress, f"labels of {name}") as meter:
        for future in chain(staging.start_label_shards(k, name), [None]):
            if future is not None:
                under_way.append(future)
            while under_way and (future is None or under_way[0].done() or len(under_way) > workers.workers):
                entries.append(under_way.popleft().result())
                staging.commit()
                n_rows = sum(entry["n_frames"] for entry in entries)
                meter.update(n_rows, {"n_rows": n_rows})
    parts = [staging.folder / "staging" / f"layer-{k}-{i:05d}.npz" for i in range(len(entries))]
    return close_layer(folder, name, source, staging.layers[k], entries, parts)


def write_label_shards(
    folder: Path,
    after: Callable[[bytes], Iterator[tuple[int, bytes]]],
    entries: Sequence[Entry],
    shard_frames: int,
    fidelities: Sequence[str],
    shard_done: Callable[[Entry, dict[str, np.ndarray]], None],
) -> None:
    """Write (row, label record) pairs as numbered shards, going on after ``entries``.

    Args:
        after: yields the pairs after a row key (all for b""); opened once a shard, so that no read transaction of the
            working file outlives a commit.
        shard_done: called with (entry, columns) of each shard; must append to ``entries``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        stream = after(records.row_key(entries[-1]["last_row"]) if entries else b"")
        first = next(stream, None)
        if first is None:
            return
        pairs = chain([first], islice(stream, shard_frames - 1))
        entry, columns = label_shard(folder / label_file(len(entries)), pairs, fidelities)
        del pairs, stream  # ends the read transaction
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
            "shards": [_plain(entry) for entry in entries],
            "columns": hashes,
            "statistics": statistics.add_labels(entry["statistics"] for entry in entries),
            "fingerprint": fingerprint,
        },
    )
    return {"name": name, "source": source, "fingerprint": fingerprint}
