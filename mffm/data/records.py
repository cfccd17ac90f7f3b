"""The bytes of one stored record, and the shard files that hold them: little-endian arrays behind a small header, no
pickle.

Geometry record, one per frame (key: row as 8 big-endian bytes)::

    n_atoms u32 | pbc bits u8 | moments u8 | id length u16 | cell 9×f8 | positions 3n×f8 | atomic numbers n×u8 |
    frame id utf-8 | magnetic moments n×f4, where ``moments`` is 1

Label record, one per (layer, frame) (key: row)::

    n_atoms u32 | 0 u32 | present u64 | energies f8… | stresses 9×f8… | forces 3n×f4…

Bit ``3 * k + p`` of ``present`` stands for property ``p`` of ``mffm.keys.PROPERTIES`` at the layer's k-th fidelity.
Forces are kept as float32 (relative rounding 6e-8, below any method's noise); everything else is float64.
"""

import errno
import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from mffm.errors import InputError
from mffm.keys import ENERGY, FORCES, PROPERTIES, STRESS, Property

SCHEMA_VERSION = 1
MAX_FIDELITIES = 21  # per layer: 3 properties each in 64 bits

GEOMETRY_HEADER = struct.Struct("<IBBH")
POSITIONS_AT = GEOMETRY_HEADER.size + 72
LABEL_HEADER = struct.Struct("<IIQ")
PBC = [np.array([bool(bits & 1), bool(bits & 2), bool(bits & 4)]) for bits in range(8)]
for _pbc in PBC:
    _pbc.flags.writeable = False

Geometry = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def row_key(row: int) -> bytes:
    return row.to_bytes(8, "big")


def pack_geometry(
    numbers: np.ndarray,
    positions: np.ndarray,
    cell: np.ndarray,
    pbc: np.ndarray,
    frame_id: str,
    moments: np.ndarray | None = None,
) -> bytes:
    """Return the geometry record of a frame; ``numbers`` [n], ``positions`` [n, 3] and ``cell`` [3, 3] in Å, ``pbc``
    [3], ``moments`` [n] in µB.
    """
    name = frame_id.encode()
    bits = int(pbc[0]) | int(pbc[1]) << 1 | int(pbc[2]) << 2
    return b"".join(
        (
            GEOMETRY_HEADER.pack(len(numbers), bits, moments is not None, len(name)),
            np.ascontiguousarray(cell, "<f8").tobytes(),
            np.ascontiguousarray(positions, "<f8").tobytes(),
            np.ascontiguousarray(numbers, "u1").tobytes(),
            name,
            b"" if moments is None else np.ascontiguousarray(moments, "<f4").tobytes(),
        )
    )


def unpack_geometry(record: bytes | memoryview) -> Geometry:
    """Return ``(numbers u8 [n], positions f8 [n, 3], cell f8 [3, 3], pbc bool [3])``, read-only views where
    possible.
    """
    n, bits, _, _ = GEOMETRY_HEADER.unpack_from(record)
    return (
        np.ndarray((n,), np.uint8, record, POSITIONS_AT + 24 * n),
        np.ndarray((n, 3), "<f8", record, POSITIONS_AT),
        np.ndarray((3, 3), "<f8", record, GEOMETRY_HEADER.size),
        PBC[bits],
    )


def unpack_frame_id(record: bytes | memoryview) -> str:
    n, _, _, length = GEOMETRY_HEADER.unpack_from(record)
    start = POSITIONS_AT + 25 * n
    return bytes(record[start : start + length]).decode()


def unpack_moments(record: bytes | memoryview) -> np.ndarray | None:
    """Return the magnetic moments f4 [n] in µB of a geometry record, or None where it has none."""
    n, _, has, length = GEOMETRY_HEADER.unpack_from(record)
    return np.ndarray((n,), "<f4", record[POSITIONS_AT + 25 * n + length :]) if has else None


def bit(fidelity: int, prop: Property) -> int:
    """Return the bit of (k-th fidelity of the layer, property)."""
    return 3 * fidelity + PROPERTIES.index(prop)


def pack_labels(labels: Mapping[tuple[int, Property], np.ndarray], n_atoms: int) -> bytes:
    """Return the label record of a frame from labels by (index of the fidelity in the layer, property)."""
    present = 0
    parts: dict[str, list[bytes]] = {p: [] for p in PROPERTIES}
    for k, p in sorted(labels, key=lambda key: bit(*key)):
        present |= 1 << bit(k, p)
        parts[p].append(np.ascontiguousarray(labels[k, p], "<f4" if p == FORCES else "<f8").tobytes())
    return b"".join((LABEL_HEADER.pack(n_atoms, 0, present), *parts[ENERGY], *parts[STRESS], *parts[FORCES]))


_ENERGY_BITS = sum(1 << (3 * k) for k in range(MAX_FIDELITIES))


