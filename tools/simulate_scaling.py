"""Step time and straggler waste of 1 to 1,024 ranks, simulated from the plan's own partition of real frame sizes.

    python tools/simulate_scaling.py                                   # shipped molecules and crystals
    MFFM_DATA=/path/to/data python tools/simulate_scaling.py           # and $MFFM_DATA/mattersim_pbe/*.xyz
    python tools/simulate_scaling.py --measure                         # and a check against 1 and 2 gloo ranks

A rank's time is  microbatches × t0 + c_edge × edges + c_atom × atoms,  measured here on one core for each set: forward
and double backward of the default potential. A step takes what its slowest rank takes, plus one all-reduce of the
gradient (alpha-beta: the better of a ring and a double tree) and the optimiser. DeepSpeed's own work is not in it.
``--device-speedup`` divides the measured compute, for a device that was not measured. ``planned waste`` is what the
partition leaves unequal; ``waste`` adds that microbatches differ by what edges and atoms do not explain (the spread).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import ase.io
import numpy as np
import torch

from mffm.config.model import ModelConfig
from mffm.config.recipe import PlanConfig
from mffm.data.loader import pack
from mffm.data.neighbors import count
from mffm.data.plan import Plan, Pool, StepPlan
from mffm.distributed import tune_allocator
from mffm.models.potential import Potential

ROOT = Path(__file__).parents[1]
MODEL = ModelConfig()
CUTOFF = MODEL.backbone.cutoff
WORLDS = (1, 2, 8, 64, 256, 1024)
FRAMES_PER_RANK = 64  # weak scaling
FRAMES = 4096  # strong scaling

Geometry = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Cost:
    """Seconds of one rank on one core; ``spread`` is relative, of a microbatch."""

    fixed: float
    edge: float
    atom: float
    spread: float
    optimiser: float
    gradient_bytes: int

    def compute(self, n_microbatches: int, n_edges: np.ndarray, n_atoms: np.ndarray) -> np.ndarray:
        return self.fixed * n_microbatches + self.edge * n_edges + self.atom * n_atoms


@dataclass(frozen=True)
class Network:
    """alpha: seconds of a message; beta: seconds of a byte, of one rank's link."""

    alpha: float
    beta: float

    def all_reduce(self, world: int, n_bytes: int) -> float:
        if world == 1:
            return 0.0
        ring = 2 * (world - 1) * self.alpha + 2 * (world - 1) / world * n_bytes * self.beta
        tree = 2 * np.ceil(np.log2(world)) * self.alpha + 2 * n_bytes * self.beta
        return float(min(ring, tree))


# Frames


def read(path: Path, most: int = 600) -> list[Geometry]:
    frames = ase.io.read(path, index=f":{most}", format="extxyz")
    return [(a.numbers, a.positions, a.cell.array, a.pbc) for a in frames]


def frame_sets() -> dict[str, list[Geometry]]:
    sets = {name: read(ROOT / "data" / f"{name}.extxyz") for name in ("molecules", "crystals")}
    if os.environ.get("MFFM_DATA"):
        for path in sorted(Path(os.environ["MFFM_DATA"]).glob("mattersim_pbe/*.xyz")):
            sets[path.stem] = read(path)
    return sets


def sizes(geometries: list[Geometry]) -> tuple[np.ndarray, np.ndarray]:
    n_edges = [count(positions, cell, pbc, CUTOFF) for _, positions, cell, pbc in geometries]
    return np.array([len(g[0]) for g in geometries], np.int32), np.array(n_edges, np.int32)


def plan_of(n_atoms: np.ndarray, n_edges: np.ndarray, budget: int) -> Plan:
    live = np.full(len(n_edges), 3, np.uint8)
    pool = Pool("all", "all", 0, np.arange(len(n_edges)), n_atoms, n_edges, live, ("energy", "forces"))
    return Plan([pool], PlanConfig(pools=[{"fidelity": "all"}], edge_budget=budget, oversize="skip"), seed=0)


