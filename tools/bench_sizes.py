"""The named sizes of the density backbone, as markdown: parameters, FLOPs, memory, throughput, place on the roofline.

    OMP_NUM_THREADS=1 python tools/bench_sizes.py [--sizes S,M,L] [--edges 3000] [--rounds 3] [--compile]

A conservative training step (energy, forces, stress; double backward, no optimiser) on shipped crystals, cutoff 5 Å,
float32, one thread. FLOPs are counted by formula (below), padding and whatever else the code does not count: a matrix
product x W costs 1 forward, 1 in the force pass, 2 + 2 in the backward of both. The roofline is that of this machine,
measured in the same run: the best matrix product of 256 to 1024 rows, the best copy of 256 MiB. Times are CPU times,
the median over the rounds. ``--compile``: by train.compile, minutes at the first start. Memory is the peak of the
resident size in a step above its start, in a fresh process; not told for a compiled step.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mffm import distributed
from mffm.batch import Batch
from mffm.config.base import load
from mffm.config.data import DataConfig
from mffm.config.model import SIZES, DensityConfig, ModelConfig
from mffm.data.ingest import ingest
from mffm.data.loader import collate
from mffm.data.store import Store
from mffm.keys import PROPERTIES
from mffm.models.density import DegreeLinear, DensityBackbone, Layer
from mffm.models.potential import Potential

sys.path.append(str(Path(__file__).parent / "peers"))
from speed import compiled_loss

ROOT = Path(__file__).parents[1]
CUTOFF = 5.0
FIDELITY = "pbe_gpaw"
LINEAR = 6  # a matrix product in a training step, in units of its forward
BILINEAR = 8  # a product of two features


def linear_flops(linear: DegreeLinear | None) -> float:
    """Return the forward FLOPs of an atom: 2 (2l + 1) × inputs × outputs, summed over degrees."""
    if linear is None:
        return 0.0
    return sum(2.0 * (2 * degree + 1) * w.numel() for degree, w in enumerate(linear.weights))


def layer_flops(layer: Layer, config: DensityConfig) -> tuple[float, float]:
    """Return the FLOPs of a training step in a layer: of an atom, of an edge."""
    width = (layer._l_in + 1) ** 2 * config.edge_channels  # numbers that a sender sends
    message, total = (config.lmax + 1) * width, 2 * (config.lmax + 1) ** 2 * width
    radial = 2 * layer.radial.numel()
    # density_sum: value M + S, gradient 5 M + 2 S, its gradient 12 M + 5 S
    edge = LINEAR * radial + 18.0 * message + 8.0 * total
    products, update = layer.products, layer.feed_forward
    linears = [layer.send, layer.receive, layer.gate, products.linear, products.square_linear, products.cube_linear]
    atom = LINEAR * sum(map(linear_flops, [*linears, update.up, update.down]))
    atom += LINEAR * 2.0 * int((layer._couple._master != 0).sum()) * config.edge_channels
    for product in (products.square_linear and products._square, products._cube):
        if product is not None:
            pairs, couplings = len(product._a._master), int((product._matrix._master != 0).sum())
            atom += BILINEAR * config.channels * (pairs + 2.0 * couplings)
    return atom, edge


def step_flops(potential: Potential, n_atoms: int, n_edges: int) -> float:
    """Return the useful FLOPs of a conservative training step."""
    backbone = potential.learned.backbone
    assert isinstance(backbone, DensityBackbone)
    heads = LINEAR * 2.0 * sum(p.numel() for p in potential.learned.heads.parameters())
    trunk = LINEAR * 2.0 * sum(w.numel() for w in backbone.trunk)
    per_atom, per_edge = heads, trunk
    for layer in backbone.layers:
        assert isinstance(layer, Layer)
        atom, edge = layer_flops(layer, backbone.config)
        per_atom, per_edge = per_atom + atom, per_edge + edge
    return n_atoms * per_atom + n_edges * per_edge


def best(work: float, function: Callable[[], object], rounds: int = 7) -> float:
    """Return work per CPU second, the best of some rounds."""
    rates = []
    for _ in range(rounds):
        started = time.process_time()
        function()
        rates.append(work / max(time.process_time() - started, 1e-9))
    return max(rates)


def roofline() -> tuple[float, float]:
    """Return FLOP/s of matrix products and bytes/s of a copy."""
    products = []
    for n in (256, 512, 1024):
        a, b, repeats = torch.randn(n, n), torch.randn(n, n), 2 * (1024 // n) ** 3
        products.append(best(2.0 * n**3 * repeats, lambda a=a, b=b, k=repeats: [a @ b for _ in range(k)]))
    x, y = torch.empty(2**26), torch.empty(2**26)
    x.fill_(1.0), y.fill_(0.0)
    return max(products), best(2 * 4 * 2.0**26, lambda: y.copy_(x))


def make(backbone: dict[str, Any], store: Path, n_edges: int) -> tuple[Potential, Batch]:
    opened = Store(store)
    config = ModelConfig.model_validate({"backbone": {**backbone, "cutoff": CUTOFF}})
    torch.manual_seed(0)
    potential = Potential(config, [FIDELITY], avg_neighbors=45.0, scale=1.0).train()
    rows = opened.rows(split="train", fidelity=FIDELITY)
    ends = opened.n_edges(CUTOFF)[rows].cumsum()
    rows = rows[: max(1, int(ends.searchsorted(n_edges)))]
    index = [opened.fidelities.index(FIDELITY)] * len(rows)
    batch = collate(opened, rows, index, opened.fidelities, [PROPERTIES] * len(rows), CUTOFF)
    return potential, batch.with_fidelity(torch.zeros(len(rows), dtype=torch.int64))


def measure(size: str, store: Path, n_edges: int, rounds: int, compiled: bool) -> dict[str, float]:
    potential, batch = make({"size": size}, store, n_edges)
    loss = compiled_loss(potential, batch, FIDELITY) if compiled else None

    def step() -> None:
        potential.zero_grad(set_to_none=True)
        if loss is not None:
            loss().backward()
            return
        p = potential(batch, forces=True, stress=True)
        assert p.forces is not None
        assert p.stress is not None
        (p.energy.square().mean() + p.forces.square().mean() + p.stress.square().mean()).backward()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if compiled:  # the compiler took more than a step does
        peak = float("nan")
        step()
    times = []
    for _ in range(rounds):
        started = time.process_time()
        step()
        times.append(time.process_time() - started)
    n_atoms = len(batch.atomic_numbers)
    flops, seconds = step_flops(potential, n_atoms, batch.n_edges), median(times)
    peak_flops, bandwidth = roofline()
    return {
        "parameters": potential.n_parameters, "n_atoms": n_atoms, "n_edges": batch.n_edges, "peak_mib": peak,
        "seconds": seconds, "flops": flops, "peak_flops": peak_flops, "bandwidth": bandwidth,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--edges", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="measure the compiled step")
    parser.add_argument("--measure", nargs=2, metavar=("SIZE", "STORE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    distributed.tune_allocator()
    if args.measure:
        print(json.dumps(measure(args.measure[0], Path(args.measure[1]), args.edges, args.rounds, args.compile)))
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        data = ROOT / "configs" / "data" / "crystals.yaml"
        store = Path(folder) / "store"
        ingest(load(DataConfig, data), data.parent, store, progress=False)
        for size in args.sizes.split(","):
            command = [sys.executable, __file__, "--edges", str(args.edges), "--rounds", str(args.rounds)]
            command += ["--compile"] if args.compile else []
            done = subprocess.run([*command, "--measure", size, str(store)], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{size}: {done.stderr[-2000:]}")
            found[size] = json.loads(done.stdout.splitlines()[-1])
    first = next(iter(found.values()))
    print(
        f"{first['n_edges']:,} edges, {first['n_atoms']} atoms; one thread: "
        f"{first['peak_flops'] / 1e9:.0f} GFLOP/s, {first['bandwidth'] / 1e9:.0f} GB/s\n"
    )
    print(
        "| size | parameters | useful MFLOP/edge of a step | kB/edge | MiB/atom | step, CPU s | atoms/s | GFLOP/s "
        "| of the peak |"
    )
    print("|" + "---|" * 9)
    for size, m in found.items():
        rate = m["flops"] / m["seconds"]
        print(
            f"| {size} | {m['parameters'] / 1e6:.2f} M | {m['flops'] / m['n_edges'] / 1e6:.1f} "
            f"| {m['peak_mib'] * 1024 / m['n_edges']:.1f} | {m['peak_mib'] / m['n_atoms']:.2f} | {m['seconds']:.2f} "
            f"| {m['n_atoms'] / m['seconds']:.0f} | {rate / 1e9:.1f} | {100 * rate / m['peak_flops']:.0f} % |"
        )


if __name__ == "__main__":
    main()
