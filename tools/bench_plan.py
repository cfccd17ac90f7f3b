"""What the plan and the packing of batches cost, as markdown: imbalance between ranks, time per step, time per edge.

    python tools/bench_plan.py                              # shipped molecules and a synthetic MPtrj
    MFFM_DATA=/path/to/data python tools/bench_plan.py      # and $MFFM_DATA/mattersim_pbe/*.xyz

Takes under a minute on one core. Times are CPU times of this process, so that neighbours on the machine matter less.
"""

import os
import time
from pathlib import Path
from statistics import median

import ase.io
import numpy as np

from mffm.config.recipe import PlanConfig
from mffm.data.loader import pack
from mffm.data.neighbors import count, neighbor_list
from mffm.data.plan import ATOM_COST, Plan, Pool

ROOT = Path(__file__).parents[1]
CUTOFF = 5.0
FRAMES_PER_RANK = 64
WORLDS = (1, 2, 8, 64)
N_STEPS = 12

Geometry = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def read(path: Path, most: int = 600) -> list[Geometry]:
    frames = ase.io.read(path, index=f":{most}", format="extxyz")
    return [(a.numbers, a.positions, a.cell.array, a.pbc) for a in frames]


def make_pool(n_atoms: np.ndarray, n_edges: np.ndarray, name: str = "all") -> Pool:
    n = len(n_edges)
    live = np.full(n, 3, np.uint8)
    sizes = (n_atoms.astype(np.int32), n_edges.astype(np.int32))
    return Pool(name, name, 0, np.arange(n), *sizes, live, ("energy", "forces"))


def synthetic(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Sizes like MPtrj's: 31 atoms and 62 edges per atom on average, lognormal."""
    rng = np.random.default_rng(0)
    n_atoms = np.clip(rng.lognormal(np.log(31.2) - 0.8**2 / 2, 0.8, n), 1, 444).astype(np.int32)
    return n_atoms, (n_atoms * np.clip(rng.normal(62, 15, n), 12, 120)).astype(np.int32)


def waste_rows(name: str, n_atoms: np.ndarray, n_edges: np.ndarray) -> list[str]:
    rows = []
    for world in WORLDS:
        budget = int(world * FRAMES_PER_RANK * n_edges.mean())
        config = PlanConfig(pools=[{"fidelity": "all"}], edge_budget=budget, oversize="skip")
        plan = Plan([make_pool(n_atoms, n_edges)], config, seed=0)
        cursor, wastes, fills, step_times, deal_times, sizes = plan.start(), [], [], [], [], []
        for _ in range(N_STEPS):
            started = time.process_time()
            step, cursor = plan.step(cursor)
            planned = time.process_time()
            bins = step.partition(world, 2)
            deal_times.append(time.process_time() - planned)
            step_times.append(planned - started)
            cost = step.n_edges + ATOM_COST * step.n_atoms
            loads = np.array([cost[np.concatenate(b)].sum() for b in bins])
            wastes.append(loads.max() / loads.mean() - 1)
            fills.append(step.n_edges.sum() / budget)
            sizes.append(len(step))
        rows.append(
            f"| {name} | {world} | {np.mean(sizes):.0f} | {100 * np.mean(wastes):.2f} | {100 * max(wastes):.2f} | "
            f"{100 * np.mean(fills):.1f} | {1e3 * median(step_times):.2f} | {1e3 * median(deal_times):.2f} |"
        )
    return rows


def packing_row(name: str, geometries: list[Geometry]) -> str:
    """Time per edge of packing batches of 32 systems, and how full the padded neighbor slots are."""
    groups = [geometries[i : i + 32] for i in range(0, len(geometries) - 31, 32)][:10]
    n_edges = slots = 0
    lists, whole = 0.0, 0.0
    for group in groups:
        started = time.process_time()
        for _, positions, cell, pbc in group:
            neighbor_list(positions, cell, pbc, CUTOFF)
        lists += time.process_time() - started
        started = time.process_time()
        batch = pack(group, [0] * len(group), CUTOFF)
        whole += time.process_time() - started
        n_edges += batch.n_edges
        slots += batch.neighbor_mask.numel()
    per_edge = 1e6 / n_edges
    return (
        f"| {name} | {n_edges / (32 * len(groups)):.0f} | {lists * per_edge:.3f} | {whole * per_edge:.3f} | "
        f"{1e-6 * n_edges / whole:.2f} | {100 * n_edges / slots:.0f} |"
    )


def main() -> None:
    sets = {
        name: read(ROOT / "data" / f"{name}.extxyz")
        for name in ("molecules", "crystals", "alloys")
        if (ROOT / "data" / f"{name}.extxyz").is_file()
    }
    if os.environ.get("MFFM_DATA"):
        for path in sorted(Path(os.environ["MFFM_DATA"]).glob("mattersim_pbe/*.xyz")):
            sets[path.stem] = read(path)

    print(f"## Imbalance between ranks: {FRAMES_PER_RANK} frames per rank, 2 microbatches, {CUTOFF:g} Å\n")
    print("| sizes | ranks | frames/step | waste % | worst % | budget filled % | step ms | partition ms |")
    print("|---|---|---|---|---|---|---|---|")
    for name, geometries in sets.items():
        n_atoms = np.array([len(g[0]) for g in geometries])
        n_edges = np.array([count(positions, cell, pbc, CUTOFF) for _, positions, cell, pbc in geometries])
        print("\n".join(waste_rows(name, n_atoms, n_edges)))
    print("\n".join(waste_rows("synthetic MPtrj, 1e6", *synthetic(1_000_000))))

    print("\n## A step of 1,000 frames\n")
    print("| pools | frames in the pools | step ms | partition into 8 × 2 ms | preparing the plan s |")
    print("|---|---|---|---|---|")
    for label, sizes in (
        ("1", (10_000_000,)),
        ("2", (1_000_000, 300)),
        ("6", (500_000, 100_000, 50_000, 5000, 500, 5)),
    ):
        pools = [make_pool(*synthetic(n), name=f"p{i}") for i, n in enumerate(sizes)]
        started = time.process_time()
        config = PlanConfig(pools=[{"fidelity": "x"}], edge_budget=1000 * 1934, temperature=2.0)
        plan = Plan(pools, config, seed=0)
        prepared = time.process_time() - started
        cursor, times, deals = plan.start(), [], []
        for _ in range(30):
            started = time.process_time()
            step, cursor = plan.step(cursor)
            times.append(time.process_time() - started)
            started = time.process_time()
            step.partition(8, 2)
            deals.append(time.process_time() - started)
        ms = [1e3 * median(t) for t in (times, deals)]
        print(f"| {label} | {sum(sizes):,} | {ms[0]:.2f} | {ms[1]:.2f} | {prepared:.2f} |")

    print(f"\n## Packing batches of 32 systems on one thread, {CUTOFF:g} Å\n")
    print("| set | edges/system | neighbor list µs/edge | whole batch µs/edge | M edges/s | slots used % |")
    print("|---|---|---|---|---|---|")
    for name, geometries in sets.items():
        print(packing_row(name, geometries))


if __name__ == "__main__":
    main()
