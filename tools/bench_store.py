"""How fast the store is: read and decode, ingest beside ASE's reader and by format, memory over the number of frames.

    python tools/bench_store.py [--frames 20000] [--atoms 50]
    python tools/bench_store.py --formats [--frames 2000] [--atoms 20]    # ingest by format, hours for 100 M frames
    python tools/bench_store.py --index 100000000 --folder /somewhere     # a synthetic index of so many frames (3 GB)
    python tools/bench_store.py --peers [--frames 2000] [--atoms 20]      # random reading beside fairchem's dataset

Prints Markdown; one process, one core; under a minute (--index: minutes, the first time it writes the index).
"""

import argparse
import json
import os
import pickle
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from mffm.config.data import DataConfig
from mffm.data import ingest as ingest_module
from mffm.data import shards
from mffm.data.ingest import ingest
from mffm.data.readers import READERS, read, reader_name, wanted
from mffm.data.staging import Staging
from mffm.data.store import Store


def write_extxyz(path: Path, n_frames: int, n_atoms: int) -> None:
    """Write random crystals of ``n_atoms`` atoms with energy, forces and stress."""
    rng = np.random.default_rng(0)
    side = 3.0
    grid = int(np.ceil(n_atoms ** (1 / 3)))
    sites = np.stack(np.meshgrid(*[np.arange(grid)] * 3, indexing="ij"), -1).reshape(-1, 3)[:n_atoms] * side
    symbols = np.array(["C", "O", "Si", "Mg"])
    with path.open("w") as file:
        for k in range(n_frames):
            cell = np.eye(3) * grid * side + rng.normal(0, 0.2, (3, 3))
            positions = sites + rng.normal(0, 0.15, (n_atoms, 3))
            forces = rng.normal(0, 1, (n_atoms, 3))
            stress = rng.normal(0, 0.01, (3, 3))
            stress = stress + stress.T
            head = (
                f'{n_atoms}\nLattice="{" ".join(f"{x:.8f}" for x in cell.ravel())}" '
                f"Properties=species:S:1:pos:R:3:forces:R:3 energy={rng.normal(-5 * n_atoms, 1):.8f} "
                f'stress="{" ".join(f"{x:.8f}" for x in stress.ravel())}" frame_id=f{k} pbc="T T T"\n'
            )
            names = symbols[rng.integers(0, 4, n_atoms)]
            file.write(head)
            for name, x, f in zip(names, positions, forces, strict=True):
                file.write(f"{name} " + " ".join(f"{value:.8f}" for value in (*x, *f)) + "\n")


def config(path: Path, store: Path, frame_key: str | None = "frame_id") -> DataConfig:
    return DataConfig.model_validate(
        {
            "store": str(store),
            "fidelities": {"pbe": {"level_of_theory": "PBE"}},
            "sources": [
                {
                    "name": "bench",
                    "path": str(path),
                    "frame_key": frame_key,
                    "licence": "none",
                    "labels": {"pbe": {"energy": "energy", "forces": "forces", "stress": "stress"}},
                }
            ],
        }
    )


def seconds(function: Callable[[], object], repeats: int = 3) -> float:
    """Return the least CPU time of ``repeats`` calls: the machine may be shared."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def read_rates(store: Store) -> list[tuple[str, float]]:
    """Return (what, frames per second and core), rows in random order, energy, forces and stress of every one."""
    rows = np.random.default_rng(1).permutation(store.n_frames)
    listed = rows.tolist()

    def one_by_one() -> None:
        geometry, labels = store.geometry, store.labels
        for row in listed:
            geometry(row)
            labels(row, "pbe")

    def packed(size: int) -> Callable[[], None]:
        def run() -> None:
            for first in range(0, len(rows), size):
                store.read(rows[first : first + size], "pbe")

        return run

    n = len(rows)
    return [
        ("`geometry(row)` + `labels(row)`", n / seconds(one_by_one)),
        ("`read(rows)`, 64 rows a call", n / seconds(packed(64))),
        ("`read(rows)`, 1024 rows a call", n / seconds(packed(1024))),
    ]


def ingest_rates(folder: Path, n_frames: int, n_atoms: int) -> list[tuple[str, float]]:
    """Return (what, frames per second and core) from extxyz, edges not counted."""
    import ase.io

    path = folder / f"ingest-{n_atoms}.extxyz"
    write_extxyz(path, n_frames, n_atoms)
    data = config(path, folder / f"ingest-{n_atoms}")
    spec = data.sources[0]
    rates = [
        ("our reader", n_frames / seconds(lambda: sum(1 for _ in read(path, spec)), 2)),
        (
            "our ingest: read, check, look up, write",
            n_frames / seconds(lambda: ingest(data, folder, progress=False), 1),
        ),
    ]
    few = 300
    rates.append(("ASE's reader", few / seconds(lambda: sum(1 for _ in ase.io.iread(str(path), index=f":{few}")), 1)))
    return rates


CORES, FRAMES_OF_OMAT24 = 64, 100e6
FORMATS = ("extxyz", "aselmdb", "db", "traj")


def write_format(path: Path, extxyz: Path) -> None:
    """Write the frames of an extxyz file in the format of the path's ending, with ASE."""
    import ase.db
    import ase.io

    if path.suffix == ".aselmdb":
        import ase_db_backends  # noqa: F401 (lets ASE know the format)
    if path.suffix == ".traj":
        ase.io.write(path, ase.io.read(extxyz, ":"))
        return
    options: dict[str, Any] = {"use_lock_file": False} if path.suffix == ".aselmdb" else {}
    with ase.db.connect(path, **options) as database:
        for k, atoms in enumerate(ase.io.iread(extxyz, index=":")):
            database.write(atoms, data={"frame_id": f"f{k}"})


