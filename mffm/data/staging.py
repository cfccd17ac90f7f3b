"""An ingest under way: one LMDB file holds everything that may still change, so that it can be killed at any moment.

Every commit moves frames, labels, indices and the position in the sources together. Geometry leaves it for a shard as
soon as a shard is full; labels stay until every source was read, because a later file may add to an earlier frame.
"""

import fcntl
import hashlib
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import numpy as np

from mffm.data import records
from mffm.data.checks import conflict
from mffm.data.identity import same_geometry
from mffm.data.readers.convert import RejectedFrame
from mffm.data.records import row_key
from mffm.errors import InputError
from mffm.keys import Property

MAP_BYTES = 1 << 42  # address space, not disk
# split, source, group, charge, spin, weight, frame hash, geometry hash; precedes a staged geometry record
_EXTRA = struct.Struct("<BhihHf16s16s")
_EXTRA_DTYPE = np.dtype(
    [
        ("split", "u1"),
        ("source", "<i2"),
        ("group", "<i4"),
        ("charge", "<i2"),
        ("spin", "<i2"),
        ("weight", "<f4"),
        ("frame_hash", "<u8", (2,)),
        ("geometry_hash", "<u8", (2,)),
    ]
)
_DATABASES = ("state", "geometry", "labels", "identity", "keys", "names", "groups", "group_names", "rejected")


class Item(NamedTuple):
    """A frame that passed the checks, as a worker hands it over."""

    number: int  # index in its file
    record: bytes  # geometry record, with its frame id
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
    labels: bytes  # label record, fidelities numbered as in the source
    present: int


