"""An ingest under way: one LMDB file holds everything that may still change, so that it can be killed at any moment.

Every commit moves frames, labels, indices and the position in the sources together. The records themselves lie in part
files, where the workers have put them; here is only where. Structures leave for a shard as soon as it is full; labels
stay until every source was read, because a later file may add to an earlier frame.
"""

import fcntl
import json
import shutil
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import numpy as np

from mffm.data import parts, records, shards
from mffm.data.checks import conflict
from mffm.data.identity import digest16, same_geometry
from mffm.data.parts import EXTENT, Extent, PartReader
from mffm.data.readers.convert import RejectedFrame
from mffm.data.records import row_key
from mffm.data.workers import Workers
from mffm.errors import InputError
from mffm.keys import Property

MAP_BYTES = 1 << 42  # address space, not disk
VERSION = 2  # of the working file; an ingest begun by another one cannot be gone on with
# split, source, group, charge, spin, weight, frame hash, geometry hash; then an extent and edge counts
_HEAD = struct.Struct("<BhihHf16s16s")
_ROW = struct.Struct("<q")
_DATABASES = ("state", "geometry", "labels", "identity", "keys", "names", "groups", "group_names", "rejected")


class Item(NamedTuple):
    """A frame that passed the checks, as a worker hands it over."""

    number: int  # index in its file
    record: bytes | Extent  # geometry record, with its frame id, or where it lies
    n_atoms: int
    frame_id: str
    key: str  # frame_key's value, or empty
    group: str
    split: str
    charge: int
    spin: int
    weight: float
    geometry_hash: bytes
    lookup: list[bytes]
    labels: bytes | Extent  # label record, fidelities numbered as in the source, or where it lies
    present: int
    edges: tuple[int, ...] = ()  # within each cutoff that is counted


def new_state(config_hash: str, cutoffs: Sequence[float], n_layers: int) -> dict[str, Any]:
    """Return the state of a working file that nothing was put into."""
    return {
        "config_hash": config_hash,
        "cutoffs": list(cutoffs),
        "n_rows": 0,
        "n_groups": 0,
        "n_rejected": 0,
        "n_merged": 0,
        "n_repeated_labels": 0,
        "reasons": {},
        "split_names": [],
        "split_moves": [],
        "split_moves_count": 0,
        "geometry": [],
        "layer_rows": [0] * n_layers,
        "layer_shards": [[] for _ in range(n_layers)],
    }


