"""Write stores of any number of frames that nothing was calculated for, to measure what the size of a set costs.

    python tools/synthetic_store.py write FOLDER --frames 100000000 --index-only
    python tools/synthetic_store.py probe FOLDER

Every frame is the same small molecule. With --index-only the shards are empty files of the right length (sparse: they
take no room), and so are the columns that no plan reads (hashes, elements); sizes and edge counts are drawn from a
distribution like MPtrj's, splits, rows and labels of the index are there. Such a store opens, and a plan runs on it,
but no frame can be read: `probe` reads frames where it can, in this process or in a forked or spawned one.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import lmdb
import numpy as np

from mffm.data import records
from mffm.data.store import COLUMNS, ELEMENT_COLUMNS

CUTOFF = 5.0
SHARD_FRAMES = 50_000
_TILE = 1_000_000  # rows drawn at random; repeated beyond
_DTYPES = {
    "n_atoms": "<i4", "shard": "<i4", "frame_hash": "<u8", "geometry_hash": "<u8", "split": "|u1", "group": "<i4",
    "source": "<i2", "charge": "<i2", "spin": "<i2", "weight": "<f4", "element_start": "<i8", "element": "|u1",
    "element_count": "<i4",
}  # fmt: skip
GEOMETRY = records.pack_geometry(np.array([8, 1]), np.array([[0.0, 0, 0], [0, 0, 1.0]]), np.eye(3), np.zeros(3), "x")
LABELS = records.pack_labels({(0, "energy"): np.array(-2.0), (0, "forces"): np.zeros((2, 3))}, 2)


def write_store(folder: Path, n: int, readable: bool = True, shard_frames: int = SHARD_FRAMES) -> Path:
    """Write a store of ``n`` frames of one fidelity, ``pbe`` (energy, forces), 95 % of them in ``train``."""
    for name in ("geometry", "index", "edges", "layers/set"):
        (folder / name).mkdir(parents=True)
    sizes = [(first, min(first + shard_frames, n)) for first in range(0, n, shard_frames)]
    write = _shard if readable else _empty_shard
    geometry = [write(folder / "geometry" / f"{k:05d}.lmdb", *span, GEOMETRY) for k, span in enumerate(sizes)]
    labels = [write(folder / "layers/set" / f"labels-{k:05d}.lmdb", *span, LABELS) for k, span in enumerate(sizes)]
    for entry, (first, last) in zip(labels, sizes, strict=True):
        entry |= {"first_row": first, "last_row": last - 1}
    tile = min(_TILE, n)
    rng = np.random.default_rng(0)
    n_atoms = np.full(tile, 2) if readable else np.clip(rng.lognormal(np.log(31.2) - 0.32, 0.8, tile), 1, 444)
    n_edges = np.full(tile, 2) if readable else n_atoms.astype(int) * np.clip(rng.normal(62, 15, tile), 12, 120)
    split = rng.random(tile) > 0.95
    for name in COLUMNS + ELEMENT_COLUMNS:
        length = n + 1 if name == "element_start" else 2 * n if name.startswith("element") else n
        shape = (length, 2) if name.endswith("_hash") else (length,)
        column = np.lib.format.open_memmap(
            folder / "index" / f"{name}.npy", mode="w+", dtype=_DTYPES[name], shape=shape
        )
        if name in ("n_atoms", "split"):
            _fill(column, n_atoms if name == "n_atoms" else split)
        elif name == "shard" or readable:
            _fill_by_row(column, name, shard_frames)
    layer = folder / "layers/set"
    _fill_by_row(
        np.lib.format.open_memmap(layer / "rows.npy", mode="w+", dtype="<i8", shape=(n,)), "rows", shard_frames
    )
    present = records.LABEL_HEADER.unpack_from(LABELS)[2]
    _fill(_column(layer / "present.npy", "<u8", (n,)), np.full(tile, present))
    _column(layer / "energy.npy", "<f8", (1, n))
    edges = folder / "edges" / f"cutoff-{CUTOFF:g}"
    _fill(_column(edges.with_suffix(".npy"), "<i4", (n,)), n_edges)
    name = f"synthetic-{n}-{readable}"
    _json(edges.with_suffix(".json"), {"cutoff": CUTOFF, "sha256": name, "geometry_fingerprint": name})
    about = {"name": "set", "source": "set", "fingerprint": name}
    _json(layer / "layer.json", {**about, "fidelities": ["pbe"], "shards": labels, "columns": {}})
    _json(folder / "groups.json", [""])
    manifest = {
        "schema_version": records.SCHEMA_VERSION, "name": folder.name, "n_frames": n, "shard_frames": shard_frames,
        "fidelities": [{"name": "pbe", "level_of_theory": "PBE", "code": "", "settings": ""}],
        "sources": [{"name": "set", "licence": "none", "citation": ""}], "splits": ["train", "val"],
        "geometry": geometry, "index": {}, "layers": [about], "geometry_fingerprint": name, "fingerprint": name,
        "config_hash": "",
    }  # fmt: skip
    _json(folder / "manifest.json", manifest)
    return folder


def _column(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    column: np.ndarray = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
    return column


def _json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def _fill(column: np.ndarray, tile: np.ndarray) -> None:
    for first in range(0, len(column), len(tile)):
        column[first : first + len(tile)] = tile[: len(column) - first]


def _fill_by_row(column: np.ndarray, name: str, shard_frames: int) -> None:
    """Fill a column whose values follow from the row: shards, rows, and the elements of a molecule of two atoms."""
    for first in range(0, len(column), _TILE):
        row = np.arange(first, min(first + _TILE, len(column)))
        column[row] = {
            "shard": lambda row: row // shard_frames,
            "rows": lambda row: row,
            "element_start": lambda row: 2 * row,
            "element": lambda row: np.where(row % 2, 8, 1),
            "frame_hash": lambda row: np.stack([row, row], 1),
            "geometry_hash": lambda row: np.stack([row, row], 1),
            "charge": lambda row: np.full(len(row), -32768),
        }.get(name, lambda row: np.full(len(row), name in ("weight", "element_count")))(row)


def _shard(path: Path, first: int, last: int, record: bytes) -> dict[str, object]:
    with lmdb.open(str(path), subdir=False, map_size=1 << 34, lock=False, sync=False, max_dbs=0) as environment:
        keys = np.arange(first, last, dtype=">u8").tobytes()
        with environment.begin(write=True) as transaction, transaction.cursor() as cursor:
            cursor.putmulti([(keys[k : k + 8], record) for k in range(0, len(keys), 8)], append=True)
    return {"file": path.name, "n_frames": last - first, "n_atoms": 0, "bytes": path.stat().st_size, "sha256": ""}


def _empty_shard(path: Path, first: int, last: int, record: bytes) -> dict[str, object]:
    n_bytes = (last - first) * len(record)
    path.touch()
    os.truncate(path, n_bytes)
    return {"file": path.name, "n_frames": last - first, "n_atoms": 0, "bytes": n_bytes, "sha256": ""}


def private_bytes() -> int:
    """Return the memory of this process that no file could give back.

    Without what the allocator keeps for later: that depends on how many batches were ready at once. Not Private_Dirty:
    pages of a file that was just written are in it until the disk has them.
    """
    gc.collect()
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("Anonymous:")).split()[1])


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def probe(folder: Path, steps: int) -> dict[str, float]:
    """Start a run's reading at a saved cursor, take steps; return seconds and bytes of this process.

    Args:
        folder: of a store that ``write_store`` wrote.
        steps: to read; 0: none, the frames cannot be read.
    """
    from mffm.config.recipe import PlanConfig
    from mffm.data.loader import Loader
    from mffm.data.plan import Cursor, Plan, build_pools
    from mffm.data.store import Store

    clocks = [_clocks()]
    store = Store(folder)
    clocks.append(_clocks())
    edges = int(store.n_edges(CUTOFF)[0])
    config = PlanConfig(pools=[{"fidelity": "pbe"}], edge_budget=max(2 * 500, 200 * edges), oversize="skip")
    before = private_bytes()
    pools = build_pools(store, config, store.fidelities, CUTOFF)
    clocks.append(_clocks())
    plan = Plan(pools, config, seed=0)
    assert plan.fingerprint
    clocks.append(_clocks())
    cursor = Cursor(1000, ((0, len(pools[0]) // 2),))
    _, cursor = plan.step(cursor)
    clocks.append(_clocks())
    spent = np.diff(clocks, axis=0).tolist()
    found = {}
    for name, (wall, cpu) in zip(("open", "pools", "plan", "step"), spent, strict=True):
        found |= {f"{name}_s": wall, f"{name}_cpu_s": cpu}
    if steps:
        with Loader(store, plan, store.fidelities, CUTOFF, cursor, last_step=cursor.step + steps) as loader:
            for _ in loader:
                pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**found, "index_bytes": private_bytes() - before, "private_bytes": private_bytes(), "peak_bytes": peak}


def probe_elsewhere(folder: Path, steps: int, method: str) -> dict[str, float]:
    """Return what ``probe`` finds in a process that was started by ``fork`` or ``spawn``."""
    with ProcessPoolExecutor(1, mp_context=get_context(method)) as pool:
        return pool.submit(probe, folder, steps).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write")
    write.add_argument("folder", type=Path)
    write.add_argument("--frames", type=int, default=1_000_000)
    write.add_argument("--index-only", action="store_true")
    probing = commands.add_parser("probe")
    probing.add_argument("folder", type=Path)
    probing.add_argument("--steps", type=int, default=0)
    probing.add_argument("--start", choices=("here", "fork", "spawn"), default="here")
    arguments = parser.parse_args()
    if arguments.command == "write":
        write_store(arguments.folder, arguments.frames, readable=not arguments.index_only)
    elif arguments.start == "here":
        print(json.dumps(probe(arguments.folder, arguments.steps)))
    else:
        print(json.dumps(probe_elsewhere(arguments.folder, arguments.steps, arguments.start)))


if __name__ == "__main__":
    main()
