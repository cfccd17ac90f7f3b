"""Direct-force pretraining: what a step costs, and the accuracy at equal CPU time, on acetylacetone.

    export MFFM_DATA=... OMP_NUM_THREADS=1
    python tools/bench_direct.py cost
    python tools/bench_direct.py train --minutes 15 --fractions 0,0.5 --seeds 0,1

``cost``: CPU time of a training step (forward, derivatives, loss, backward; AdamW apart) with direct heads over that
with conservative forces, in turns in one process, for the molecules and the shipped crystals (there with stress).
``train``: configs/bake_off/acac.yaml with conservative forces for so many CPU minutes, against a fraction of them with
direct forces and the rest conservative from those weights. Steps are measured to fit, each stage runs its own
learning-rate schedule, and the time of start-ups, validation and saving is in the ``cpu_s`` of the log. A line a run
goes to runs/bench_direct/log.jsonl; what is there is not repeated.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from bake_off import CONFIGS, ROOT, commit, cpu_seconds, errors, make_store, mffm, shown, steps_within

from mffm import distributed
from mffm.config.base import load
from mffm.config.data import DataConfig
from mffm.config.model import ModelConfig
from mffm.config.recipe import OptimConfig
from mffm.data.ingest import ingest
from mffm.data.loader import collate
from mffm.data.store import Store
from mffm.keys import FORCES, PROPERTIES, STRESS
from mffm.models.potential import Potential
from mffm.optim import make_optimizer

DATASET = "acac"
FOLDER = ROOT / "runs" / "bench_direct"
LOG = FOLDER / "log.jsonl"
CUTOFF = 5.0
STAGE_2 = ["optim.lr=0.001"]  # it starts from trained weights


def one_batch(store: Store, fidelity: str, n_edges: int):
    """Return a batch of about so many edges with all labels."""
    rows = store.rows(split="train", fidelity=fidelity)
    ends = store.n_edges(CUTOFF)[rows].cumsum()
    rows = rows[: max(1, int(np.searchsorted(ends, n_edges)))]
    n = len(rows)
    table = store.fidelities
    batch = collate(store, rows, [table.index(fidelity)] * n, table, [PROPERTIES] * n, CUTOFF)
    return batch.with_fidelity(torch.zeros(n, dtype=torch.int64))


def cost(rounds: int) -> None:
    torch.set_num_threads(1)
    distributed.tune_allocator()
    print("| set | atoms | edges | conservative, CPU ms a step | direct | direct / conservative | with AdamW |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        data = ROOT / "configs" / "data" / "crystals.yaml"
        ingest(load(DataConfig, data), data.parent, Path(folder) / "crystals", progress=False)
        sets = [("acetylacetone, E+F", make_store(DATASET, CUTOFF), "pbe_d3", 1500, False)]
        sets += [("crystals, E+F+S", Path(folder) / "crystals", "pbe_gpaw", 6000, True)]
        for name, path, fidelity, n_edges, stress in sets:
            batch = one_batch(Store(path), fidelity, n_edges)
            made: dict[str, Any] = {}
            for forces in ("conservative", "direct"):
                torch.manual_seed(0)
                direct = {"forces": forces} | ({"direct": {"stress": True}} if stress and forces == "direct" else {})
                config = ModelConfig.model_validate({"backbone": {"cutoff": CUTOFF}, **direct})
                potential = Potential(config, [fidelity], avg_neighbors=20.0, scale=1.0).train()
                made[forces] = potential, make_optimizer(potential, OptimConfig())
            times: dict[str, list[tuple[float, float]]] = {k: [] for k in made}
            for i in range(rounds + 1):
                for forces, (potential, optimizer) in made.items():
                    pair = timed_step(potential, optimizer, batch, stress)
                    if i:
                        times[forces].append(pair)
            rows = list(zip(times["conservative"], times["direct"], strict=True))
            ratios = [median(b[k] / a[k] for a, b in rows) for k in (0, 1)]
            a, b = (1e3 * median(t[0] for t in times[k]) for k in ("conservative", "direct"))
            n = len(batch.atomic_numbers)
            print(f"| {name} | {n} | {batch.n_edges} | {a:.1f} | {b:.1f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")


def timed_step(potential: Potential, optimizer: torch.optim.Optimizer, batch, stress: bool) -> tuple[float, float]:
    """Do one step; return its CPU seconds without and with the optimiser."""
    started = time.process_time()
    optimizer.zero_grad(set_to_none=True)
    p = potential(batch, forces=True, stress=stress)
    loss = p.energy.square().mean() + (p.forces - batch.labels[FORCES]).square().mean()
    if stress:
        loss = loss + (p.stress - batch.labels[STRESS]).square().mean()
    loss.backward()
    backward = time.process_time() - started
    optimizer.step()
    return backward, time.process_time() - started


def stage(folder: Path, changes: list[str], minutes: float) -> tuple[int, float]:
    """Train one stage for so many CPU minutes, or go on with it; return its steps and CPU seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    progress = folder / "progress.json"
    state = json.loads(progress.read_text()) if progress.exists() else {"cpu_s": 0.0, "done": False}
    if "steps" not in state:
        state["steps"] = steps_within(DATASET, changes, folder, minutes)
        progress.write_text(json.dumps(state))
    run = folder / "run"
    if not state["done"]:
        before = cpu_seconds()
        try:
            if (run / "checkpoints" / "latest").exists():
                mffm("resume", str(run))
            else:
                recipe = str(CONFIGS / f"{DATASET}.yaml")
                mffm("train", recipe, *changes, f"train.steps={state['steps']}", f"run={run}")
            state["done"] = True
        finally:  # an interrupted run is saved, and the next sitting goes on with it
            state["cpu_s"] += cpu_seconds() - before
            progress.write_text(json.dumps(state))
    return state["steps"], state["cpu_s"]