class Spent:
    """CPU seconds inside a function."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            start = time.process_time()
            try:
                return function(*arguments)
            finally:
                self.seconds += time.process_time() - start

        return timed


def ingest_costs(path: Path, n_frames: int, frame_key: str | None) -> tuple[float, float]:
    """Return CPU seconds per frame of an ingest: of what the workers do, and of the first process.

    What is done once for a store (the index, the report of samples) is left out.
    """
    data = config(path, path.with_suffix(f"{path.suffix}-store"), frame_key)
    want = wanted(data.sources[0])
    reader = reader_name(path)
    worker, first, received, handed_over = Spent(), Spent(), Spent(), Spent()
    stage = worker.around(ingest_module.stage_chunk)

    def stage_and_hand_over(*arguments: Any) -> Any:
        return received.around(pickle.loads)(handed_over.around(pickle.dumps)(stage(*arguments)))

    with (
        patch.object(ingest_module, "stage_chunk", stage_and_hand_over),
        patch.object(shards, "write_geometry_shard", worker.around(shards.write_geometry_shard)),
        patch.object(shards, "write_label_shard", worker.around(shards.write_label_shard)),
        patch.object(ingest_module, "_take", first.around(ingest_module._take)),
        patch.object(Staging, "_save", first.around(Staging._save)),
    ):
        ingest(data, path.parent, progress=False)
    # A format that decodes while it reads is read by the workers, file by file; lines of text by the first process.
    reading = seconds(lambda: sum(1 for _ in READERS[reader].chunks(path, want, 0, 0)), 2)
    by_worker = worker.seconds + handed_over.seconds + (0.0 if reader == "extxyz" else reading)
    by_first = first.seconds + received.seconds + (reading if reader == "extxyz" else 0.0)
    return by_worker / n_frames, by_first / n_frames


def print_formats(folder: Path, n_frames: int, n_atoms: int) -> None:
    extxyz = folder / "frames.extxyz"
    write_extxyz(extxyz, n_frames, n_atoms)
    print(f"## Ingest by format: {n_frames} frames of {n_atoms} atoms with E, F, S; CPU time, one process\n")
    print(
        f"| format | workers, µs a frame | first process, µs a frame | frames/s/core | hours for 100 M, {CORES} cores |"
    )
    print("|---|---|---|---|---|")
    for name in FORMATS:
        path = folder / f"frames.{name}"
        if path != extxyz:
            write_format(path, extxyz)
        worker, first = ingest_costs(path, n_frames, None if name == "traj" else "frame_id")
        hours = FRAMES_OF_OMAT24 * max(first, worker / (CORES - 1)) / 3600
        print(
            f"| {name} | {1e6 * worker:.0f} | {1e6 * first:.0f} | {1 / (worker + first):,.0f} | {hours:.1f}, "
            f"{'the first process' if first > worker / (CORES - 1) else 'the workers'} decide |"
        )


def print_index(folder: Path, n_frames: int) -> None:
    tool = Path(__file__).with_name("synthetic_store.py")
    store = folder / f"synthetic-{n_frames}"
    if not (store / "manifest.json").is_file():
        subprocess.run([sys.executable, tool, "write", store, "--frames", str(n_frames), "--index-only"], check=True)
    print(f"## An index of {n_frames:,} frames, {n_frames // 50_000:,} shards (synthetic; tools/synthetic_store.py)\n")
    print("Seconds, in brackets of the CPU.\n")
    times = "open | pools | plan and fingerprint | first step from a saved cursor"
    print(f"| start | {times} | memory of its own, MB | peak RSS, MB |")
    print("|---|---|---|---|---|---|---|")
    for start in ("first" if not (store / "pools").exists() else "later", "later"):
        done = subprocess.run([sys.executable, tool, "probe", store], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        took = [
            f"{found[f'{name}_s']:.2f} ({found[f'{name}_cpu_s']:.2f})" for name in ("open", "pools", "plan", "step")
        ]
        sizes = [f"{found[name] / 1e6:.0f}" for name in ("index_bytes", "peak_bytes")]
        print(f"| {start} | {' | '.join([*took, *sizes])} |")


def print_peers(folder: Path, n_frames: int, n_atoms: int) -> None:
    """Random reading of frames with energy, forces and stress as tensors, no edges, beside fairchem's dataset."""
    from fairchem.core.datasets.ase_datasets import AseDBDataset
    from fairchem.core.datasets.atomic_data import atomicdata_list_to_batch

    from mffm.data.loader import collate
    from mffm.keys import PROPERTIES

    extxyz = folder / "frames.extxyz"
    write_extxyz(extxyz, n_frames, n_atoms)
    write_format(folder / "frames.aselmdb", extxyz)
    ingest(config(extxyz, folder / "store"), folder, progress=False)
    store = Store(folder / "store")
    rows = np.random.default_rng(1).permutation(n_frames)
    dataset = AseDBDataset({"src": str(folder / "frames.aselmdb"), "a2g_args": {"r_edges": False}})

    def ours(size: int) -> Callable[[], None]:
        def run() -> None:
            for first in range(0, n_frames, size):
                part = rows[first : first + size]
                collate(
                    store, part, np.zeros(len(part), int), store.fidelities, [PROPERTIES] * len(part), 6.0, bare=True
                )

        return run

    def theirs(size: int) -> Callable[[], None]:
        def run() -> None:
            for first in range(0, n_frames, size):
                found = [dataset[row] for row in rows[first : first + size].tolist()]
                if size > 1:
                    atomicdata_list_to_batch(found)

        return run

    print(f"## Reading at random, frames of {n_atoms} atoms as tensors with E, F, S, no edges; one core\n")
    print("| what | frames/s |\n|---|---|")
    print(f"| mffm, batches of 32 (`collate`, edges left to the device) | {n_frames / seconds(ours(32)):,.0f} |")
    print(f"| mffm, one by one | {n_frames / seconds(ours(1)):,.0f} |")
    print(f"| fairchem's AseDBDataset on aselmdb, batches of 32 | {n_frames / seconds(theirs(32)):,.0f} |")
    print(f"| fairchem's AseDBDataset on aselmdb, one by one | {n_frames / seconds(theirs(1)):,.0f} |")