class LabelLayout:
    """Where the labels of one fidelity lie in a record, remembered per ``present`` mask (a layer has few of them)."""

    def __init__(self, fidelity: int):
        self._shift = 3 * fidelity
        self._known: dict[int, tuple[int, int, int, int, int]] = {}

    def offsets(self, present: int) -> tuple[int, int, int, int, int]:
        """Return byte offsets of energy and stress (-1 where absent) and of all forces, this one's index there, and
        how many.
        """
        found = self._known.get(present)
        if found is None:
            below = present & ((1 << self._shift) - 1)
            counts = [((_ENERGY_BITS << p) & present).bit_count() for p in range(3)]
            before = [((_ENERGY_BITS << p) & below).bit_count() for p in range(3)]
            has = [bool(present >> (self._shift + p) & 1) for p in range(3)]
            start = LABEL_HEADER.size
            stress_start = start + 8 * counts[0]
            found = (
                start + 8 * before[0] if has[0] else -1,
                stress_start + 72 * before[2] if has[2] else -1,
                stress_start + 72 * counts[2],
                before[1] if has[1] else -1,
                counts[1],
            )
            self._known[present] = found
        return found

    def unpack(self, record: bytes | memoryview) -> dict[Property, np.ndarray]:
        """Return this fidelity's labels; only those that exist."""
        n, _, present = LABEL_HEADER.unpack_from(record)
        energy, stress, forces, index, _ = self.offsets(present)
        labels: dict[Property, np.ndarray] = {}
        if energy >= 0:
            labels[ENERGY] = np.ndarray((), "<f8", record, energy)
        if index >= 0:
            labels[FORCES] = np.ndarray((n, 3), "<f4", record, forces + 12 * n * index)
        if stress >= 0:
            labels[STRESS] = np.ndarray((3, 3), "<f8", record, stress)
        return labels


def unpack_all_labels(record: bytes | memoryview) -> dict[tuple[int, Property], np.ndarray]:
    """Return every label of a record by (index of the fidelity in the layer, property)."""
    present = LABEL_HEADER.unpack_from(record)[2]
    labels: dict[tuple[int, Property], np.ndarray] = {}
    for k in range(MAX_FIDELITIES):
        if present >> (3 * k) & 7:
            labels.update({(k, p): value for p, value in LabelLayout(k).unpack(record).items()})
    return labels


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def disk_error(error: BaseException, path: Path) -> InputError | None:
    """Return the user's error where ``error`` means that nothing more can be written, else None."""
    full = isinstance(error, lmdb.MapFullError | lmdb.DiskError)
    code = error.errno if isinstance(error, OSError) else None
    # LMDB reports a write that was cut short, which is how a disk gets full, as an input/output error.
    signs = ("No space left", "File too large", "quota", "Input/output error")
    full = full or (isinstance(error, lmdb.Error) and any(sign in str(error) for sign in signs))
    if full or code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return InputError(
            f"{path}: no space left to write ({error}); what was written before stays intact: "
            "make room and run the same command again, it goes on where it stopped"
        )
    if code in (errno.EROFS, errno.EACCES, errno.EPERM):
        return InputError(f"{path}: cannot be written ({error}); choose another folder or change its permissions")
    return None


@contextmanager
def disk_errors_explained(path: Path) -> Iterator[None]:
    """Turn an error that means that nothing more can be written to ``path`` into the user's; others stay as they are.

    Raises:
        InputError: no space left, or no permission.
    """
    try:
        yield
    except (OSError, lmdb.Error) as error:
        explained = disk_error(error, path)
        if explained is None:
            raise
        raise explained from error


def fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, final: Path) -> None:
    """Make a file that was written aside durable, then visible under its name in one step."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)
    fsync_folder(final.parent)


def json_line(**content: Any) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"


def write_json(path: Path, content: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    publish(temporary, path)


def write_shard(path: Path, records: Iterable[tuple[int, bytes]]) -> dict[str, Any]:
    """Write (row, record) pairs, rows ascending, as one LMDB file, aside first; return its entry for the manifest.

    ``content`` is the hash of the records and goes into fingerprints; ``sha256`` is the hash of the file, which also
    depends on LMDB's page size and version, and serves to find damage.
    """
    # The name is this process's: one that was orphaned by a kill may still be at the same shard.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    content = hashlib.sha256()
    n_frames = n_atoms = 0
    # The map is address space, not disk: 1 TiB is never reached by a shard.
    environment = lmdb.open(str(temporary), subdir=False, map_size=1 << 40, lock=False, sync=False, max_dbs=0)
    try:
        transaction = environment.begin(write=True)
        try:
            for row, record in records:
                key = row_key(row)
                transaction.put(key, record, append=True)
                content.update(key + len(record).to_bytes(8, "big"))
                content.update(record)
                n_frames += 1
                n_atoms += int.from_bytes(record[:4], "little")
                if n_frames % 4096 == 0:  # bounds the dirty pages kept in memory
                    transaction.commit()
                    transaction = environment.begin(write=True)
            transaction.commit()
        except BaseException:
            transaction.abort()
            raise
        environment.sync(True)
    finally:
        environment.close()
    entry = {
        "file": path.name,
        "n_frames": n_frames,
        "n_atoms": n_atoms,
        "bytes": temporary.stat().st_size,
        "sha256": file_sha256(temporary),
        "content": content.hexdigest(),
    }
    publish(temporary, path)
    return entry
