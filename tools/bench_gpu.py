"""Training on a GPU, as markdown: throughput, memory, share of the roofline, and what the time goes into.

    python tools/bench_gpu.py [--edges 25000,100000,400000] [--profile]
    python tools/bench_gpu.py --compile [--backbone default]
    python tools/bench_gpu.py --loop [--edges 400000] [--neighbors device]

The potential is the density backbone with C128, lmax 3, 3 layers and linear radial functions, or the default one. A
step is conservative (energy, forces, stress; double backward), on copies of the shipped crystals, without the
optimiser. ``--compile`` adds rows of ``train.compile``, whose numbers must be those of the eager step. Times are wall
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
from torch import Tensor

from mffm.batch import Batch
from mffm.config.base import load
from mffm.config.data import DataConfig
from mffm.config.model import ModelConfig
from mffm.config.recipe import LossConfig, TermConfig
from mffm.data.ingest import ingest
from mffm.data.loader import collate
from mffm.data.store import Store, count_edges
from mffm.keys import PROPERTIES
from mffm.loss import Loss
from mffm.models.potential import Potential
from mffm.training.compiled import CompiledStep

ROOT = Path(__file__).parents[1]
BACKBONES = {
    "large": {
        "cutoff": CUTOFF, "channels": 128, "edge_channels": 48, "lmax": 3, "l_message": 1, "layers": 3,
        "radial_hidden": 0,
    },
    "default": {"cutoff": CUTOFF},
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


def make_step(potential: Potential, batch: Batch, compiled: CompiledStep | None, loss: Loss) -> Callable[[], Tensor]:
    """Return a function that computes the mean squares of energy, forces and stress and their gradients."""
    n = batch.n_systems
    batch.masks = {p: torch.ones(n, dtype=torch.bool, device="cuda") for p in PROPERTIES}
    divisors = loss.divisors({(0, p): float(n) for p in PROPERTIES}, {}).cuda()
    reference = torch.zeros(n, dtype=torch.float64, device="cuda")

    def step() -> Tensor:
        potential.zero_grad(set_to_none=True)
        if compiled is not None:
            value, _ = compiled(list(potential.parameters()), batch, reference, divisors)
        else:
            value, _ = loss(potential(batch, forces=True, stress=True), batch, reference, divisors)
        value.backward()
        return value.detach()

    return step


def gradient(potential: Potential) -> Tensor:
    return torch.cat([p.grad.flatten() for p in potential.parameters() if p.grad is not None])


def steps(backbone: str, sizes: list[int], rounds: int, profile: bool, compiled: bool) -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, backbone {backbone}")
    with tempfile.TemporaryDirectory() as folder:
        store = Store(make_store(Path(folder)))
        batches = [make_batch(store, n) for n in sizes]
    print("\n| step | atoms | edges | ms | atoms/s | M edges/s | peak GiB | kB/edge | TFLOP/s | of the peak |")
    print("|" + "---|" * 10)
    term = TermConfig(form="mse")
    loss = Loss(LossConfig(energy=term, forces=term, stress=term), [FIDELITY], {(0, p): 1 for p in PROPERTIES})
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        peak_flops, bandwidth = roofline()
        torch.manual_seed(0)
        config = ModelConfig.model_validate({"backbone": BACKBONES[backbone]})
        potential = Potential(config, [FIDELITY], avg_neighbors=45.0, scale=1.0).train().cuda()
        function = CompiledStep(potential, loss, potential.avg_neighbors) if compiled else None
        for host in batches:
            expected: Tensor | None = None
            for kind in (None, function) if compiled else (None,):
                step = make_step(potential, host.to("cuda"), kind, loss)
                step()
                if expected is None:
                    expected = gradient(potential)
                worst = float((gradient(potential) - expected).abs().max() / expected.abs().max())
                assert worst < (1e-4 if precision == "highest" else 1e-2), f"compiled gradients differ by {worst:.1e}"
                name = ("float32" if precision == "highest" else "tf32") + (", compiled" if kind else "")
                print(row(name, step, potential, host, rounds, peak_flops), flush=True)
        if function is not None:
            print(f"\n{function.summary()}")
        if profile:
            with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as found:
                step()
                torch.cuda.synchronize()
            print(found.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=60))
        print(f"\nproducts {peak_flops / 1e12:.0f} TFLOP/s, copy {bandwidth / 1e12:.2f} TB/s\n")


def row(name: str, step: Callable[[], Tensor], potential: Potential, batch: Batch, rounds: int, peak: float) -> str:
    """Return a row of the table; ``peak``: FLOP/s of products."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    took = seconds(step, rounds)
    memory = torch.cuda.max_memory_allocated() - before
    n_atoms, n_edges = len(batch.atomic_numbers), batch.n_edges
    rate = step_flops(potential, n_atoms, n_edges) / took
    return (
        f"| {name} | {n_atoms:,} | {n_edges:,} | {1e3 * took:.1f} | {n_atoms / took:,.0f} | {n_edges / took / 1e6:.2f} "
        f"| {memory / 2**30:.1f} | {memory / n_edges / 1e3:.1f} | {rate / 1e12:.1f} | {100 * rate / peak:.0f} % |"
    )


def loop(backbone: str, n_edges: int, neighbors: str) -> None:
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
            "model": {"backbone": BACKBONES[backbone]},
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
    parser.add_argument("--backbone", choices=tuple(BACKBONES), default="large")
    parser.add_argument("--compile", action="store_true", help="beside it the step that train.compile makes; minutes")
    parser.add_argument("--profile", action="store_true", help="and the kernels that take the time")
    parser.add_argument("--loop", action="store_true", help="train by mffm train instead")
    parser.add_argument("--neighbors", choices=("cpu", "device"), default="cpu", help="with --loop: data.neighbors")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU")
    sizes = [int(n) for n in args.edges.split(",")]
    if args.loop:
        loop(args.backbone, max(sizes), args.neighbors)
    else:
        steps(args.backbone, sizes, args.rounds, args.profile, args.compile)


if __name__ == "__main__":
    main()
