"""One store from several, by the way of an ingest: every structure once, its labels from all of them, none of them
contradicting another, restartable, and the same whatever the number of workers.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from mffm.data import parts, records
from mffm.data.finish import Contents, finish
from mffm.data.identity import lookup_keys
from mffm.data.ingest import COMMIT_FRAMES, count_move
from mffm.data.layers import extended
from mffm.data.parts import Extent
from mffm.data.readers.chunk import CHUNK_FRAMES
from mffm.data.readers.convert import RejectedFrame
from mffm.data.report import count_reason
from mffm.data.staging import Item, Staging, new_state, open_or_explain
from mffm.data.store import Store
from mffm.data.workers import Call, Meter, Workers
from mffm.errors import InputError
from mffm.fidelity import FidelityTable


@dataclass
class Merged:
    """What a merge did."""

    n_frames: int
    n_merged: int  # structures that an earlier store has too
    n_rejected: int  # of those, how many contradict it
    moves: list[str]  # structures that are in another split of an earlier store, the first 20
    n_moves: int
    fingerprint: str
    seconds: float


class _Whole(NamedTuple):
    """What the merged store has besides frames."""

    fidelities: FidelityTable
    sources: list[dict[str, str]]
    layers: dict[str, tuple[str, list[str]]]  # layer → source, fidelities


class _Row(NamedTuple):
    """A stored structure; the labels of the item are not used."""

    item: Item
    source: str
    labels: list[tuple[int, Extent, int]]  # layer, record, present


def merge(stores: Sequence[Path], out: Path, workers: int = 1, progress: bool = True) -> Merged:
    """Write a store with the structures and labels of several.

    A structure that several have is one: its labels are joined, an earlier store's label counts where both have it, and
    it stays in the earlier store's split. A structure whose labels contradict is left with the earlier ones, and listed
    in rejected.jsonl. Layers of the same name become one. Given again after a kill, it goes on where it stopped.

    Raises:
        InputError: two levels of theory under one fidelity, one layer's name for two sources, a full disk, a folder
            that holds something else.
    """
    started = time.monotonic()
    opened = [Store(path) for path in stores]
    if len({store.fingerprint for store in opened}) < len(opened):
        raise InputError(f"{', '.join(map(str, stores))}: the same store twice; name each once")
    whole = _whole(opened)
    cutoffs = sorted(set.intersection(*(set(counted(store)) for store in opened)))
    fingerprints = [store.fingerprint for store in opened]
    made_from = {"command": "merge", "stores": [[store.name, store.fingerprint] for store in opened]}
    config_hash = hashlib.sha256(json.dumps(["merge", *fingerprints]).encode()).hexdigest()
    state = {**new_state(config_hash, cutoffs, len(whole.layers)), "store": 0, "row": 0}
    refuse_existing(out, unfinished=True)
    layers = [fidelities for _, fidelities in whole.layers.values()]
    shard_frames = max(store.manifest["shard_frames"] for store in opened)
    with records.disk_errors_explained(out):
        with Workers(workers) as run, open_or_explain(out, shard_frames, layers, state, run) as staging:
            if staging.state["config_hash"] != config_hash:
                raise InputError(f"{out}: holds an unfinished merge of other stores; name another folder, or delete it")
            _take_all(staging, opened, whole, run, progress)
            contents = Contents(out.name, whole.fidelities, whole.sources, shard_frames, made_from=made_from)
            named = [(name, source) for name, (source, _) in whole.layers.items()]
            finish(staging, contents, named, config_hash, run, progress)
            state = staging.state
        staging.remove_working_files()
    return Merged(
        state["n_rows"],
        state["n_merged"],
        state["n_rejected"],
        state["split_moves"],
        state["split_moves_count"],
        Store(out).fingerprint,
        time.monotonic() - started,
    )


def counted(store: Store) -> list[float]:
    """Return the cutoffs that a store has edge counts for, ascending."""
    found = (path.stem.removeprefix("cutoff-") for path in (store.path / "edges").glob("cutoff-*.json"))
    return sorted(map(float, found))


def refuse_existing(out: Path, unfinished: bool = False) -> None:
    """Refuse a folder that holds something.

    Raises:
        InputError: it is not empty, and not the unfinished work of the same command where that may be.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not unfinished or not (out / "staging.lmdb").is_file():
        raise InputError(f"{out}: exists and is not empty; name a new folder")


def _whole(stores: Sequence[Store]) -> _Whole:
    table = stores[0].fidelities
    sources: dict[str, dict[str, str]] = {}
    layers: dict[str, tuple[str, list[str]]] = {}
    for store in stores:
        table = extended(table, "an earlier store", store.fidelities, store.fidelities.names)
        for described in store.sources:
            sources.setdefault(described["name"], described)
        for layer in store.layers:
            source, fidelities = layers.setdefault(layer.name, (layer.source, []))
            if source != layer.source:
                raise InputError(
                    f"{store.path}: the layer {layer.name!r} is of source {layer.source!r}, in an earlier store of "
                    f"{source!r}; ingest one of them again under another name"
                )
            fidelities += [name for name in layer.fidelities if name not in fidelities]
    for name, (_, fidelities) in layers.items():
        if len(fidelities) > records.MAX_FIDELITIES:
            raise InputError(f"layer {name!r}: {len(fidelities)} fidelities together; at most {records.MAX_FIDELITIES}")
    return _Whole(table, list(sources.values()), layers)