def peak_memory(folder: Path, n_frames: int) -> float:
    """Return the peak RSS in MiB of an ingest of small frames in a process of its own."""
    path = folder / f"memory-{n_frames}.extxyz"
    write_extxyz(path, n_frames, 8)
    code = (
        "import sys; sys.path.insert(0, 'tools'); from pathlib import Path; import resource; import bench_store as b;"
        f"d = b.config(Path({str(path)!r}), Path({str(path.with_suffix(''))!r}));"
        "d = d.model_copy(update={'shard_frames': 2000});"
        "b.ingest(d, Path('.'), progress=False); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    root = Path(__file__).resolve().parents[1]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    return int(result.stdout.split()[-1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=6000)
    parser.add_argument("--atoms", type=int, default=50)
    parser.add_argument("--formats", action="store_true")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--index", type=int, help="frames of a synthetic index")
    parser.add_argument("--folder", type=Path, help="where the synthetic index is kept")
    arguments = parser.parse_args()
    started = time.monotonic()
    if arguments.index:
        with tempfile.TemporaryDirectory() as name:
            print_index(arguments.folder or Path(name), arguments.index)
        return
    if arguments.formats or arguments.peers:
        for wanted_one, report in ((arguments.formats, print_formats), (arguments.peers, print_peers)):
            if wanted_one:
                with tempfile.TemporaryDirectory() as name:
                    report(Path(name), arguments.frames, arguments.atoms)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "read.extxyz"
        write_extxyz(path, arguments.frames, arguments.atoms)
        ingest(config(path, folder / "read"), folder, progress=False)
        store = Store(folder / "read")
        size = sum(f.stat().st_size for f in (folder / "read").rglob("*") if f.is_file()) / store.n_frames
        print(
            f"# Store\n\n{platform.processor() or platform.machine()}, one core, CPU time; "
            f"Python {platform.python_version()}\n"
        )
        print(f"## Read and decode: {arguments.atoms} atoms with E, F, S, random order, {size:.0f} bytes a frame\n")
        print("| how | frames/s/core |\n|---|---|")
        for what, rate in read_rates(store):
            print(f"| {what} | {rate:,.0f} |")
        print("\n## Ingest from extxyz\n\n| atoms | what | frames/s/core |\n|---|---|---|")
        for n_atoms in (8, 50):
            for what, rate in ingest_rates(folder, 3000, n_atoms):
                print(f"| {n_atoms} | {what} | {rate:,.0f} |")
        print("\n## Memory of an ingest (8 atoms)\n\n| frames | peak RSS, MiB |\n|---|---|")
        for n_frames in (5000, 10_000, 20_000):
            print(f"| {n_frames} | {peak_memory(folder, n_frames):.0f} |")
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"\nThis process: {rss:.0f} MiB at most; {time.monotonic() - started:.0f} s, load {os.getloadavg()[0]:.1f}"
        )


if __name__ == "__main__":
    main()
