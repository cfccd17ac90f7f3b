"""Backbones and peers side by side on the same frames, as markdown: CPU µs per edge, atoms/s, peak memory.

    python tools/peers/install.py all
    OMP_NUM_THREADS=1 python tools/bench_backbones.py [--edges 6000] [--rounds 5] [--only C64,MACE]

Shipped crystals, cutoff 5 Å, energy + forces + stress, float32, one thread, the same allocator setting for all.
Every model is a process of its own, in its package's environment, and waits for its turn: one inference and one
conservative training step (double backward, no optimiser) each a round. Times are CPU times, the median over the
rounds; ratios are of a round's. Memory is the peak of the resident size in a training step above its start.
eSCN-MD is fairchem's own code behind this package's edges and heads; SevenNet's models are its released ones; MACE and
NequIP have fresh weights. The compiled row trains by ``train.compile``, which takes minutes at its first start; its
inference is eager. cuEquivariance and OpenEquivariance (MACE, SevenNet, NequIP) and FlashTP (SevenNet) are for
GPUs and take no part.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import ase.io
from ase import Atoms
from peers import install

from mffm.config.base import load
from mffm.config.data import DataConfig
from mffm.data.ingest import ingest
from mffm.data.store import Store, count_edges

ROOT = Path(__file__).parents[1]
PEERS = Path(__file__).parent / "peers"
CUTOFF = 5.0
FIDELITY = "pbe_gpaw"
ESCN = {"kind": "escn"}
# row → package, options of tools/peers/speed.py
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "density, C64, lmax 2": ("mffm", {"channels": 64, "edge_channels": 64}),
    "density, C64, lmax 2, 32 on edges (default)": ("mffm", {"channels": 64, "edge_channels": 32}),
    "density, C64, lmax 2, compiled": ("mffm", {"channels": 64, "edge_channels": 64, "compiled": True}),
    "density, C128, lmax 3, 48 on edges": ("mffm", {"channels": 128, "edge_channels": 48, "lmax": 3}),
    "eSCN-MD, C64, lmax 2, mmax 2": (
        "mffm", {**ESCN, "sphere_channels": 64, "hidden_channels": 64, "edge_channels": 64},
    ),
    "eSCN-MD, C128, lmax 2, mmax 2": (
        "mffm", {**ESCN, "sphere_channels": 128, "hidden_channels": 128, "edge_channels": 128},
    ),
    "MACE, 64x0e": ("mace", {"hidden_irreps": "64x0e"}),
    "MACE, 128x0e + 128x1o": ("mace", {"hidden_irreps": "128x0e + 128x1o"}),
    "SevenNet, 7net-0": ("sevennet", {"checkpoint": "7net-0"}),
    "SevenNet, 7net-l3i5": ("sevennet", {"checkpoint": "7net-l3i5"}),
    "NequIP, C32, lmax 1 (its tutorial's)": ("nequip", {"l_max": 1, "num_features": 32}),
    "NequIP, C64, lmax 2": ("nequip", {"l_max": 2, "num_features": 64}),
}  # fmt: skip
REFERENCE = "eSCN-MD, C64, lmax 2, mmax 2"


class Worker:
    """A model in its own process; ``do`` takes a turn."""

    def __init__(self, kind: str, options: dict[str, Any], frames: Path):
        python = Path(sys.executable) if kind == "mffm" else install.python(kind)
        environment = {**os.environ, **install.ENVIRONMENT, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = str(ROOT) if kind == "mffm" else ""
        command = [str(python), str(PEERS / "speed.py"), kind, json.dumps(options), str(frames)]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self.facts: dict[str, int] = self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise SystemExit(f"{self.process.args}: ended\n{self.errors.read()[-4000:]}")
        return json.loads(line)

    def do(self, what: str) -> float:
        """``infer`` or ``train``: CPU seconds; ``peak``: KiB by which a training step raises the peak of memory."""
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.answer()

    def stop(self) -> None:
        self.process.communicate()
        self.errors.close()


def write_frames(folder: Path, n_edges: int) -> dict[str, Path]:
    """Write the crystals of about ``n_edges`` edges for mffm's models (a store and rows) and for the peers (extxyz)."""
    data = ROOT / "configs" / "data" / "crystals.yaml"
    path = folder / "store"
    ingest(load(DataConfig, data), data.parent, path, progress=False)
    count_edges(path, CUTOFF)
    store = Store(path)
    rows = store.rows(split="train", fidelity=FIDELITY)
    ends = store.n_edges(CUTOFF)[rows].cumsum()
    rows = rows[: max(1, int(ends.searchsorted(n_edges)))]
    frames = [
        Atoms(numbers, positions, cell=cell, pbc=pbc) for numbers, positions, cell, pbc in map(store.geometry, rows)
    ]
    ase.io.write(folder / "frames.xyz", frames)
    (folder / "frames.json").write_text(json.dumps({"store": str(path), "rows": rows.tolist(), "fidelity": FIDELITY}))
    return {"mffm": folder / "frames.json", "peer": folder / "frames.xyz"}


