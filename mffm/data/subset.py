"""Part of a store as a store of its own, and a store with its splits drawn anew."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers

from mffm.config.data import SplitSpec
from mffm.data import pools, records, shards
from mffm.data.finish import Contents, geometry_fingerprint, write_manifest
from mffm.data.layers import write_layer
from mffm.data.merge import counted, refuse_existing
from mffm.data.named import rows_in
from mffm.data.splits import Splitter
from mffm.data.store import Layer, Store, combined_fingerprint
from mffm.data.workers import Meter
from mffm.errors import InputError, known
from mffm.keys import N_ELEMENTS

_BLOCK = 8192  # rows at a time: 8 MB of compositions


def chosen_rows(
    store: Store,
    ids: Path | None = None,
    fidelities: Sequence[str] = (),
    elements: Sequence[str] = (),
    split: str | None = None,
    count: int | None = None,
    fraction: float | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Return the rows (int64, ascending) that meet every condition.

    Args:
        store: what to choose from.
        ids: frame ids; every one must exist.
        fidelities: at least one label of each.
        elements: symbols; no other element may occur.
        split: name.
        count, fraction: of what the other conditions leave, those with the smallest hash of (seed, frame), so that a
            larger choice contains a smaller one.
        seed: of that hash.

    Raises:
        InputError: an id, fidelity, element or split that does not exist, no row left, both count and fraction.
    """
    if count is not None and fraction is not None:
        raise InputError(f"--count {count} and --fraction {fraction:g}: give one of them")
    rows = store.rows(split=split)
    for name in fidelities:
        rows = np.intersect1d(rows, store.rows(fidelity=name), assume_unique=True)
    if ids is not None:
        rows = np.intersect1d(rows, rows_in(store, ids), assume_unique=True)
    if elements:
        rows = _made_of(store, rows, elements)
    if fraction is not None:
        if not 0 < fraction <= 1:
            raise InputError(f"--fraction {fraction:g}: expected a number above 0, at most 1")
        count = round(fraction * len(rows))
    rows = pools.choose(store, rows, seed, count)
    if not len(rows):
        raise InputError(f"{store.path}: no frame of {store.n_frames} is left by these conditions; loosen them")
    return rows


def _made_of(store: Store, rows: np.ndarray, elements: Sequence[str]) -> np.ndarray:
    allowed = np.zeros(N_ELEMENTS + 1, bool)
    for symbol in elements:
        if not 0 < atomic_numbers.get(symbol, 0) <= N_ELEMENTS:
            raise InputError(f"--elements {symbol}: not an element; give symbols with commas between, as in C,H,O")
        allowed[atomic_numbers[symbol]] = True
    kept = [
        block[~(store.composition(block)[:, ~allowed] > 0).any(axis=1)]
        for block in (rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK))
    ]
    return np.concatenate(kept) if kept else rows