# Costs of this machine


def potential(avg_neighbors: float) -> Potential:
    torch.manual_seed(0)
    return Potential(MODEL, ["all"], avg_neighbors=avg_neighbors, scale=1.0).train()


def forward_backward(model: Potential, geometries: list[Geometry]) -> float:
    """Return the CPU seconds of one microbatch; packing is the loader's and not counted."""
    batch = pack(geometries, [0] * len(geometries), CUTOFF)
    started = time.process_time()
    prediction = model(batch, forces=True)
    (prediction.energy.mean() + prediction.forces.square().mean()).backward()
    return time.process_time() - started


def measure_costs(sets: dict[str, list[Geometry]], rounds: int) -> dict[str, Cost]:
    """Fit the cost of microbatches of 2 to 32 frames; relative least squares, so that small ones count too.

    Inside a set edges are proportional to atoms, so edge and atom are told apart over all sets, and each set gets a
    factor of its own (the padding of neighbor slots).
    """
    rng = np.random.default_rng(0)
    model = potential(30.0)
    rows: list[list[float]] = []
    seconds: list[float] = []
    names: list[str] = []
    for name, geometries in sets.items():
        n_atoms, n_edges = sizes(geometries)
        forward_backward(model, geometries[:8])
        for n in (2, 4, 8, 16, 32) * 2:
            chosen = rng.integers(len(geometries), size=n)
            rows.append([1.0, float(n_edges[chosen].sum()), float(n_atoms[chosen].sum())])
            seconds.append(min(forward_backward(model, [geometries[i] for i in chosen]) for _ in range(rounds)))
            names.append(name)
    table, times = np.array(rows), np.array(seconds)
    fixed, edge, atom = _positive_least_squares(table / times[:, None], np.ones(len(times))).tolist()
    ratio = times / (table @ [fixed, edge, atom])
    optimiser = torch.optim.AdamW(model.parameters(), foreach=True)
    optimiser.step()
    started = time.process_time()
    for _ in range(5):
        optimiser.step()
    step = (time.process_time() - started) / 5
    n_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    costs = {}
    for name in sets:
        own = ratio[np.array(names) == name]
        k = float(own.mean())
        costs[name] = Cost(k * fixed, k * edge, k * atom, float(own.std() / k), step, n_bytes)
    return costs