def measure(workers: dict[str, Worker], rounds: int) -> tuple[dict[str, float], dict[tuple[str, str], list[float]]]:
    """Return the peak of each model, KiB, and its CPU seconds at (model, infer or train), a number a round."""
    peaks, times = {}, {}
    for name, worker in workers.items():
        worker.do("infer")
        peaks[name] = worker.do("peak")
    for _ in range(2):  # TorchScript compiles at the second call
        for worker in workers.values():
            worker.do("train")
    for _ in range(rounds):
        for name, worker in workers.items():
            for what in ("infer", "train"):
                times.setdefault((name, what), []).append(worker.do(what))
    return peaks, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--edges", type=int, default=6000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="parts of names, between commas; the reference is always there")
    args = parser.parse_args()
    parts = args.only.split(",")
    wanted = {n: m for n, m in MODELS.items() if n == REFERENCE or any(p in n for p in parts)}
    missing = sorted({kind for kind, _ in wanted.values() if kind != "mffm" and install.python(kind) is None})
    with tempfile.TemporaryDirectory() as folder:
        frames = write_frames(Path(folder), args.edges)
        workers = {
            name: Worker(kind, options, frames["mffm" if kind == "mffm" else "peer"])
            for name, (kind, options) in wanted.items()
            if kind not in missing
        }
        peaks, times = measure(workers, args.rounds)
        for worker in workers.values():
            worker.stop()
    facts = workers[REFERENCE].facts
    print(f"{facts['n_edges']:,} edges, {facts['n_atoms']} atoms\n")
    print(
        "| model | parameters | layers | inference µs/edge | training µs/edge | inference µs/edge/layer "
        "| training µs/edge/layer | training atoms/s | × cheaper than eSCN-MD C64: step | an edge and layer "
        "| peak MiB of a step | kB/edge |"
    )
    print("|" + "---|" * 12)
    for name, worker in workers.items():
        n_edges, n_atoms, layers = (worker.facts[key] for key in ("n_edges", "n_atoms", "layers"))
        infer_s, train_s = median(times[name, "infer"]), median(times[name, "train"])
        ratio = median(b / a for a, b in zip(times[name, "train"], times[REFERENCE, "train"], strict=True))
        per, by_layer = 1e6 / n_edges, ratio * layers / facts["layers"]
        print(
            f"| {name} | {worker.facts['n_parameters']:,} | {layers} | {infer_s * per:.1f} | {train_s * per:.1f} "
            f"| {infer_s * per / layers:.1f} | {train_s * per / layers:.1f} | {n_atoms / train_s:.0f} | {ratio:.1f} "
            f"| {by_layer:.1f} | {peaks[name] / 1024:.0f} | {peaks[name] * 1.024 / n_edges:.1f} |"
        )
    others = [f"{n}: {w.facts['n_edges']:,}" for n, w in workers.items() if w.facts["n_edges"] != facts["n_edges"]]
    if others:
        print(f"\nOther numbers of edges: {'; '.join(others)}.")
    for peer in missing:
        print(f"\nNo rows of {install.remedy(peer)}")


if __name__ == "__main__":
    main()
