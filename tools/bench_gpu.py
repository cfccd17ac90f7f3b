"""Training on a GPU, as markdown: throughput, memory, share of the roofline, and what the time goes into.

    python tools/bench_gpu.py [--edges 25000,100000,400000] [--profile]
    python tools/bench_gpu.py --loop [--edges 400000] [--neighbors device]

The potential is the density backbone with C128, lmax 3, 3 layers and linear radial functions. A step is conservative
(energy, forces, stress; double backward), on copies of the shipped crystals, without the optimiser. Times are wall
times between synchronisations, the median over the rounds; peak products and copies are measured in the same process.
``--loop`` trains by `mffm train` on the same structures instead: DeepSpeed, optimiser, neighbor lists and loading.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
import yaml
from bench_sizes import CUTOFF, FIDELITY, step_flops

from mffm.batch import Batch
from mffm.config.base import load
from mffm.config.data import DataConfig
from mffm.config.model import ModelConfig
from mffm.data.ingest import ingest
from mffm.data.loader import collate
from mffm.data.store import Store, count_edges
from mffm.keys import PROPERTIES
from mffm.models.potential import Potential

ROOT = Path(__file__).parents[1]
BACKBONE = {
    "cutoff": CUTOFF, "channels": 128, "edge_channels": 48, "lmax": 3, "l_message": 1, "layers": 3, "radial_hidden": 0,
}  # fmt: skip


def make_store(folder: Path) -> Path:
    data = ROOT / "configs" / "data" / "crystals.yaml"
    ingest(load(DataConfig, data), data.parent, folder / "store", progress=False)
    count_edges(folder / "store", CUTOFF)
    return folder / "store"


def make_batch(store: Store, n_edges: int) -> Batch:
    """Return crystals with about so many edges, all of them once before any is there again."""
    rows = store.rows(split="train", fidelity=FIDELITY)
    counts = store.n_edges(CUTOFF)[rows]
    many = np.tile(rows, 1 + n_edges // int(counts.sum()))
    chosen = many[: int(np.tile(counts, len(many) // len(rows)).cumsum().searchsorted(n_edges))]
    index = [store.fidelities.index(FIDELITY)] * len(chosen)
    batch = collate(store, chosen, index, store.fidelities, [PROPERTIES] * len(chosen), CUTOFF)
    return batch.with_fidelity(torch.zeros(len(chosen), dtype=torch.int64))


def seconds(function: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return median(times)


def roofline() -> tuple[float, float]:
    """Return FLOP/s of float32 products as they are set now, and bytes/s of a copy."""
    a, b = torch.randn(8192, 8192, device="cuda"), torch.randn(8192, 8192, device="cuda")
    x, y = torch.randn(2**28, device="cuda"), torch.empty(2**28, device="cuda")
    product, copy = (lambda: a @ b), (lambda: y.copy_(x))
    product(), copy()
    return 2.0 * 8192**3 / seconds(product, 5), 2 * 4 * 2.0**28 / seconds(copy, 5)


def steps(sizes: list[int], rounds: int, profile: bool) -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        store = Store(make_store(Path(folder)))
        batches = [make_batch(store, n) for n in sizes]
    print(
        "\n| products | atoms | edges | ms a step | atoms/s | M edges/s | peak GiB | kB/edge | TFLOP/s | of the peak |"
    )
    print("|" + "---|" * 10)
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        peak_flops, bandwidth = roofline()
        torch.manual_seed(0)
        config = ModelConfig.model_validate({"backbone": BACKBONE})
        potential = Potential(config, [FIDELITY], avg_neighbors=45.0, scale=1.0).train().cuda()
        for host in batches:
            batch = host.to("cuda")

            def step(batch: Batch = batch, potential: Potential = potential) -> None:
                potential.zero_grad(set_to_none=True)
                p = potential(batch, forces=True, stress=True)
                assert p.forces is not None
                assert p.stress is not None
                (p.energy.square().mean() + p.forces.square().mean() + p.stress.square().mean()).backward()

            step()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            took = seconds(step, rounds)
            peak = torch.cuda.max_memory_allocated() - before
            n_atoms, n_edges = len(batch.atomic_numbers), batch.n_edges
            rate = step_flops(potential, n_atoms, n_edges) / took
            print(
                f"| {'float32' if precision == 'highest' else 'tf32'} | {n_atoms:,} | {n_edges:,} | {1e3 * took:.1f} "
                f"| {n_atoms / took:,.0f} | {n_edges / took / 1e6:.2f} | {peak / 2**30:.1f} "
                f"| {peak / n_edges / 1e3:.1f} "
                f"| {rate / 1e12:.1f} | {100 * rate / peak_flops:.0f} % |",
                flush=True,
            )
        if profile:
            with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as found:
                step()
                torch.cuda.synchronize()
            print(found.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=60))
        print(f"\nproducts {peak_flops / 1e12:.0f} TFLOP/s, copy {bandwidth / 1e12:.2f} TB/s\n")


def loop(n_edges: int, neighbors: str) -> None:
    """Train a few steps by the command line and print the rates that it logs."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = {
            "name": "bench",
            "run": f"{folder}/run",
            "data": {
                "store": str(make_store(Path(folder))),
                "plan": {"pools": [{"fidelity": FIDELITY, "properties": list(PROPERTIES)}], "edge_budget": n_edges},
                "neighbors": neighbors,
            },
            "model": {"backbone": BACKBONE},
            "train": {"steps": 40, "validate_every": 40, "save_every": 40, "log_every": 5},
            "log": {"wandb": "disabled"},
        }
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        done = subprocess.run([sys.executable, "-m", "mffm", "train", str(path)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        print(next((line for line in done.stderr.splitlines() if "preflight" in line), ""))
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
        rates = [row["atoms_per_s"] for row in rows if "atoms_per_s" in row][2:]
        print(f"mffm train, {n_edges:,} edges a step, data.neighbors: {neighbors}: {median(rates):,.0f} atoms/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--edges", default="25000,100000,400000")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="and the kernels that take the time")
    parser.add_argument("--loop", action="store_true", help="train by mffm train instead")
    parser.add_argument("--neighbors", choices=("cpu", "device"), default="cpu", help="with --loop: data.neighbors")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU")
    sizes = [int(n) for n in args.edges.split(",")]
    if args.loop:
        loop(max(sizes), args.neighbors)
    else:
        steps(sizes, args.rounds, args.profile)


if __name__ == "__main__":
    main()