class Staging:
    """The working file of an ingest.

    Args:
        folder: the store's folder; one process at a time may work there.
        shard_frames: frames per shard.
        layers: fidelity names of each layer, in the order of the sources.
        state: what a new ingest starts with; an unfinished one goes on with its own.
        workers: that write the shards; None: this process does.
    """

    def __init__(
        self,
        folder: Path,
        shard_frames: int,
        layers: list[list[str]],
        state: dict[str, Any],
        workers: Workers | None = None,
    ):
        self.folder = folder
        self.shard_frames = shard_frames
        self.layers = layers
        self._workers = workers or Workers(1)
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / "ingest.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a killed process lets go of it
        except BlockingIOError as error:
            raise InputError(f"{folder}: another ingest is writing this store; wait for it or stop it") from error
        (folder / "geometry").mkdir(exist_ok=True)
        self.parts = folder / "staging" / "parts"
        self.parts.mkdir(parents=True, exist_ok=True)
        self.environment = lmdb.open(
            str(folder / "staging.lmdb"), subdir=False, map_size=MAP_BYTES, max_dbs=len(_DATABASES), lock=False
        )
        self._db = {n: self.environment.open_db(n.encode(), dupsort=n == "identity") for n in _DATABASES}
        with self.environment.begin() as transaction:
            saved = transaction.get(b"state", db=self._db["state"])
        self.resumed = saved is not None
        self.state: dict[str, Any] = json.loads(bytes(saved)) if saved is not None else {**state, "version": VERSION}
        if self.state.get("version") != VERSION:
            raise InputError(
                f"{folder}: an ingest that another version of mffm began; delete the folder and ingest again"
            )
        self._transaction: lmdb.Transaction | None = None
        self._shard_cache: dict[int, lmdb.Environment] = {}
        self._part_reader = PartReader(self.parts)
        self._not_durable: set[int] = set()  # parts with records taken since the last commit
        self._under_way: deque[Future[shards.Entry]] = deque()  # geometry shards that are being written, in order
        self._columns = lru_cache(maxsize=64)(self._read_columns)

    def __enter__(self) -> "Staging":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        if self._transaction is not None:
            self._transaction.abort()
            self._transaction = None
        for environment in self._shard_cache.values():
            environment.close()
        self._shard_cache = {}
        self._part_reader.__exit__()
        parts.close(self.parts)
        self.environment.close()
        self._lock.close()

    def discard(self) -> None:
        """Close, and remove what cannot be finished."""
        self.close()
        for name in ("geometry", "staging", "layers", "index"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        self.remove_working_files()

    def remove_working_files(self) -> None:
        """Remove the working file first: with it gone, what is left is a finished store."""
        for name in ("staging.lmdb", "ingest.lock"):
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / "staging", ignore_errors=True)
        for pattern in ("geometry/*.tmp", "layers/*/*.tmp"):  # of processes that were killed
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)

    @property
    def transaction(self) -> lmdb.Transaction:
        if self._transaction is None:
            self._transaction = self.environment.begin(write=True)
        return self._transaction

    def _get(self, db: str, key: bytes) -> bytes | None:
        return self.transaction.get(key, db=self._db[db])

    def _put(self, db: str, key: bytes, value: bytes, **options: bool) -> None:
        self.transaction.put(key, value, db=self._db[db], **options)

    def commit(self) -> None:
        """Make everything so far durable, then let full shards be written."""
        if self._not_durable:
            parts.sync(self.parts, self._not_durable)
            self._not_durable.clear()
        self._save()
        while self.state["n_rows"] - self._n_started() >= self.shard_frames:
            self.start_shard()
            self.collect(self._workers.workers - 1)
        self.collect(self._workers.workers)

    def _save(self) -> None:
        self._put("state", b"state", json.dumps(self.state).encode())
        transaction, self._transaction = self._transaction, None
        assert transaction is not None
        transaction.commit()

    def _n_started(self) -> int:
        """All shards but the last are full."""
        return (len(self.state["geometry"]) + len(self._under_way)) * self.shard_frames

    def start_shard(self) -> bool:
        """Let the next geometry shard be written from rows that are durable; return False where no row is left."""
        first = self._n_started()
        last = min(first + self.shard_frames, self.state["n_rows"])
        if first >= last:
            return False
        cursor = self.transaction.cursor(self._db["geometry"])
        found = cursor.set_key(row_key(first))
        staged = []
        for row in range(first, last):
            assert found
            assert cursor.key() == row_key(row)
            staged.append(cursor.value())
            found = cursor.next()
        number = first // self.shard_frames
        self._under_way.append(
            self._workers.submit(
                shards.write_geometry_shard, self.folder, number, first, b"".join(staged), self.state["cutoffs"]
            )
        )
        return True

    def collect(self, most: int = 0) -> None:
        """Record shards that are written, and forget their rows here; wait until at most ``most`` are under way."""
        while self._under_way and (len(self._under_way) > most or self._under_way[0].done()):
            entry = self._under_way.popleft().result()
            first = len(self.state["geometry"]) * self.shard_frames
            for row in range(first, first + entry["n_frames"]):
                self.transaction.delete(row_key(row), db=self._db["geometry"])
            self.state["geometry"].append(entry)
            self._save()

    def bytes_of(self, record: bytes | Extent) -> bytes:
        return self._part_reader.get(*record) if isinstance(record, Extent) else record

    def _extent(self, record: bytes | Extent) -> bytes:
        """Return where a record lies, packed; one that lies nowhere is put into a part of this process."""
        extent = record if isinstance(record, Extent) else parts.append(self.parts, [record])[0]
        self._not_durable.add(extent.part)
        return EXTENT.pack(*extent)

    def geometry(self, row: int) -> tuple[bytes, int, int]:
        """Return the geometry record, charge and spin of a row that was added before."""
        value = self._get("geometry", row_key(row))
        if value is not None:
            head = _HEAD.unpack_from(value)
            return self._part_reader.get(*EXTENT.unpack_from(value, _HEAD.size)), head[3], head[4]
        number = row // self.shard_frames
        environment = self._shard_cache.get(number)
        if environment is None:
            path = self.folder / "geometry" / f"{number:05d}.lmdb"
            environment = lmdb.open(str(path), subdir=False, readonly=True, lock=False, max_dbs=0)
            self._shard_cache[number] = environment
        with environment.begin() as transaction:
            record = transaction.get(row_key(row))
        columns = self._columns(number)
        at = row - number * self.shard_frames
        return record, int(columns["charge"][at]), int(columns["spin"][at])

    def _read_columns(self, number: int) -> dict[str, np.ndarray]:
        with np.load(self.folder / "staging" / f"geometry-{number:05d}.npz") as columns:
            return {name: columns[name] for name in ("charge", "spin", "split")}

    def reject(self, rejected: RejectedFrame) -> None:
        n = self.state["n_rejected"]
        line = {"file": rejected.file, "index": rejected.index, "source": rejected.source, "reason": rejected.reason}
        self._put("rejected", row_key(n), json.dumps(line, ensure_ascii=False).encode())
        self.state["n_rejected"] = n + 1

    def rejected(self) -> Iterator[dict[str, Any]]:
        with self.environment.begin() as transaction:
            for _, value in transaction.cursor(self._db["rejected"]):
                yield json.loads(value)

    def group(self, name: str) -> int:
        key = digest16(name)
        found = self._get("groups", key)
        if found is None:
            number = self.state["n_groups"]
            self.state["n_groups"] = number + 1
            found = number.to_bytes(4, "little")
            self._put("groups", key, found)
            self._put("group_names", row_key(number), name.encode() or b"\0")
        return int.from_bytes(found, "little")

    def group_names(self) -> list[str]:
        with self.environment.begin() as transaction:
            return [v.decode().lstrip("\0") for _, v in transaction.cursor(self._db["group_names"])]

    def same_structure(self, item: Item) -> int:
        """Return the row that already holds this geometry (same charge and spin), or -1."""
        cursor = self.transaction.cursor(self._db["identity"])
        geometry = None
        for key in item.lookup:
            if not cursor.set_key(key):
                continue
            for value in cursor.iternext_dup():
                row = int.from_bytes(value, "big")
                record, charge, spin = self.geometry(row)
                geometry = geometry or records.unpack_geometry(self.bytes_of(item.record))
                if same_geometry(geometry, records.unpack_geometry(record)) and _same_state(item, charge, spin):
                    return row
        return -1

    def by_key(self, source: int, key: str) -> int:
        found = self._get("keys", digest16(f"{source}\0{key}"))
        return -1 if found is None else int.from_bytes(found, "big")

    def by_name(self, frame_id: str) -> int:
        found = self._get("names", digest16(frame_id))
        return -1 if found is None else int.from_bytes(found, "big")

    def is_same(self, row: int, item: Item) -> bool:
        """Return whether an item is the structure of a row."""
        record, charge, spin = self.geometry(row)
        mine = records.unpack_geometry(self.bytes_of(item.record))
        same = same_geometry(mine, records.unpack_geometry(record))
        return same and _same_state(item, charge, spin)

    def split_of(self, row: int) -> int:
        value = self._get("geometry", row_key(row))
        if value is not None:
            return value[0]
        number, at = divmod(row, self.shard_frames)
        return int(self._columns(number)["split"][at])

    def set_key(self, source: int, key: str, row: int) -> None:
        self._put("keys", digest16(f"{source}\0{key}"), row_key(row))

    def add(self, item: Item, source: int, split: int, source_name: str) -> int:
        """Store a new structure and return its row."""
        row = self.state["n_rows"]
        self.state["n_rows"] = row + 1
        record, frame_id = item.record, item.frame_id
        if self.by_name(frame_id) >= 0:  # another source uses the same name for another structure
            frame_id = f"{source_name}/{frame_id}"
            if self.by_name(frame_id) >= 0:
                frame_id = f"{frame_id}/{item.geometry_hash.hex()}"
            data = self.bytes_of(record)
            record = records.pack_geometry(*records.unpack_geometry(data), frame_id, records.unpack_moments(data))
        name = digest16(frame_id)
        group = self.group(item.group)
        head = _HEAD.pack(split, source, group, item.charge, item.spin, item.weight, name, item.geometry_hash)
        edges = np.array(item.edges, "<i4").tobytes()
        self._put("geometry", row_key(row), head + self._extent(record) + edges)
        self._put("identity", item.lookup[0], row_key(row))
        self._put("names", name, row_key(row))
        if item.key:
            self.set_key(source, item.key, row)
        return row

    def labels(self, row: int) -> dict[tuple[str, Property], np.ndarray]:
        """Return every label that a row has so far, by fidelity and property."""
        found: dict[tuple[str, Property], np.ndarray] = {}
        cursor = self.transaction.cursor(self._db["labels"])
        start = row_key(row)
        if cursor.set_range(start):
            while cursor.key()[:8] == start:
                layer = int.from_bytes(cursor.key()[8:], "big")
                record = self._part_reader.get(*EXTENT.unpack(cursor.value()))
                for (k, prop), value in records.unpack_all_labels(record).items():
                    found[self.layers[layer][k], prop] = value
                if not cursor.next():
                    break
        return found

    def put_labels(self, row: int, layer: int, record: bytes | Extent) -> None:
        key = row_key(row) + layer.to_bytes(2, "big")
        if self._get("labels", key) is None:
            self.state["layer_rows"][layer] += 1
        self._put("labels", key, self._extent(record))

    def merge_labels(self, row: int, layer: int, item: Item, policy: str) -> tuple[int, str]:
        """Add an item's labels to a row that exists.

        Returns:
            the number of labels that were there already (and are left as they are), and why the frame must be
            rejected: a label that contradicts one that is there, with both values; empty where nothing does.
        """
        old = self.labels(row)
        names = self.layers[layer]
        new = records.unpack_all_labels(self.bytes_of(item.labels))
        repeated = {key for key in new if (names[key[0]], key[1]) in old}
        if repeated and policy == "skip":
            return len(repeated), ""
        for k, prop in sorted(repeated):
            reason = conflict(prop, old[names[k], prop], new[k, prop], item.n_atoms)
            if reason:
                return len(repeated), f"{names[k]} {prop} {reason}"
        fresh = {key: value for key, value in new.items() if key not in repeated}
        if fresh:
            existing = self._get("labels", row_key(row) + layer.to_bytes(2, "big"))
            if existing is not None:
                fresh |= records.unpack_all_labels(self._part_reader.get(*EXTENT.unpack(existing)))
            self.put_labels(row, layer, records.pack_labels(fresh, item.n_atoms))
        return len(repeated), ""

    def start_label_shards(self, layer: int, name: str) -> Iterator[Future[shards.Entry]]:
        """Yield the label shards of a layer that are not written yet, as they are started, in order."""
        written = self.state["layer_shards"][layer]
        after = row_key(written[-1]["last_row"]) if written else b""
        number = len(written)
        while True:
            staged, after = self._staged_labels(layer, after)
            if not staged:
                return
            yield self._workers.submit(
                shards.write_label_shard,
                self.folder,
                self.folder / "staging",
                layer,
                number,
                staged,
                name,
                self.layers[layer],
            )
            number += 1

    def _staged_labels(self, layer: int, after: bytes) -> tuple[bytes, bytes]:
        """Return ``shards.STAGED_LABELS`` of the rows of the next shard, and the last one's key."""
        staged: list[bytes] = []
        cursor = self.transaction.cursor(self._db["labels"])
        found = cursor.set_range(after + b"\xff\xff") if after else cursor.first()
        while found and len(staged) < self.shard_frames:
            key = cursor.key()
            if int.from_bytes(key[8:], "big") == layer:
                after = key[:8]
                staged.append(_ROW.pack(int.from_bytes(after, "big")) + cursor.value())
            found = cursor.next()
        return b"".join(staged), after


def _same_state(item: Item, charge: int, spin: int) -> bool:
    """Charge and spin decide the electronic state; a source that does not give one may be any."""
    none = -32768
    if none not in (item.charge, charge) and item.charge != charge:
        return False
    return not (item.spin and spin) or item.spin == spin


def open_or_explain(folder: Path, *args: Any) -> Staging:
    """Open the working file.

    Raises:
        InputError: the folder cannot be written, or the working file is damaged.
    """
    try:
        return Staging(folder, *args)
    except (OSError, lmdb.Error) as error:
        explained = records.disk_error(error, folder)
        if explained is not None:
            raise explained from error
        raise InputError(
            f"{folder / 'staging.lmdb'}: cannot be opened ({error}); delete {folder} and ingest again"
        ) from error