def digest16(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class Staging:
    """The working file of an ingest.

    Args:
        folder: the store's folder; one process at a time may work there.
        shard_frames: frames per shard.
        layers: fidelity names of each layer, in the order of the sources.
        state: what a new ingest starts with; an unfinished one goes on with its own.
    """

    def __init__(self, folder: Path, shard_frames: int, layers: list[list[str]], state: dict[str, Any]):
        self.folder = folder
        self.shard_frames = shard_frames
        self.layers = layers
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / "ingest.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a killed process lets go of it
        except BlockingIOError as error:
            raise InputError(f"{folder}: another ingest is writing this store; wait for it or stop it") from error
        (folder / "geometry").mkdir(exist_ok=True)
        (folder / "staging").mkdir(exist_ok=True)
        self.environment = lmdb.open(
            str(folder / "staging.lmdb"), subdir=False, map_size=MAP_BYTES, max_dbs=len(_DATABASES), lock=False
        )
        self._db = {n: self.environment.open_db(n.encode(), dupsort=n == "identity") for n in _DATABASES}
        with self.environment.begin() as transaction:
            saved = transaction.get(b"state", db=self._db["state"])
        self.resumed = saved is not None
        self.state: dict[str, Any] = json.loads(bytes(saved)) if saved is not None else state
        self._transaction: lmdb.Transaction | None = None
        self._shard_cache: dict[int, lmdb.Environment] = {}

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
        """Make everything so far durable, then move full shards out."""
        self._put("state", b"state", json.dumps(self.state).encode())
        transaction, self._transaction = self._transaction, None
        assert transaction is not None
        transaction.commit()
        while self.state["n_rows"] - self.n_flushed() >= self.shard_frames:
            self.flush_shard()

    def n_flushed(self) -> int:
        return sum(entry["n_frames"] for entry in self.state["geometry"])

    def flush_shard(self) -> None:
        """Write the next geometry shard and its columns, then forget its rows here (all but the last shard are
        full).
        """
        first = self.n_flushed()
        last = min(first + self.shard_frames, self.state["n_rows"])
        number = len(self.state["geometry"])
        extras, elements, counts, lengths = [], [], [], []

        def rows() -> Iterator[tuple[int, bytes]]:
            with self.environment.begin() as transaction:
                cursor = transaction.cursor(self._db["geometry"])
                found = cursor.set_key(row_key(first))
                for row in range(first, last):
                    assert found
                    assert cursor.key() == row_key(row)
                    value = cursor.value()
                    record = value[_EXTRA.size :]
                    extras.append(value[: _EXTRA.size])
                    histogram = np.bincount(records.unpack_geometry(record)[0])
                    present = np.flatnonzero(histogram)
                    elements.append(present.astype(np.uint8))
                    counts.append(histogram[present].astype(np.int32))
                    lengths.append((len(present), int.from_bytes(record[:4], "little")))
                    yield row, record
                    found = cursor.next()

        entry = records.write_shard(self.folder / "geometry" / f"{number:05d}.lmdb", rows())
        extra = np.frombuffer(b"".join(extras), _EXTRA_DTYPE)
        columns = {name: np.ascontiguousarray(extra[name]) for name in _EXTRA_DTYPE.names or ()}
        columns["n_elements"] = np.array([a for a, _ in lengths], np.int64)
        columns["n_atoms"] = np.array([b for _, b in lengths], np.int32)
        columns["shard"] = np.full(last - first, number, np.int32)
        columns["element"] = np.concatenate(elements)
        columns["element_count"] = np.concatenate(counts)
        temporary = self.folder / "staging" / "columns.tmp.npz"
        np.savez(temporary, **columns)  # type: ignore[arg-type]
        records.publish(temporary, self.folder / "staging" / f"geometry-{number:05d}.npz")
        for row in range(first, last):
            self.transaction.delete(row_key(row), db=self._db["geometry"])
        self.state["geometry"].append(entry)
        self._put("state", b"state", json.dumps(self.state).encode())
        transaction, self._transaction = self._transaction, None
        assert transaction is not None
        transaction.commit()

    def geometry(self, row: int) -> tuple[bytes, int, int]:
        """Return the geometry record, charge and spin of a row that was added before."""
        value = self._get("geometry", row_key(row))
        if value is not None:
            extra = _EXTRA.unpack_from(value)
            return value[_EXTRA.size :], extra[3], extra[4]
        number = row // self.shard_frames
        environment = self._shard_cache.get(number)
        if environment is None:
            path = self.folder / "geometry" / f"{number:05d}.lmdb"
            environment = lmdb.open(str(path), subdir=False, readonly=True, lock=False, max_dbs=0)
            self._shard_cache[number] = environment
        with environment.begin() as transaction:
            record = transaction.get(row_key(row))
        columns = np.load(self.folder / "staging" / f"geometry-{number:05d}.npz")
        at = row - number * self.shard_frames
        return record, int(columns["charge"][at]), int(columns["spin"][at])

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
                geometry = geometry or records.unpack_geometry(item.record)
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
        same = same_geometry(records.unpack_geometry(item.record), records.unpack_geometry(record))
        return same and _same_state(item, charge, spin)

    def split_of(self, row: int) -> int:
        value = self._get("geometry", row_key(row))
        if value is not None:
            return value[0]
        number, at = divmod(row, self.shard_frames)
        return int(np.load(self.folder / "staging" / f"geometry-{number:05d}.npz")["split"][at])

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
            geometry = records.unpack_geometry(record)
            record = records.pack_geometry(*geometry, frame_id, records.unpack_moments(record))
        name = digest16(frame_id)
        group = self.group(item.group)
        extra = _EXTRA.pack(split, source, group, item.charge, item.spin, item.weight, name, item.geometry_hash)
        self._put("geometry", row_key(row), extra + record)
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
                for (k, prop), value in records.unpack_all_labels(cursor.value()).items():
                    found[self.layers[layer][k], prop] = value
                if not cursor.next():
                    break
        return found

    def put_labels(self, row: int, layer: int, record: bytes) -> None:
        key = row_key(row) + layer.to_bytes(2, "big")
        if self._get("labels", key) is None:
            self.state["layer_rows"][layer] += 1
        self._put("labels", key, record)

    def merge_labels(self, row: int, layer: int, item: Item, policy: str) -> tuple[int, str]:
        """Add an item's labels to a row that exists.

        Returns:
            the number of labels that were there already (and are left as they are), and why the frame must be
            rejected: a label that contradicts one that is there, with both values; empty where nothing does.
        """
        old = self.labels(row)
        names = self.layers[layer]
        new = records.unpack_all_labels(item.labels)
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
                fresh |= records.unpack_all_labels(existing)
            self.put_labels(row, layer, records.pack_labels(fresh, item.n_atoms))
        return len(repeated), ""

    def layer_records(self, layer: int, first: bytes = b"") -> Iterator[tuple[int, bytes]]:
        """Yield (row, label record) of a layer, rows ascending, after the row key ``first``."""
        with self.environment.begin() as transaction:
            cursor = transaction.cursor(self._db["labels"])
            if not (cursor.set_range(first + b"\xff\xff") if first else cursor.first()):
                return
            for key, value in cursor.iternext():
                if int.from_bytes(key[8:], "big") == layer:
                    yield int.from_bytes(key[:8], "big"), value


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
