"""How fast the store is: read and decode, ingest from extxyz beside ASE's reader, and memory over the number of frames.

    python tools/bench_store.py [--frames 20000] [--atoms 50]

Prints Markdown; one process, one core; under a minute.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mffm.config.data import DataConfig
from mffm.data.ingest import ingest
from mffm.data.readers import read
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


def config(path: Path, store: Path) -> DataConfig:
    return DataConfig.model_validate(
        {
            "store": str(store),
            "fidelities": {"pbe": {"level_of_theory": "PBE"}},
            "sources": [
                {
                    "name": "bench",
                    "path": str(path),
                    "frame_key": "frame_id",
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
    arguments = parser.parse_args()
    started = time.monotonic()
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