def train(minutes: float, fraction: float, seed: int, changes: list[str]) -> dict[str, Any]:
    """Run both stages (or one, for a fraction of 0 or 1) and return the line of the log."""
    folder = FOLDER / f"{minutes:g}min-direct{fraction:g}-seed{seed}"
    common = [*changes, f"seed={seed}", f"data.store={make_store(DATASET, CUTOFF)}"]
    stages = []
    if fraction > 0:
        stages.append((folder / "direct", [*common, "model.forces=direct"], fraction * minutes))
    if fraction < 1:
        start = [f"start_from={folder / 'direct' / 'run'}", *STAGE_2] if stages else []
        stages.append((folder / "conservative", [*common, *start], (1 - fraction) * minutes))
    done = [stage(*s) for s in stages]
    found = {s[0].name: errors(s[0] / "run", DATASET, CUTOFF) for s in stages}
    return {
        "minutes": minutes, "fraction": fraction, "seed": seed, "changes": changes, "steps": [d[0] for d in done],
        "cpu_s": [round(d[1], 1) for d in done], "commit": commit(), "dataset": DATASET,
        "errors": found[stages[-1][0].name], "errors_of_direct": found.get("direct"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=["cost", "train", "table"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--minutes", type=float, default=15.0, help="CPU minutes of each run, both stages together")
    parser.add_argument("--fractions", default="0,0.5", help="shares of the time with direct forces")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--changes", default="", help="key=value,... of the recipe, for all stages")
    args = parser.parse_args()
    if args.action == "cost":
        cost(args.rounds)
        return
    LOG.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []
    changes = [c for c in args.changes.split(",") if c]
    for seed in map(int, args.seeds.split(",")) if args.action == "train" else ():
        for fraction in map(float, args.fractions.split(",")):
            key = (args.minutes, fraction, seed, changes)
            if key not in [(r["minutes"], r["fraction"], r["seed"], r["changes"]) for r in lines]:
                lines.append(train(args.minutes, fraction, seed, changes))
                with LOG.open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
    head = "energy 300 K, meV | forces 300 K, meV/Å | energy 600 K | forces 600 K"
    print(f"| CPU min | share direct | seed | changes | steps | CPU s used | {head} |")
    print("|" + "---|" * 10)
    for r in lines:
        first = [f"{r['minutes']:g}", f"{r['fraction']:g}", str(r["seed"]), " ".join(r["changes"])]
        print(f"| {' | '.join(first)} | {' + '.join(map(str, r['steps']))} | {sum(r['cpu_s']):.0f} | {shown(r)} |")
        if r["errors_of_direct"] and r["fraction"] < 1:
            stage_1 = f"after the direct stage | | | {r['steps'][0]} | {r['cpu_s'][0]:.0f}"
            print(f"| | {stage_1} | {shown({**r, 'errors': r['errors_of_direct']})} |")


if __name__ == "__main__":
    main()
