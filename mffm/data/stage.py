"""A copy of a store on a node's own disk: whole and checked, or not there."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mffm.data import records
from mffm.data.store import Store, read_manifest
from mffm.data.subset import store_files
from mffm.data.workers import Meter
from mffm.errors import InputError

_BLOCK = 1 << 24


@dataclass
class Staged:
    """What a staging did."""

    path: Path
    n_bytes: int  # copied; 0 where the copy was there
    fingerprint: str


def stage(store: Store, out: Path, progress: bool = False) -> Staged:
    """Copy a store to another file system; every file is compared with its SHA-256 while it is copied.

    Several processes of a node may ask for the same copy: one makes it, the others wait and use it.

    Raises:
        InputError: not enough room, a file that is not what the manifest says, another store or something else at
            ``out``.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        if out.exists() and any(out.iterdir()):
            if not (out / "manifest.json").is_file():
                raise InputError(f"{out}: holds something that is no store; name another folder")
            if read_manifest(out)["fingerprint"] != store.manifest["fingerprint"]:
                raise InputError(f"{out}: holds another store, {read_manifest(out)['name']!r}; name another folder")
            return Staged(out, 0, Store(out).fingerprint)
        files = list(store_files(store))
        total = sum(path.stat().st_size for path in files)
        free = shutil.disk_usage(out.parent).free
        if total > free:
            raise InputError(
                f"{out}: {store.path} has {total / 1e9:.1f} GB, {out.parent} has room for {free / 1e9:.1f}; "
                "make room, or take part of it with `mffm store subset`"
            )
        aside = out.with_name(f".{out.name}.staging")
        shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
        digests = _digests(store)
        done = 0
        try:
            with records.disk_errors_explained(out):
                with Meter(total, progress, "stage") as meter:
                    for n, path in enumerate(files, 1):
                        done += _copy(path, aside / path.relative_to(store.path), digests.get(path))
                        meter.update(done, {"n_rows": n})
                if out.is_dir():
                    out.rmdir()
                aside.rename(out)
                records.fsync_folder(out.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return Staged(out, total, Store(out).fingerprint)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    with out.with_name(f".{out.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _digests(store: Store) -> dict[Path, str]:
    """Return the SHA-256 of every file whose manifest has it."""
    found = {store.path / "geometry" / entry["file"]: entry["sha256"] for entry in store.manifest["geometry"]}
    found |= {store.path / "index" / name: digest for name, digest in store.manifest["index"].items()}
    for layer in store.layers:
        found |= {layer.folder / entry["file"]: entry["sha256"] for entry in layer.meta["shards"]}
        found |= {layer.folder / name: digest for name, digest in layer.meta["columns"].items()}
    return found


def _copy(path: Path, target: Path, expected: str | None) -> int:
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    n = 0
    with path.open("rb") as source, target.open("wb") as copy:
        while block := source.read(_BLOCK):
            digest.update(block)
            copy.write(block)
            n += len(block)
        copy.flush()
        os.fsync(copy.fileno())
    if expected is not None and digest.hexdigest() != expected:
        raise InputError(
            f"{path}: damaged: SHA-256 is {digest.hexdigest()[:16]}…, the manifest says {expected[:16]}…; "
            "restore the file from where the store was made, or ingest again"
        )
    return n
