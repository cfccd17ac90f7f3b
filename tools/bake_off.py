"""The bake-off: variants of the backbone and its training on the same frames, for the same CPU time. Resumable.

    MFFM_DATA=/path/to/data python tools/bake_off.py run acac --minutes 15 --variants base,lmax3,message0
    python tools/bake_off.py table acac > table.md

Every variant gets the steps that fit into its CPU time (measured on its first steps), so that each runs its whole
learning-rate schedule; with --steps, so many, and the CPU time is what it is. Runs lie in runs/bake_off; one that was
interrupted goes on; one that is in the log (docs/bake_off.jsonl, a line a run) is not repeated. CPU time, not wall
time: the machine is shared.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ase.io
import yaml
from ase import Atoms

from mffm.config.base import validate
from mffm.config.data import DataConfig
from mffm.data.ingest import ingest
from mffm.data.store import count_edges

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "bake_off"
LOG = ROOT / "docs" / "bake_off.jsonl"
PROBE_STEPS = 60
ACAC = "botnet/dataset_acac"
BPA = "botnet/dataset_3BPA"
CRYSTALS = "mattersim_pbe"
# store → files, labels, split. Test sets are stores of their own.
STORES: dict[str, dict[str, Any]] = {
    "acac": {"files": [f"{ACAC}/train_300K.xyz"], "fractions": {"train": 0.9, "val": 0.1}},
    "acac-300K": {"files": [f"{ACAC}/test_MD_300K.xyz"], "fractions": {"test": 1.0}},
    "acac-600K": {"files": [f"{ACAC}/test_MD_600K.xyz"], "fractions": {"test": 1.0}},
    "acac-dihedral": {"files": [f"{ACAC}/test_dihedral.xyz"], "fractions": {"test": 1.0}, "labels": ["energy"]},
    "acac-transfer": {"files": [f"{ACAC}/test_H_transfer.xyz"], "fractions": {"test": 1.0}, "labels": ["energy"]},
    # Held out as ``ood``: all frames near trans about the second of the three dihedrals, a sixth of both trajectories.
    "3bpa": {
        "files": [f"{BPA}/train_300K.xyz", f"{BPA}/train_mixedT.xyz"],
        "fractions": {"train": 0.7, "val": 0.1, "test": 0.2},
        "ood": lambda atoms: 140 <= atoms.info["dihedrals"][1] <= 230,
    },
    "crystals": {
        "files": [
            f"{CRYSTALS}/{n}.xyz" for n in ("mptrj-random-1k", "mptrj-highest-stress-1k", "alexandria-random-1k")
        ],
        "fractions": {"train": 0.8, "val": 0.1, "test": 0.1},
        "labels": ["energy", "forces", "stress"],
    },
}
LEVELS = {
    "acac": ("pbe_d3", "UHF-PBE+D3/def2-SVP"), "3bpa": ("wb97x", "wB97X/6-31G(d)"), "crystals": ("pbe_mp", "PBE(+U)"),
}  # fmt: skip
# set → test → (store, split)
TESTS = {
    "acac": {n: (n, "test") for n in ("acac-300K", "acac-600K", "acac-dihedral", "acac-transfer")},
    "3bpa": {"3bpa": ("3bpa", "test"), "3bpa-ood": ("3bpa", "ood")},
    "crystals": {"crystals": ("crystals", "test")},
}
N_ATOMS = {"acac": 15, "3bpa": 27, "crystals": 1}  # energies of molecules are of the molecule, not of an atom


def make_store(name: str, cutoff: float) -> Path:
    """Return the store of a set, made where it is missing, with its edges counted."""
    path = ROOT / "stores" / "bake_off" / name
    if not (path / "manifest.json").exists():
        spec, data = STORES[name], Path(os.environ["MFFM_DATA"])
        fidelity, level = LEVELS[name.split("-")[0]]
        labels = {prop: prop for prop in spec.get("labels", ["energy", "forces"])}
        source = {
            "name": name,
            "path": [marked(data / f, spec["ood"]) if "ood" in spec else str(data / f) for f in spec["files"]],
            "licence": "MIT",
            "labels": {fidelity: labels},
        }
        splits: dict[str, Any] = {"fractions": spec["fractions"]}
        if name == "crystals":
            source["group_key"], splits["by"] = "formula", "group"
        if "ood" in spec:
            splits["key"] = "split"
        config = {
            "store": str(path), "fidelities": {fidelity: {"level_of_theory": level}}, "sources": [source],
            "splits": splits, "cutoffs": [cutoff], "duplicates": "skip",
        }  # fmt: skip
        ingest(validate(DataConfig, config, name), ROOT, progress=False)
    count_edges(path, cutoff)
    return path


def marked(path: Path, held_out: Callable[[Atoms], bool]) -> str:
    """Write the frames again, with an info ``split`` of ``ood`` where they are held out; return where."""
    target = ROOT / "stores" / "bake_off" / f"marked-{path.name}"
    frames = ase.io.read(path, ":")
    for atoms in frames:
        if held_out(atoms):
            atoms.info["split"] = "ood"
    target.parent.mkdir(parents=True, exist_ok=True)
    ase.io.write(target, frames, format="extxyz")
    return str(target)


def commit() -> str:
    """Return the commit of the code, with a + where files differ from it."""
    found = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"], capture_output=True, text=True
    )
    return found.stdout.strip()


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def mffm(*arguments: str) -> float:
    """Run a command of mffm; return its CPU seconds."""
    before = cpu_seconds()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "mffm", *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"mffm {' '.join(arguments)}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    return cpu_seconds() - before


def steps_within(dataset: str, variant: list[str], folder: Path, minutes: float) -> int:
    """Return how many steps fit, from two short runs whose difference has no start-up in it."""
    times = []
    for steps in (PROBE_STEPS // 3, PROBE_STEPS):
        short = ["train.validate_every=100000", f"train.steps={steps}"]
        run = folder / f"probe-{steps}"
        times.append(mffm("train", str(CONFIGS / f"{dataset}.yaml"), *variant, *short, f"run={run}"))
        subprocess.run(["rm", "-rf", str(run)], check=True)
    per_step = (times[1] - times[0]) / (PROBE_STEPS - PROBE_STEPS // 3)
    return max(int(60 * minutes / per_step / 1.03), PROBE_STEPS)  # 3 % for validation and saving


def errors(run: Path, dataset: str, cutoff: float) -> dict[str, float]:
    """Return the errors on the test sets: <set>/<property>_<measure>; energies of molecules in meV, not per atom."""
    found = {}
    for name, (source, split) in TESTS[dataset].items():
        store = make_store(source, cutoff)
        output = run / "tests" / name
        mffm("evaluate", str(run), "--store", str(store), "--split", split, "--output", str(output))
        for row in json.loads((output / f"evaluation-{split}.json").read_text())["rows"]:
            factor = N_ATOMS[dataset] if row["property"] == "energy" else 1
            for measure in ("mae", "rmse", "bias"):
                found[f"{name}/{row['property']}_{measure}"] = row[measure] * factor
    return found


def rows(dataset: str) -> list[dict[str, Any]]:
    if not LOG.exists():
        return []
    return [r for r in map(json.loads, LOG.read_text().splitlines()) if r["dataset"] == dataset]


def run_one(dataset: str, name: str, changes: list[str], minutes: float | None, steps: int | None, seed: int) -> None:
    length = f"{minutes:g}min" if minutes else f"{steps}steps"
    folder = ROOT / "runs" / "bake_off" / f"{dataset}-{name}-{length}-seed{seed}"
    variant = [*changes, f"seed={seed}", f"name={dataset}-{name}"]
    base = yaml.safe_load((CONFIGS / f"{dataset}.yaml").read_text())
    given = [c.split("=")[1] for c in changes if c.startswith("model.backbone.cutoff=")]
    cutoff = float(given[-1]) if given else base["model"]["backbone"]["cutoff"]
    variant.append(f"data.store={make_store(dataset, cutoff)}")
    folder.mkdir(parents=True, exist_ok=True)
    progress = folder / "progress.json"  # CPU time over all sittings
    state = json.loads(progress.read_text()) if progress.exists() else {"cpu_s": 0.0}
    if "steps" not in state:
        state["steps"] = steps or steps_within(dataset, variant, folder, minutes or 0.0)
        progress.write_text(json.dumps(state))
    run = folder / "run"
    if (run / "checkpoints" / "latest").exists():
        state["cpu_s"] += mffm("resume", str(run))
    else:
        recipe = str(CONFIGS / f"{dataset}.yaml")
        state["cpu_s"] += mffm("train", recipe, *variant, f"train.steps={state['steps']}", f"run={run}")
    progress.write_text(json.dumps(state))
    row = {
        "dataset": dataset, "variant": name, "changes": changes, "minutes": minutes, "seed": seed,
        "steps": state["steps"], "cpu_s": round(state["cpu_s"], 1), "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(), "errors": errors(run, dataset, cutoff),
    }  # fmt: skip
    with LOG.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{dataset} {name} seed {seed}: {shown(row)}", flush=True)


# set → columns: (title, key of a row's errors)
COLUMNS = {
    "acac": [
        ("energy 300 K, meV", "acac-300K/energy_rmse"), ("forces 300 K, meV/Å", "acac-300K/forces_rmse"),
        ("energy 600 K", "acac-600K/energy_rmse"), ("forces 600 K", "acac-600K/forces_rmse"),
    ],
    "3bpa": [
        ("energy, meV", "3bpa/energy_rmse"), ("forces, meV/Å", "3bpa/forces_rmse"),
        ("held-out dihedral: energy", "3bpa-ood/energy_rmse"), ("forces", "3bpa-ood/forces_rmse"),
    ],
    "crystals": [
        ("energy MAE, meV/atom", "crystals/energy_mae"), ("forces MAE, meV/Å", "crystals/forces_mae"),
        ("stress MAE, meV/Å³", "crystals/stress_mae"),
    ],
}  # fmt: skip


def shown(row: dict[str, Any]) -> str:
    return " | ".join(f"{row['errors'][key]:.2f}" for _, key in COLUMNS[row["dataset"]])


def table(dataset: str) -> None:
    head = " | ".join(title for title, _ in COLUMNS[dataset])
    print(f"| variant | commit | CPU min | steps | seed | {head} |")
    print("|" + "---|" * (6 + head.count("|")))
    for row in rows(dataset):
        print(
            f"| {row['variant']} | {row['commit']} | {row['cpu_s'] / 60:.1f} | {row['steps']} | {row['seed']} "
            f"| {shown(row)} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("dataset", choices=sorted(TESTS))
    parser.add_argument("--variants", default="base", help="names in configs/bake_off/variants.yaml, or all")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="CPU minutes of each run")
    length.add_argument("--steps", type=int, help="steps of each run")
    parser.add_argument("--seeds", default="0")
    args = parser.parse_args()
    if args.action == "table":
        table(args.dataset)
        return
    if not (args.minutes or args.steps):
        parser.error("give --minutes or --steps")
    variants = yaml.safe_load((CONFIGS / "variants.yaml").read_text())
    names = list(variants) if args.variants == "all" else args.variants.split(",")
    for seed in map(int, args.seeds.split(",")):
        for name in names:
            done = {(r["variant"], r["minutes"], r["minutes"] or r["steps"], r["seed"]) for r in rows(args.dataset)}
            if (name, args.minutes, args.minutes or args.steps, seed) not in done:
                run_one(args.dataset, name, variants[name], args.minutes, args.steps, seed)


if __name__ == "__main__":
    main()
