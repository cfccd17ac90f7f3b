"""Backbones side by side on the same frames, as markdown: CPU µs per edge and layer, atoms/s, peak memory.

    OMP_NUM_THREADS=1 python tools/bench_backbones.py [--edges 6000] [--rounds 5] [--compiled]

Shipped crystals, cutoff 5 Å, energy + forces + stress, float32, one thread, the same allocator setting for all. Every
backbone does one inference and one training step (double backward, no optimiser) a round, in turn; times are CPU times,
the median over the rounds, and ratios are of a round's. Memory is the growth of a fresh process's peak resident size.
eSCN-MD is fairchem's own code behind this package's edges and heads.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from mffm import distributed
from mffm.config.base import load
from mffm.config.data import DataConfig
from mffm.config.model import ModelConfig
from mffm.config.recipe import LossConfig, TermConfig
from mffm.data.ingest import ingest
from mffm.data.loader import collate
from mffm.data.store import Store
from mffm.keys import PROPERTIES
from mffm.loss import Loss
from mffm.models.potential import Potential
from mffm.training.compiled import CompiledStep

ROOT = Path(__file__).parents[1]
CUTOFF = 5.0
FIDELITY = "pbe_gpaw"
BACKBONES = {
    "density, C64, lmax 2": {"channels": 64, "edge_channels": 64},
    "density, C64, lmax 2, 32 on edges (default)": {"channels": 64, "edge_channels": 32},
    "density, C128, lmax 3, 48 on edges": {"channels": 128, "edge_channels": 48, "lmax": 3},
    "eSCN-MD, C64, lmax 2, mmax 2": {"kind": "escn", "sphere_channels": 64, "hidden_channels": 64, "edge_channels": 64},
    "eSCN-MD, C128, lmax 2, mmax 2": {
        "kind": "escn", "sphere_channels": 128, "hidden_channels": 128, "edge_channels": 128,
    },
}  # fmt: skip
REFERENCE = "eSCN-MD, C64, lmax 2, mmax 2"
LAYERS = 2


def make(name: str, store: Path, n_edges: int):
    """Return a potential and a batch of about ``n_edges`` edges."""
    opened = Store(store)
    config = ModelConfig.model_validate({"backbone": {"cutoff": CUTOFF, "layers": LAYERS, **BACKBONES[name]}})
    torch.manual_seed(0)
    potential = Potential(config, [FIDELITY], avg_neighbors=45.0, scale=1.0)
    rows = opened.rows(split="train", fidelity=FIDELITY)
    ends = opened.n_edges(CUTOFF)[rows].cumsum()
    rows = rows[: max(1, int(ends.searchsorted(n_edges)))]
    table = opened.fidelities
    n = len(rows)
    index = [table.index(FIDELITY)] * n
    batch = collate(opened, rows, index, table, [PROPERTIES] * n, CUTOFF)
    return potential, batch.with_fidelity(torch.zeros(n, dtype=torch.int64))


def infer(potential: Potential, batch) -> None:
    potential.eval()
    potential(batch, forces=True, stress=True)


def train(potential: Potential, batch) -> None:
    potential.train()
    potential.zero_grad(set_to_none=True)
    p = potential(batch, forces=True, stress=True)
    (p.energy.square().mean() + p.forces.square().mean() + p.stress.square().mean()).backward()


class Compiled:
    """A compiled training step with the same labels and the same kind of loss; useful edges count, not slots."""

    def __init__(self, potential: Potential, batch):
        term = TermConfig(form="mse")
        self.potential, self.batch = potential, batch
        batch.masks = {p: torch.ones(batch.n_systems, dtype=torch.bool) for p in PROPERTIES}
        loss = Loss(LossConfig(energy=term, forces=term, stress=term), [FIDELITY], {(0, p): 1 for p in PROPERTIES})
        self.divisors = loss.divisors({(0, p): float(batch.n_systems) for p in PROPERTIES}, {})
        self.reference = torch.zeros(batch.n_systems, dtype=torch.float64)
        self.step = CompiledStep(potential, loss, batch.n_edges / len(batch.atomic_numbers))

    def __call__(self) -> None:
        self.potential.zero_grad(set_to_none=True)
        self.step(list(self.potential.parameters()), self.batch, self.reference, self.divisors)[0].backward()


def peak(name: str, store: Path, n_edges: int) -> None:
    potential, batch = make(name, store, n_edges)
    infer(potential, batch)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    train(potential, batch)
    print("peak", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--edges", type=int, default=6000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="also compiled training steps; minutes the first time")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    distributed.tune_allocator()
    if args.peak:
        peak(args.peak[0], Path(args.peak[1]), args.edges)
        return
    with tempfile.TemporaryDirectory() as folder:
        data = ROOT / "configs" / "data" / "crystals.yaml"
        store = Path(folder) / "store"
        ingest(load(DataConfig, data), data.parent, store, progress=False)
        peaks = {}
        for name in BACKBONES:
            command = [sys.executable, __file__, "--edges", str(args.edges), "--peak", name, str(store)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[name] = float(done.stdout.split("peak")[-1])
        made = {name: make(name, store, args.edges) for name in BACKBONES}
        compiled = {}
        if args.compiled:
            compiled = {n: Compiled(*made[n]) for n in BACKBONES if BACKBONES[n].get("kind", "density") == "density"}
        times: dict[tuple[str, str], list[float]] = {}
        for i in range(args.rounds + 1):
            for name, (potential, batch) in made.items():
                for what, function in (("infer", infer), ("train", train)):
                    started = time.process_time()
                    function(potential, batch)
                    if i:
                        times.setdefault((name, what), []).append(time.process_time() - started)
                if name in compiled:
                    started = time.process_time()
                    compiled[name]()
                    if i:
                        times.setdefault((name, "compiled"), []).append(time.process_time() - started)
    batch = made[REFERENCE][1]
    n_edges, n_atoms = batch.n_edges, len(batch.atomic_numbers)
    print(f"{n_edges:,} edges, {n_atoms} atoms, {LAYERS} layers\n")
    print(
        "| backbone | parameters | inference µs/edge/layer | training µs/edge/layer | training atoms/s "
        "| × cheaper than eSCN-MD C64 | peak MiB of a step | kB/edge/layer |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, (potential, _) in made.items():
        infer_s, train_s = median(times[name, "infer"]), median(times[name, "train"])
        ratio = median(b / a for a, b in zip(times[name, "train"], times[REFERENCE, "train"], strict=True))
        per = 1e6 / n_edges / LAYERS
        kb = peaks[name] * 1024 / n_edges / LAYERS
        print(
            f"| {name} | {potential.n_parameters:,} | {infer_s * per:.1f} | {train_s * per:.1f} "
            f"| {n_atoms / train_s:.0f} | {ratio:.1f} | {peaks[name]:.0f} | {kb:.1f} |"
        )
    for name, step in compiled.items():
        seconds = median(times[name, "compiled"])
        ratio = median(b / a for a, b in zip(times[name, "compiled"], times[REFERENCE, "train"], strict=True))
        eager = median(b / a for a, b in zip(times[name, "compiled"], times[name, "train"], strict=True))
        print(
            f"| {name}; {step.step.summary()} | | | {seconds * per:.1f}, {eager:.1f} × cheaper than eager "
            f"| {n_atoms / seconds:.0f} | {ratio:.1f} | | |"
        )


if __name__ == "__main__":
    main()