def _positive_least_squares(table: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    from scipy.optimize import nnls

    scale = np.linalg.norm(table, axis=0)
    return nnls(table / scale, wanted)[0] / scale


# Simulation


def rank_loads(step: StepPlan, world: int, n_microbatches: int) -> tuple[np.ndarray, np.ndarray]:
    """Return edges and atoms of every rank and microbatch. [world, n_microbatches]"""
    bins = step.partition(world, n_microbatches)
    return tuple(np.array([[sizes[b].sum() for b in rank] for rank in bins]) for sizes in (step.n_edges, step.n_atoms))  # type: ignore[return-value]


def simulate(
    plan: Plan, world: int, n_microbatches: int, cost: Cost, network: Network, speedup: float, n_steps: int = 6
) -> dict[str, float]:
    """Return means over steps, in seconds and fractions."""
    rng = np.random.default_rng(0)
    cursor, found = plan.start(), []
    reduce = network.all_reduce(world, cost.gradient_bytes)
    for _ in range(n_steps):
        step, cursor = plan.step(cursor)
        n_edges, n_atoms = rank_loads(step, world, n_microbatches)
        each = cost.compute(1, n_edges, n_atoms) / speedup
        planned = each.sum(axis=1)
        spread = (each * np.clip(rng.normal(1, cost.spread, each.shape), 0.5, 1.5)).sum(axis=1)
        found.append(
            {
                "frames": len(step) / world,
                "edges": step.n_edges.sum(),
                "planned_waste": 1 - planned.mean() / planned.max(),
                "waste": 1 - spread.mean() / spread.max(),
                "compute": spread.max(),
                "step": spread.max() + reduce + cost.optimiser / speedup,
            }
        )
    return {key: float(np.mean([f[key] for f in found])) for key in found[0]} | {"reduce": reduce}


def report(
    sets: dict[str, list[Geometry]], costs: dict[str, Cost], network: Network, speedup: float, worlds: tuple[int, ...]
) -> None:
    print("| sizes | scaling | ranks | frames/rank | compute ms | all-reduce ms | step ms | planned waste % | waste % | efficiency % |")  # fmt: skip  # noqa: E501
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, geometries in sets.items():
        n_atoms, n_edges = sizes(geometries)
        for scaling in ("weak", "strong"):
            first = 0.0
            for world in worlds:
                frames = FRAMES_PER_RANK * world if scaling == "weak" else FRAMES
                plan = plan_of(n_atoms, n_edges, int(frames * n_edges.mean()))
                # microbatches of 32 frames where there are as many
                n_microbatches = max(1, -(-frames // (world * 32)))
                r = simulate(plan, world, n_microbatches, costs[name], network, speedup)
                rate = r["edges"] / r["step"]
                first = first or rate
                print(
                    f"| {name} | {scaling} | {world} | {r['frames']:.0f} | {1e3 * r['compute']:.1f} | "
                    f"{1e3 * r['reduce']:.2f} | {1e3 * r['step']:.1f} | {100 * r['planned_waste']:.1f} | "
                    f"{100 * r['waste']:.1f} | {100 * rate / first / world * worlds[0]:.0f} |"
                )


# The check: the same steps on real gloo ranks


def worker(rank: int, world: int, folder: Path, frames: int, n_steps: int) -> None:
    """Take steps as one of the ranks; rank 0 writes what they took."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    tune_allocator()
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{world}", rank=rank, world_size=world)
    geometries = read(ROOT / "data" / "molecules.extxyz")
    n_atoms, n_edges = sizes(geometries)
    plan = plan_of(n_atoms, n_edges, int(frames * n_edges.mean()))
    n_microbatches = max(1, frames // (32 * world))
    model = potential(30.0)
    optimiser = torch.optim.AdamW(model.parameters(), foreach=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    cursor, rows = plan.start(), []
    for _ in range(n_steps):
        step, cursor = plan.step(cursor)
        mine = step.partition(world, n_microbatches)[rank]
        batches = [pack([geometries[i] for i in step.rows[m]], [0] * len(m), CUTOFF) for m in mine if len(m)]
        dist.barrier()
        started, cpu = time.perf_counter(), time.process_time()
        for batch in batches:
            prediction = model(batch, forces=True)
            (prediction.energy.mean() + prediction.forces.square().mean()).backward()
        cpu_compute = time.process_time() - cpu
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        optimiser.step()
        optimiser.zero_grad()
        dist.barrier()
        wall = time.perf_counter() - started
        both = torch.zeros(world, dtype=torch.float64)
        both[rank] = cpu_compute
        dist.all_reduce(both)
        rows.append({"wall": wall, "cpu": both.max().item()})
    reduces = {}
    for n in (1024, 1024 * 1024, 8 * 1024 * 1024):
        flat, times = torch.zeros(n), []
        for _ in range(8):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(flat)
            times.append(time.perf_counter() - started)
        reduces[4 * n] = min(times)
    if rank == 0:
        (folder / f"world-{world}.json").write_text(json.dumps({"rows": rows[2:], "reduces": reduces}))
    dist.destroy_process_group()


def check(cost: Cost, frames: int = 128, n_steps: int = 10) -> None:
    """Print what the simulation says of 1 and 2 gloo ranks beside what they take."""
    geometries = read(ROOT / "data" / "molecules.extxyz")
    plan = plan_of(*sizes(geometries), int(frames * sizes(geometries)[1].mean()))
    print("\n| ranks | all-reduce measured ms | CPU ms of the slowest rank: simulated | measured (best) | ratio | step ms: simulated | measured (best) | measured (median) |")  # fmt: skip  # noqa: E501
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for world in (1, 2):
            command = [sys.executable, __file__, "--worker", str(world), "--folder", name]
            command += ["--frames", str(frames), "--steps", str(n_steps + 2)]
            ranks = [
                subprocess.Popen([*command, "--rank", str(r)], env={**os.environ, "OMP_NUM_THREADS": "1"})
                for r in range(world)
            ]
            codes = [p.wait() for p in ranks]
            if any(codes):
                sys.exit("a rank of the check failed")
            found = json.loads((folder / f"world-{world}.json").read_text())
            (small, t_small), *_, (large, t_large) = ((int(k), v) for k, v in found["reduces"].items())
            beta = max((t_large - t_small) / (large - small), 0.0)
            gloo = Network(alpha=t_small / 2, beta=beta)
            simulated = simulate(plan, world, max(1, frames // (32 * world)), cost, gloo, 1.0, n_steps)
            cpu, wall = ([r[k] for r in found["rows"]] for k in ("cpu", "wall"))
            print(
                f"| {world} | {1e3 * gloo.all_reduce(world, cost.gradient_bytes):.2f} | "
                f"{1e3 * simulated['compute']:.0f} | {1e3 * min(cpu):.0f} | {simulated['compute'] / min(cpu):.2f} | "
                f"{1e3 * simulated['step']:.0f} | {1e3 * min(wall):.0f} | {1e3 * np.median(wall):.0f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="check against 1 and 2 gloo ranks of this machine")
    parser.add_argument("--alpha-us", type=float, default=15.0, help="latency of a message between ranks")
    parser.add_argument("--bandwidth-gb-s", type=float, default=10.0, help="of one rank's link, GB/s")
    parser.add_argument("--device-speedup", type=float, default=1.0, help="of a rank over one core of this machine")
    parser.add_argument("--sets", nargs="*", default=[], help="only these")
    parser.add_argument("--max-ranks", type=int, default=WORLDS[-1])
    parser.add_argument("--rounds", type=int, default=3, help="measurements of a microbatch, of which the best counts")
    for name in ("--worker", "--rank", "--frames", "--steps"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.rank, given.worker, given.folder, given.frames, given.steps)
        return
    torch.set_num_threads(1)
    tune_allocator()
    sets = {k: v for k, v in frame_sets().items() if not given.sets or k in given.sets}
    costs = measure_costs(sets, given.rounds)
    ratio = {name: np.divide(*[n.sum() for n in sizes(geometries)[::-1]]) for name, geometries in sets.items()}
    network = Network(1e-6 * given.alpha_us, 1e-9 / given.bandwidth_gb_s)
    print("| sizes | edges/atom | t0 ms | µs/edge | µs/atom | spread % | optimiser ms | gradient MB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, c in costs.items():
        print(
            f"| {name} | {ratio[name]:.0f} | {1e3 * c.fixed:.1f} | {1e6 * c.edge:.2f} | {1e6 * c.atom:.1f} | "
            f"{100 * c.spread:.1f} | {1e3 * c.optimiser:.1f} | {c.gradient_bytes / 1e6:.2f} |"
        )
    print(
        f"\nNetwork: {given.alpha_us:g} µs, {given.bandwidth_gb_s:g} GB/s a rank. "
        f"Device: {given.device_speedup:g} × this core.\n"
    )
    report(sets, costs, network, given.device_speedup, tuple(w for w in WORLDS if w <= given.max_ranks))
    if given.measure:
        if "molecules" not in costs:
            parser.error("--measure needs the set molecules")
        check(costs["molecules"])


if __name__ == "__main__":
    main()
