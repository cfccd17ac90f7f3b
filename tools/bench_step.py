"""What a training step costs beside the model, as markdown: DeepSpeed against a plain loop; recomputing; precision.

    OMP_NUM_THREADS=1 python tools/bench_step.py [--edges 20000] [--layers 3] [--rounds 15]

One batch of the shipped crystals, a potential of about 1 M parameters, one rank. Every variant steps once a round, in
turn, so that a busy machine slows all of them; times are CPU times of this process, ratios are medians over the rounds.
Memory is the growth of a fresh process's peak resident size over two steps.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from mffm import distributed
from mffm.config.base import load, validate
from mffm.config.data import DataConfig
from mffm.config.recipe import Recipe
from mffm.data.ingest import ingest
from mffm.data.loader import Loader
from mffm.optim import make_optimizer
from mffm.training.loop import _engine, train_step
from mffm.training.quarantine import LossWatch
from mffm.training.setup import Setup, Trainee, deepspeed_config, prepare, use_precision

ROOT = Path(__file__).parents[1]
BACKBONE = {"cutoff": 5.0, "channels": 128, "edge_channels": 48, "lmax": 2, "l_message": 1}
LABELS = ["energy", "forces", "stress"]
VARIANTS = {
    "plain loop": {},
    "DeepSpeed, ZeRO 0": {"deepspeed": {"zero_stage": 0}},
    "DeepSpeed, ZeRO 1": {"deepspeed": {"zero_stage": 1}},
    "DeepSpeed, ZeRO 2": {"deepspeed": {"zero_stage": 2}},
    "plain loop, activation checkpointing": {"train": {"activation_checkpointing": True}},
    "plain loop, bfloat16 products": {"train": {"precision": "bfloat16"}},
}


def recipe_of(store: Path, n_edges: int, layers: int, changes: dict) -> Recipe:
    pools = [{"fidelity": name, "properties": LABELS} for name in ("gfn1", "pbe_gpaw")]
    base = {
        "name": "bench",
        "data": {"store": str(store), "plan": {"pools": pools, "edge_budget": n_edges}},
        "model": {"backbone": {**BACKBONE, "layers": layers}, "conditioning": {"kind": "onehot"}},
        "train": {"steps": 10**6, "threads": 1, **changes.get("train", {})},
        "deepspeed": changes.get("deepspeed", {}),
    }
    return validate(Recipe, base, "bench_step")


def make_store(folder: Path) -> Path:
    path = ROOT / "configs" / "data" / "crystals.yaml"
    ingest(load(DataConfig, path), path.parent, folder / "store", progress=False)
    return folder / "store"


def stepper(name: str, store: Path, n_edges: int, layers: int) -> tuple[Callable[[], None], Setup, int]:
    """Return a function that does one step of a variant, and the edges of its batch."""
    recipe = recipe_of(store, n_edges, layers, VARIANTS[name])
    ranks = distributed.ranks_from_environment()
    setup = prepare(recipe)
    use_precision(setup.potential, recipe.train)
    loader = Loader(setup.store, setup.plan, setup.fidelities, setup.potential.cutoff)
    plan, batches, _ = next(loader)
    loader.close()
    trainee = Trainee(setup.potential, setup.loss, setup.spec.reference_table())
    if name.startswith("DeepSpeed"):
        engine, watch = _engine(trainee, recipe, deepspeed_config(recipe, ranks, 1)), LossWatch(None)
        return lambda: train_step(engine, setup, plan, batches, ranks, 1e-4, watch) and None, setup, batches[0].n_edges
    optimizer = make_optimizer(setup.potential, recipe.optim)
    divisors = setup.loss.divisors(plan.counts, setup.plan.expected_counts(plan.step))
    trainee.train()

    def plain() -> None:
        trainee(batches[0], divisors)[0].backward()
        torch.nn.utils.clip_grad_norm_(setup.potential.parameters(), recipe.optim.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return plain, setup, batches[0].n_edges


def peak(name: str, store: Path, n_edges: int, layers: int) -> None:
    step, _, _ = stepper(name, store, n_edges, layers)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        step()
    print("peak", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--edges", type=int, default=20000)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peak", nargs=2, metavar=("VARIANT", "STORE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        distributed.start(distributed.ranks_from_environment())
        peak(args.peak[0], Path(args.peak[1]), args.edges, args.layers)
        return
    distributed.tune_allocator()
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder))
        peaks = {}
        for name in VARIANTS:
            command = [sys.executable, __file__, "--edges", str(args.edges), "--layers", str(args.layers)]
            command += ["--peak", name, str(store)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[name] = float(done.stdout.split("peak")[-1])
        distributed.start(distributed.ranks_from_environment())
        steps = {}
        for name in VARIANTS:
            steps[name], setup, n_edges = stepper(name, store, args.edges, args.layers)
        times: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for i in range(args.rounds + 2):
            for name, step in steps.items():
                started = time.process_time()
                step()
                if i >= 2:
                    times[name].append(time.process_time() - started)
    n_parameters = setup.potential.n_parameters
    print(f"{n_parameters:,} parameters, {n_edges:,} edges a step, energy + forces + stress, one thread\n")
    print("| variant | CPU s/step | ratio to the plain loop | spread | peak memory, MiB | kB/edge |")
    print("|---|---|---|---|---|---|")
    base = times["plain loop"]
    for name, own in times.items():
        ratios = sorted(a / b for a, b in zip(own, base, strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        print(
            f"| {name} | {median(own):.3f} | {median(ratios):.3f} | {low:.2f}–{high:.2f} | {peaks[name]:.0f} "
            f"| {peaks[name] * 1024 / n_edges:.1f} |"
        )


if __name__ == "__main__":
    main()