@lru_cache(maxsize=8)
def _store(path: Path) -> Store:
    return Store(path)


def stage_rows(
    path: Path, first: int, last: int, cutoffs: Sequence[float], layers: dict[str, tuple[str, list[str]]], folder: Path
) -> list[_Row]:
    """Put the records of some rows of a store into a part file of ``folder``; runs in any process."""
    store = _store(path)
    edges = [store.n_edges(cutoff)[first:last] for cutoff in cutoffs]
    numbers = {name: k for k, name in enumerate(layers)}
    items: list[Item] = []
    labels: list[list[tuple[int, bytes]]] = []
    payloads: list[bytes] = []
    for row in range(first, last):
        record = bytes(store.geometry_shards.get(int(store.shard[row]), row))
        found = [
            (numbers[layer.name], _renumbered(bytes(layer.record(row)), layer.fidelities, layers[layer.name][1]))
            for layer in store.layers
            if layer.position(row) >= 0
        ]
        geometry = records.unpack_geometry(record)
        frame_id = records.unpack_frame_id(record)
        items.append(
            Item(
                number=row,
                record=record,
                n_atoms=len(geometry[0]),
                frame_id=frame_id,
                key="",
                group=store.group_names[store.group[row]],
                split=store.split_names[store.split[row]],
                charge=int(store.charge[row]),
                spin=int(store.spin_multiplicity[row]),
                weight=float(store.weight[row]),
                geometry_hash=store.geometry_hash[row].tobytes(),
                lookup=lookup_keys(*geometry),
                labels=b"",
                present=0,
                edges=tuple(int(column[row - first]) for column in edges),
            )
        )
        labels.append(found)
        payloads += [record, *(label for _, label in found)]
    extents = iter(parts.append(folder, payloads))
    return [
        _Row(
            item._replace(record=next(extents)),
            store.source_names[int(store.source[item.number])],
            [(k, next(extents), records.LABEL_HEADER.unpack_from(label)[2]) for k, label in found],
        )
        for item, found in zip(items, labels, strict=True)
    ]


def _renumbered(record: bytes, old: Sequence[str], new: Sequence[str]) -> bytes:
    """Return a label record with its fidelities numbered as in the merged layer."""
    if list(old) == list(new[: len(old)]):
        return record
    found = records.unpack_all_labels(record)
    n_atoms = records.LABEL_HEADER.unpack_from(record)[0]
    return records.pack_labels({(new.index(old[k]), p): value for (k, p), value in found.items()}, n_atoms)


def _take_all(staging: Staging, stores: Sequence[Store], whole: _Whole, run: Workers, progress: bool) -> None:
    state = staging.state
    total = sum(store.n_frames for store in stores)
    source_index = {source["name"]: k for k, source in enumerate(whole.sources)}
    since_commit = 0

    def calls(begin: int, row: int) -> Iterator[Call]:
        for k in range(begin, len(stores)):
            for first in range(row if k == begin else 0, stores[k].n_frames, CHUNK_FRAMES):
                last = min(first + CHUNK_FRAMES, stores[k].n_frames)
                arguments = (stores[k].path, first, last, state["cutoffs"], whole.layers, staging.parts)
                yield (k, last), stage_rows, arguments

    for store in stores:
        state["split_names"] += [name for name in store.split_names if name not in state["split_names"]]
    with Meter(total, progress, "merge") as meter:
        for (k, last), rows in run.in_order(calls(state["store"], state["row"])):
            for row in rows:
                _take(staging, row, stores[k], source_index)
            state.update(store=k, row=last)
            since_commit += len(rows)
            if since_commit >= COMMIT_FRAMES:
                staging.commit()
                since_commit = 0
            meter.update(sum(store.n_frames for store in stores[:k]) + last, state)
    staging.commit()


def _take(staging: Staging, row: _Row, store: Store, source_index: dict[str, int]) -> None:
    """Store one structure as a new row, or its labels with those of a row that exists."""
    state, item = staging.state, row.item
    at = staging.same_structure(item)
    split = state["split_names"].index(item.split)
    if at < 0:
        at = staging.add(item, source_index[row.source], split, store.name)
        for layer, record, _ in row.labels:
            staging.put_labels(at, layer, record)
        return
    state["n_merged"] += 1
    place = f"{store.path}:{item.number}"
    if staging.split_of(at) != split:
        count_move(state, f"{place} ({item.split}; kept in {state['split_names'][staging.split_of(at)]})")
    for layer, record, present in row.labels:
        repeated, reason = staging.merge_labels(at, layer, item._replace(labels=record, present=present), "merge")
        state["n_repeated_labels"] += repeated
        if reason:
            count_reason(state["reasons"], reason)
            staging.reject(RejectedFrame(str(store.path), item.number, reason, row.source))
            return
