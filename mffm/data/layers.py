"""Adding labels to a store: a new layer beside the old ones. Nothing that is there changes."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from mffm.config.data import DataConfig
from mffm.data import records
from mffm.data.checks import check_store, conflict
from mffm.data.finish import close_layer, write_label_shards
from mffm.data.identity import digest16, lookup_keys, same_geometry
from mffm.data.ingest import Settings, Work, fidelities_of, fidelity_table, process, source_files
from mffm.data.readers import READERS, reader_name, wanted
from mffm.data.readers.convert import RejectedFrame
from mffm.data.records import row_key
from mffm.data.shards import save_columns
from mffm.data.staging import MAP_BYTES, Item
from mffm.data.store import NO_CHARGE, Store, combined_fingerprint
from mffm.data.workers import Meter, Workers
from mffm.errors import InputError, known
from mffm.fidelity import FidelityTable


def add_labels(
    store_path: str | Path, config: DataConfig, base: Path, layer_name: str, progress: bool = False
) -> dict[str, int]:
    """Append the labels of one source to the structures of a store as the layer ``layer_name``.

    Frames find their row by ``frame_key`` (the store's frame id) or by geometry, as the source's ``pair_by`` says. A
    frame that is not in the store, or that contradicts a label there, is left out and listed in the layer's
    rejected.jsonl; a label that is there already is not stored again. Geometry, older layers and their fingerprints
    stay.

    Returns:
        numbers of frames: ``rows`` that got labels, ``repeated``, ``rejected``.

    Raises:
        InputError: a layer of that name exists, another level of theory under a known fidelity, or no frame that fits.
    """
    store = Store(store_path)
    if len(config.sources) != 1:
        raise InputError(f"layer {layer_name!r}: the data YAML has {len(config.sources)} sources; a layer takes one")
    source = config.sources[0]
    with layer_folder(store, layer_name) as folder:
        fidelities = extended(store.fidelities, store.path, fidelity_table(config), fidelities_of(config, 0))
        with _Matcher(store, folder, config) as matcher:
            numbers = matcher.run(Path(base), progress)
            entry = matcher.write(layer_name)
        (folder / "match.lmdb").unlink()
        described = {"name": source.name, "licence": source.licence, "citation": source.citation}
        publish(store, folder, entry, fidelities, described)
    return numbers


def warnings(store_path: str | Path, config: DataConfig) -> list[str]:
    """Return the findings of the checks of a set for the fidelities that a layer's YAML labels."""
    labelled = fidelities_of(config, 0)
    return [str(finding) for finding in check_store(Store(store_path)) if finding.fidelity in labelled]


def extended(table: FidelityTable, of: str | Path, declared: FidelityTable, labelled: Sequence[str]) -> FidelityTable:
    """Return the fidelities of a store (or stores) with the new ones at the end; ``of`` names it in the error."""
    for name in labelled:
        if name not in table:
            table = table.appended(declared[name])
        elif table[name].level_of_theory != declared[name].level_of_theory:
            raise InputError(
                f"fidelity {name!r} is {table[name].level_of_theory!r} in {of} and "
                f"{declared[name].level_of_theory!r} here; energies may not be mixed: give the new one another name"
            )
    return table


@contextmanager
def layer_folder(store: Store, name: str) -> Iterator[Path]:
    """Give an empty folder to write a layer in; it goes at the end, unless ``publish`` has moved it to its place.

    Raises:
        InputError: a layer of that name exists, a name that is none, or no space left in the block.
    """
    names = [layer["name"] for layer in store.manifest["layers"]]
    if name in names:
        raise InputError(f"{store.path}: has a layer {name!r} already; layers: {known(names)}: choose another name")
    if not name.replace("-", "_").isidentifier():
        raise InputError(f"layer {name!r}: not a name; use letters, digits, _ and -, a letter first")
    folder = store.path / "layers" / f".adding-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with records.disk_errors_explained(store.path):
            folder.mkdir(parents=True)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_layer(
    store: Store,
    folder: Path,
    name: str,
    source: str,
    fidelities: Sequence[str],
    after: Callable[[bytes], Iterator[tuple[int, bytes]]],
) -> dict[str, Any]:
    """Write (row, label record) pairs as a layer into a folder; return its entry for the manifest.

    Args:
        after: yields the pairs, rows ascending, after a row key (all for b"").
    """
    entries: list[dict[str, Any]] = []
    parts: list[Path] = []

    def done(entry: dict[str, Any], columns: dict[str, np.ndarray]) -> None:
        parts.append(folder / f"part-{len(entries):05d}.npz")
        save_columns(parts[-1], columns)
        entries.append(entry)

    write_label_shards(folder, after, entries, store.manifest["shard_frames"], fidelities, done)
    layer = close_layer(folder, name, source, fidelities, entries, parts)
    for part in parts:
        part.unlink()
    return layer


def publish(
    store: Store, folder: Path, entry: dict[str, Any], fidelities: FidelityTable, source: dict[str, str]
) -> None:
    """Move a written layer to its place, then name it in the manifest, with its source and the store's fidelities."""
    place = store.path / "layers" / entry["name"]
    shutil.rmtree(place, ignore_errors=True)  # of a start that was killed before the manifest named it
    folder.rename(place)
    manifest = dict(store.manifest)
    manifest["fidelities"] = fidelities.to_list()
    manifest["layers"] = [*manifest["layers"], entry]
    if source["name"] not in store.source_names:
        manifest["sources"] = [*manifest["sources"], source]
    manifest["fingerprint"] = combined_fingerprint(
        manifest["geometry_fingerprint"], [(layer["name"], layer["fingerprint"]) for layer in manifest["layers"]]
    )
    records.write_json(store.path / "manifest.json", manifest)


def write_beside(
    store: Store,
    folder: Path,
    fidelities: FidelityTable,
    source: dict[str, str],
    after: Callable[[bytes], Iterator[tuple[int, bytes]]],
    made_from: dict[str, Any],
) -> None:
    """Write a layer that is not the store's into a folder of its own, whole or not at all: ``Store(beside=folder)``.

    Args:
        source: name, licence and citation.
        after: see ``write_layer``; indices of fidelities are those of ``fidelities``.
        made_from: kept in beside.json, for whoever wants to know whether it is still the right one.
    """
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with records.disk_errors_explained(folder):
            aside.mkdir(parents=True)
            write_layer(store, aside, source["name"], source["name"], fidelities.names, after)
            records.write_json(
                aside / "beside.json", {"fidelities": fidelities.to_list(), "source": source, "made_from": made_from}
            )
            aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class _Matcher:
    """Finds the row of each frame and gathers its labels in a working file beside the layer."""

    def __init__(self, store: Store, folder: Path, config: DataConfig):
        self.store = store
        self.folder = folder
        self.config = config
        self.source = config.sources[0]
        self.fidelities = list(fidelities_of(config, 0))
        self.environment = lmdb.open(
            str(folder / "match.lmdb"), subdir=False, map_size=MAP_BYTES, max_dbs=2, lock=False, sync=False
        )
        self._labels = self.environment.open_db(b"labels")
        self._identity = self.environment.open_db(b"identity", dupsort=True)
        self.transaction = self.environment.begin(write=True)
        self.by_geometry = self.source.pair_by == "geometry" or self.source.frame_key is None
        if self.by_geometry:
            for row in range(store.n_frames):
                self.transaction.put(lookup_keys(*store.geometry(row))[0], row_key(row), db=self._identity)
        else:
            self._order = np.argsort(store.frame_hash[:, 0], kind="stable")
            self._sorted = np.asarray(store.frame_hash[:, 0])[self._order]

    def __enter__(self) -> "_Matcher":
        return self

    def __exit__(self, *exception: object) -> None:
        self.environment.close()

    def row_of(self, item: Item) -> tuple[int, str]:
        """Return the row of a frame, or -1 and the reason."""
        assert isinstance(item.record, bytes)  # nothing here puts records into parts
        geometry = records.unpack_geometry(item.record)
        if self.by_geometry:
            cursor = self.transaction.cursor(self._identity)
            for key in item.lookup:
                if cursor.set_key(key):
                    for value in cursor.iternext_dup():
                        row = int.from_bytes(value, "big")
                        if same_geometry(geometry, self.store.geometry(row)) and self._same_charge(item, row):
                            return row, ""
            return -1, "no structure of the store has this geometry"
        wanted_hash = np.frombuffer(digest16(item.key), "<u8")
        at = int(np.searchsorted(self._sorted, wanted_hash[0]))
        while at < len(self._sorted) and self._sorted[at] == wanted_hash[0]:
            row = int(self._order[at])
            if self.store.frame_hash[row, 1] == wanted_hash[1]:
                if same_geometry(geometry, self.store.geometry(row)):
                    return row, ""
                return -1, f"frame_key {item.key!r} is row {row} of the store, but with another geometry"
            at += 1
        return -1, f"no structure of the store has the frame_key {item.key!r}"

    def _same_charge(self, item: Item, row: int) -> bool:
        charge = int(self.store.charge[row])
        return NO_CHARGE in (item.charge, charge) or item.charge == charge

    def run(self, base: Path, progress: bool) -> dict[str, int]:
        """Match every frame of the source."""
        files = source_files(self.source, base)
        numbers = {"rows": 0, "repeated": 0, "rejected": 0}
        first_reason = ""
        keys: set[str] = set()
        present = 0
        with (self.folder / "rejected.jsonl").open("w") as rejected, Meter(len(files), progress) as meter:
            for number, path in enumerate(files):
                work = Work(0, path, reader_name(path, self.source.reader))
                want = wanted(self.source)
                settings = Settings(work.reader, want, tuple(self.fidelities), self.config.min_distance)
                with Workers(self.config.workers) as workers:
                    chunks = READERS[work.reader].chunks(path, want, 0, 0)
                    for chunk, (items, found) in workers.over_chunks(process, chunks, settings):
                        keys |= found
                        for item in items:
                            present |= 0 if isinstance(item, RejectedFrame) else item.present
                            reason = self._take(item, numbers)
                            if reason:
                                numbers["rejected"] += 1
                                first_reason = first_reason or f"{chunk.path}: {reason}"
                                rejected.write(records.json_line(file=chunk.path, index=item.number, reason=reason))
                meter.update(number + 1, {"n_rows": numbers["rows"], "n_rejected": numbers["rejected"]})
        self._check_keys(", ".join(map(str, files)), keys, present)
        if not numbers["rows"]:
            raise InputError(
                f"source {self.source.name!r}: no new label for {self.store.path}; {first_reason or 'all repeated'}"
            )
        self.transaction.commit()
        return numbers

    def _check_keys(self, files: str, keys: set[str], present: int) -> None:
        """Every label that was asked for must have occurred, as at an ingest."""
        if not keys:
            raise InputError(f"{files}: no frames; the source {self.source.name!r} is empty: correct `path`")
        for k, fidelity in enumerate(self.fidelities):
            for prop in self.source.labels[fidelity]:
                key = self.source.label(fidelity, prop).key
                if key not in keys and not present >> records.bit(k, prop) & 1:
                    raise InputError(
                        f"{files}: no frame has the key {key!r} (labels.{fidelity}.{prop} of source "
                        f"{self.source.name!r}); keys found: {known(keys)}"
                    )

    def _take(self, item: Item | RejectedFrame, numbers: dict[str, int]) -> str:
        """Keep the labels of a frame that are new; return why it is rejected, or ""."""
        if isinstance(item, RejectedFrame):
            return item.reason
        row, reason = self.row_of(item)
        if row < 0:
            return reason
        assert isinstance(item.labels, bytes)
        new = records.unpack_all_labels(item.labels)
        staged = self.transaction.get(row_key(row), db=self._labels)
        known_labels = {} if staged is None else records.unpack_all_labels(staged)
        for k, prop in list(new):
            name = self.fidelities[k]
            old = known_labels.get((k, prop))
            if old is None and name in self.store.fidelities:
                old = self.store.labels(row, name).get(prop)
            if old is None:
                continue
            reason = conflict(prop, old, new[k, prop], item.n_atoms)
            if reason:
                return f"{name} {prop} {reason}"
            del new[k, prop]
            numbers["repeated"] += 1
        if new:
            numbers["rows"] += staged is None
            self.transaction.put(row_key(row), records.pack_labels(known_labels | new, item.n_atoms), db=self._labels)
        return ""

    def write(self, name: str) -> dict[str, Any]:
        """Write the layer into the folder; return its entry for the manifest."""

        def after(first: bytes) -> Iterator[tuple[int, bytes]]:
            with self.environment.begin() as transaction:
                cursor = transaction.cursor(self._labels)
                if cursor.set_range(first + b"\0") if first else cursor.first():
                    for key, value in cursor.iternext():
                        yield int.from_bytes(key, "big"), value

        return write_layer(self.store, self.folder, name, self.source.name, self.fidelities, after)