@contextmanager
def _made_aside(out: Path) -> Iterator[Path]:
    """Give a folder to write a store in, which becomes ``out`` at the end, or goes."""
    refuse_existing(out)
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with records.disk_errors_explained(out):
            aside.mkdir(parents=True)
            yield aside
            if out.is_dir():
                out.rmdir()  # empty, as was seen at the start
            aside.rename(out)
            records.fsync_folder(out.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def subset(store: Store, rows: np.ndarray, out: Path, asked: dict[str, Any], progress: bool = False) -> Store:
    """Write some rows of a store, with all their labels and edge counts, as a store of its own, whole or not at all.

    Args:
        store: what to take from.
        rows: ascending.
        out: a new folder.
        asked: how they were chosen; kept in the manifest.
        progress: show a bar, or lines.
    """
    shard_frames = store.manifest["shard_frames"]
    cutoffs = counted(store)
    group_numbers, groups = np.unique(store.group[rows], return_inverse=True)
    made_from = {"command": "subset", "stores": [[store.name, store.fingerprint]], **asked}
    with _made_aside(out) as folder, Meter(len(rows), progress, "subset") as meter:
        for name in ("geometry", "staging"):
            (folder / name).mkdir()
        entries: list[shards.Entry] = []
        parts: list[Path] = []
        for first in range(0, len(rows), shard_frames):
            block = rows[first : first + shard_frames]
            columns = _columns(store, block, groups[first : first + shard_frames], len(entries), cutoffs)
            path = folder / "geometry" / f"{len(entries):05d}.lmdb"
            entries.append(shards.geometry_shard(path, first, _geometries(store, block), columns))
            parts.append(folder / "staging" / f"geometry-{len(parts):05d}.npz")
            shards.save_columns(parts[-1], columns)
            meter.update(first + len(block), {"n_rows": first + len(block)})
        layers = [_layer(store, layer, rows, folder / "layers" / layer.name) for layer in store.layers]
        contents = Contents(
            out.name,
            store.fidelities,
            store.sources,
            shard_frames,
            store.split_names,
            [store.group_names[k] for k in group_numbers.tolist()],
            made_from,
        )
        config_hash = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
        kept = [layer for layer in layers if layer is not None]
        write_manifest(folder, contents, entries, parts, kept, cutoffs, config_hash)
        shutil.rmtree(folder / "staging")
    return Store(out)


def _columns(
    store: Store, block: np.ndarray, groups: np.ndarray, number: int, cutoffs: Sequence[float]
) -> dict[str, np.ndarray]:
    columns = {
        "split": store.split[block],
        "source": store.source[block],
        "group": groups,
        "charge": store.charge[block],
        "spin": store.spin_multiplicity[block],
        "weight": store.weight[block],
        "frame_hash": store.frame_hash[block],
        "geometry_hash": store.geometry_hash[block],
        "shard": np.full(len(block), number, np.int32),
    }
    columns |= {shards.edge_column(cutoff): store.n_edges(cutoff)[block] for cutoff in cutoffs}
    return {name: np.asarray(column) for name, column in columns.items()}


def _geometries(store: Store, rows: np.ndarray) -> Iterator[bytes]:
    for shard, row in zip(store.shard[rows].tolist(), rows.tolist(), strict=True):
        yield bytes(store.geometry_shards.get(shard, row))


def _layer(store: Store, layer: Layer, rows: np.ndarray, folder: Path) -> dict[str, Any] | None:
    """Write what a layer has of some rows; return its entry for the manifest, None where it has nothing."""
    new_rows = np.flatnonzero(layer.positions(rows) >= 0)
    if not len(new_rows):
        return None

    def after(key: bytes) -> Iterator[tuple[int, bytes]]:
        start = int(np.searchsorted(new_rows, int.from_bytes(key, "big"), "right")) if key else 0
        for new in new_rows[start:].tolist():
            yield new, bytes(layer.record(int(rows[new])))

    folder.mkdir(parents=True)
    return write_layer(store, folder, layer.name, layer.source, layer.fidelities, after)


def split(store: Store, out: Path, spec: SplitSpec, by: str) -> Store:
    """Write a store with the same frames and labels and with its splits drawn anew, whole or not at all.

    The shards are links to those of the first store where the file system has links, else copies.

    Args:
        store: what to take from.
        out: a new folder.
        spec: fractions, groups to hold out, seed.
        by: what is not torn apart: a ``structure``, a ``group`` or a ``composition`` (the reduced formula).

    Raises:
        InputError: a group to hold out that no structure has.
    """
    for name, held in spec.holdout.items():
        absent = [group for group in held if group not in store.group_names]
        if absent:
            raise InputError(
                f"--holdout {name}={absent[0]}: no structure has that group; groups: {known(store.group_names[:20])}"
            )
    names: list[str] = []
    column = _drawn(store, Splitter(spec, names), by)
    manifest = json.loads((store.path / "manifest.json").read_text())
    with _made_aside(out) as folder:
        for path in store_files(store):
            target = folder / path.relative_to(store.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(path, target)
        index = dict(manifest["index"])
        (folder / "index" / "split.npy").unlink()  # a link: the first store keeps its own
        np.save(folder / "index" / "split.npy", column)
        index["split.npy"] = records.file_sha256(folder / "index" / "split.npy")
        fingerprint = geometry_fingerprint(manifest["geometry"], index, names, store.group_names, folder)
        for path in (folder / "edges").glob("cutoff-*.json"):
            about = json.loads(path.read_text())
            records.write_json(path, {**about, "geometry_fingerprint": fingerprint})
        layers = [(layer["name"], layer["fingerprint"]) for layer in manifest["layers"]]
        settings = {"by": by, "seed": spec.seed, "fractions": spec.fractions, "holdout": spec.holdout}
        records.write_json(
            folder / "manifest.json",
            {
                **manifest,
                "name": out.name,
                "splits": names,
                "index": index,
                "geometry_fingerprint": fingerprint,
                "fingerprint": combined_fingerprint(fingerprint, layers),
                "config_hash": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
                "made_from": {"command": "split", "stores": [[store.name, store.fingerprint]], **settings},
            },
        )
    return Store(out)


def store_files(store: Store) -> Iterator[Path]:
    """Yield every file that makes a store; what its ingest said of it (report, rejected frames) is not of it."""
    yield store.path / "manifest.json"
    yield store.path / "groups.json"
    yield from (store.path / "geometry" / entry["file"] for entry in store.manifest["geometry"])
    yield from sorted((store.path / "index").glob("*.npy"))
    yield from sorted((store.path / "edges").glob("cutoff-*[0-9].*"))
    for layer in store.layers:
        yield layer.folder / "layer.json"
        yield from (layer.folder / entry["file"] for entry in layer.meta["shards"])
        yield from (layer.folder / name for name in layer.meta["columns"])


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(path, target)


def _drawn(store: Store, splitter: Splitter, by: str) -> np.ndarray:
    """Return the split of every row, |u1."""
    column = np.empty(store.n_frames, np.uint8)
    unit = _UNITS[by]
    for row, group in enumerate(store.group.tolist()):
        name = store.group_names[group]
        held = splitter.holdout.get(name, "")
        column[row] = splitter.names.index(held or splitter.draw(unit(store, row, name)))
    return column


def _reduced_formula(store: Store, row: int, group: str) -> bytes:
    del group
    numbers, counts = store.elements(row)
    return numbers.tobytes() + (counts // np.gcd.reduce(counts)).astype("<i4").tobytes()


_UNITS: dict[str, Callable[[Store, int, str], bytes]] = {
    "structure": lambda store, row, group: store.geometry_hash[row].tobytes(),
    "group": lambda store, row, group: group.encode(),
    "composition": _reduced_formula,
}
