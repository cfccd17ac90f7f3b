"""Accuracy at equal time: each peer trained by its own recipe for the same CPU minutes on the same frames. Resumable.

    python tools/peers/install.py all
    MFFM_DATA=/path/to/data python tools/bench_training.py run acac mace --minutes 60
    python tools/bench_training.py table acac
    python tools/bench_training.py plot acac --output docs/equal_time.png

Frames, split and tests are those of tools/bake_off.py. Every peer trains with its own trainer in its own environment,
on one thread, in float32, with the same allocator setting; a short probe says how many steps fit, and the schedule gets
that length (NequIP's has none: it is cut off). Counted is the CPU time from the first step on, validation and
checkpoints included; imports, reading and statistics are not. At the marks (2, 5, 10, 20, 40, 60 minutes) the model
that would be released (averaged weights where the recipe averages) is copied, and measured outside of the counted time:
a line a point in docs/equal_time.jsonl. Points before the last are of a schedule that is not over:
`run ... --minutes 20` gives a whole schedule's error; on acetylacetone they are measured on every third frame of the
test trajectories, the last on all.

Peers get labels less the element references that mffm fits on the training frames: acetylacetone's -9391 eV would cost
float32 half a meV. cuEquivariance, OpenEquivariance (MACE, SevenNet, NequIP) and FlashTP (SevenNet) need a GPU, where
they would make those peers faster; none runs here.
"""

import argparse
import fcntl
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ase.io
import bake_off
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from peers import install

from mffm.config.recipe import ReferencesConfig
from mffm.data.references import fit
from mffm.data.store import Store

ROOT = Path(__file__).parents[1]
PEERS = Path(__file__).parent / "peers"
LOG = ROOT / "docs" / "equal_time.jsonl"
RUNS = ROOT / "runs" / "equal_time"
MARKS = (2.0, 5.0, 10.0, 20.0, 40.0, 60.0)
CUTOFF = 5.0
THINNED = {"acac-300K": 3, "acac-600K": 3}  # points before the last are measured on every so-many-th frame
SLACK = 1.15  # a schedule that the probe made too long may end by so much later: what was counted is in the log
SETS = {
    "acac": {"fidelity": "pbe_d3", "stress": False, "n_atoms": 15, "probe": 60},
    "crystals": {"fidelity": "pbe_mp", "stress": True, "n_atoms": None, "probe": 20},
}
# MACE, where not its default: the example of its README, with the batch of 5 of its paper; for crystals MACE-MP's.
MACE = {"lr": 0.01, "ema_decay": 0.99, "scheduler_patience": 5}
MACE_CRYSTALS = {
    "lr": 0.005, "ema_decay": 0.995, "scheduler_patience": 5, "loss": "universal", "compute_stress": True,
    "energy_weight": 1, "forces_weight": 10, "stress_weight": 100, "weight_decay": 1e-8, "clip_grad": 100,
    "error_table": "PerAtomMAE",
}  # fmt: skip
BIG, SMALL = {"hidden_irreps": "128x0e + 128x1o"}, {"hidden_irreps": "64x0e"}
# sevenn's preset for crystals, less its learning rate schedule
SEVENNET_CRYSTALS = {
    "train": {"loss": "Huber", "loss_param": {"delta": 0.01}, "force_loss_weight": 1.0, "stress_loss_weight": 0.01},
    "data": {"shift": "elemwise_reference_energies"},
}
MFFM = ["train.compile=true"]
ESCN = [
    "model.backbone={kind: escn, cutoff: 5.0, sphere_channels: 64, hidden_channels: 64, edge_channels: 64}",
    "optim.kind=adamw",
    "optim.lr=0.0008",
]
# entry → trainer, frames a step, options of its train_<trainer>.py; by set
ENTRIES: dict[str, dict[str, tuple[str, int, dict[str, Any]]]] = {
    "acac": {
        "mffm": ("mffm", 9, {"changes": MFFM}),
        "escn": ("mffm", 9, {"changes": ESCN}),
        "mace": ("mace", 5, {**MACE, **BIG}),
        "mace-64": ("mace", 5, {**MACE, **SMALL}),
        "sevennet": ("sevennet", 4, {}),
        "sevennet-l3i5": ("sevennet", 4, {"model": "sevennet-l3i5"}),
        "nequip": ("nequip", 5, {}),
        "nequip-l2": ("nequip", 5, {"model": {"l_max": 2, "num_features": 64}}),
    },
    "crystals": {
        "mffm": ("mffm", 16, {"changes": MFFM}),
        "escn": ("mffm", 16, {"changes": ESCN}),
        "mace": ("mace", 16, {**MACE_CRYSTALS, **BIG}),
        "mace-64": ("mace", 16, {**MACE_CRYSTALS, **SMALL}),
        "sevennet": ("sevennet", 16, SEVENNET_CRYSTALS),
        "sevennet-l3i5": ("sevennet", 16, {**SEVENNET_CRYSTALS, "model": "sevennet-l3i5"}),
        "nequip": ("nequip", 16, {}),
        "nequip-l2": ("nequip", 16, {"model": {"l_max": 2, "num_features": 64}}),
    },
}


def make_store(name: str) -> Path:
    """Return the store of a set; one process at a time makes it."""
    RUNS.mkdir(parents=True, exist_ok=True)
    with (RUNS / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return bake_off.make_store(name, CUTOFF)


def export(dataset: str, folder: Path) -> dict[str, Any]:
    """Write the frames of a set as extxyz, less its element references; an info ``reference`` keeps those.

    Returns:
        paths ``train``, ``val`` and ``tests`` (name → path), ``n_train``, ``n_val``, ``symbols``.
    """
    found: dict[str, Any] = {"tests": {}}
    fidelity = SETS[dataset]["fidelity"]
    store = Store(make_store(dataset))
    references = fit(store, [fidelity], {fidelity: store.rows(split="train", fidelity=fidelity)}, ReferencesConfig())
    table = references.array([fidelity])[0]
    wanted = [("train", store, "train"), ("val", store, "val")]
    wanted += [(n, Store(make_store(n)), "test") for n in bake_off.TESTS[dataset]]
    folder.mkdir(parents=True, exist_ok=True)
    for name, opened, split in wanted:
        path = folder / f"{name}.xyz"
        frames = [frame(opened, int(row), fidelity, table) for row in opened.rows(split=split, fidelity=fidelity)]
        if not path.exists():
            aside = path.with_suffix(".partial")
            ase.io.write(aside, frames, format="extxyz")
            aside.replace(path)
        if name in ("train", "val"):
            found[name] = str(path)
        else:
            found["tests"][name] = path
        if name in ("train", "val"):
            found[f"n_{name}"] = len(frames)
        if name == "train":
            found["symbols"] = sorted({s for atoms in frames for s in atoms.get_chemical_symbols()})
    return found


def frame(store: Store, row: int, fidelity: str, references: np.ndarray) -> Atoms:
    """Return a frame with its labels, the energy (eV) less the references [119] of its elements."""
    numbers, positions, cell, pbc = store.geometry(row)
    labels = store.labels(row, fidelity)
    reference = float(references[numbers].sum())
    atoms = Atoms(numbers, positions, cell=cell, pbc=pbc, info={"reference": reference})
    values: dict[str, Any] = {"energy": float(labels["energy"]) - reference}
    if "forces" in labels:
        values["forces"] = np.asarray(labels["forces"], np.float64)
    if "stress" in labels:
        values["stress"] = np.asarray(labels["stress"])[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
    atoms.calc = SinglePointCalculator(atoms, **values)
    return atoms


def interpreter(trainer: str) -> str:
    if trainer == "mffm":
        return sys.executable
    found = install.python(trainer)
    if found is None:
        raise SystemExit(install.remedy(trainer))
    return str(found)


def start(trainer: str, script: str, *arguments: str) -> None:
    environment = {**os.environ, **install.ENVIRONMENT, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    environment["PYTHONPATH"] = os.pathsep.join([str(PEERS), *([str(ROOT)] if trainer == "mffm" else [])])
    command = [interpreter(trainer), str(PEERS / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-4000:]}")


def measure(dataset: str, trainer: str, model: str, tests: dict[str, str], folder: Path) -> dict[str, float]:
    """Return <test>/<property>_<mae or rmse> in meV (a molecule; an atom of a crystal), meV/Å and meV/Å³."""
    folder.mkdir(exist_ok=True)
    pairs = {name: (path, folder / f"{name}.npz") for name, path in tests.items()}
    peer = f"mffm={SETS[dataset]['fidelity']}" if trainer == "mffm" else trainer
    start(trainer, "evaluate.py", peer, model, *(str(p) for pair in pairs.values() for p in pair))
    errors = {}
    for name, (path, predictions) in pairs.items():
        frames = ase.io.read(path)
        for prop, difference in differences(frames, dict(np.load(predictions)), trainer == "mffm").items():
            scale = SETS[dataset]["n_atoms"] if prop == "energy" and SETS[dataset]["n_atoms"] else 1
            errors[f"{name}/{prop}_mae"] = 1000 * scale * float(np.abs(difference).mean())
            errors[f"{name}/{prop}_rmse"] = 1000 * scale * float(np.sqrt((difference**2).mean()))
    return errors


def differences(frames: list[Atoms], predicted: dict[str, np.ndarray], whole: bool) -> dict[str, np.ndarray]:
    """Return prediction - label: energy, eV/atom [n_frames]; forces, eV/Å; stress, eV/Å³; what has labels.

    ``whole``: the predicted energies contain the references.
    """
    n_atoms = np.array([len(a) for a in frames])
    labels = np.array([a.calc.results["energy"] + whole * a.info["reference"] for a in frames])
    found = {"energy": (predicted["energy"] - labels) / n_atoms}
    if "forces" in frames[0].calc.results:
        found["forces"] = predicted["forces"] - np.concatenate([a.calc.results["forces"] for a in frames])
    if "stress" in frames[0].calc.results:
        found["stress"] = predicted["stress"] - np.array([a.get_stress(voigt=False) for a in frames])
    return found


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, 1 thread"


def run(dataset: str, entry: str, minutes: float, seed: int, log: Path, measure_only: bool = False) -> None:
    """Train an entry, or go on with it, and log its points; those in the log are not measured again.

    Args:
        measure_only: log what points an unfinished training has, and leave it at that.
    """
    trainer, batch, options = ENTRIES[dataset][entry]
    interpreter(trainer)
    data = export(dataset, RUNS / "frames" / dataset)
    if trainer == "mffm":
        recipe = bake_off.CONFIGS / f"{dataset}.yaml"
        store = make_store(dataset)
        options = {"recipe": str(recipe), "changes": [*options["changes"], f"data.store={store}", "train.keep=2"]}
    follow(dataset, entry, (trainer, batch, options), data, minutes, seed, log, measure_only)


def follow(
    dataset: str, entry: str, how: tuple[str, int, dict[str, Any]], data: dict[str, Any], minutes: float, seed: int,
    log: Path, measure_only: bool = False,
) -> None:  # fmt: skip
    """Do what ``run`` does on data as ``export`` gives them; how: trainer, frames a step, its options."""
    trainer, batch, options = how
    folder = RUNS / f"{dataset}-{entry}-{minutes:g}min-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    job = {
        "folder": str(folder), "marks": sorted({m for m in MARKS if m < minutes} | {minutes}), "seed": seed,
        "train": data["train"], "val": data["val"], "n_train": data["n_train"], "symbols": data["symbols"],
        "batch": batch, "cutoff": CUTOFF, "stress": SETS[dataset]["stress"], "options": options,
        "references": dict.fromkeys(data["symbols"], 0.0), "slack": 1.0 if trainer == "nequip" else SLACK,
    }  # fmt: skip
    steps = probe(trainer, job, SETS[dataset]["probe"], data["n_val"] / data["n_train"], minutes)
    if not (folder / f"at-{minutes:g}.json").exists() and not measure_only:
        (folder / "job.json").write_text(json.dumps({**job, "probe": None, "steps": steps}))
        start(trainer, f"train_{trainer}.py", str(folder / "job.json"))
    done = {(r["peer"], r["minutes"], r["seed"], r["mark"]) for r in rows(dataset, log)}
    for mark in job["marks"]:
        point = folder / f"at-{mark:g}.json"
        if not point.exists() or (entry, minutes, seed, mark) in done:
            continue
        facts = json.loads(point.read_text())
        thin = {n: 1 if mark == minutes or n not in THINNED else THINNED[n] for n in data["tests"]}
        tests = {n: f"{path}@::{thin[n]}" for n, path in data["tests"].items()}
        row = {
            "set": dataset, "peer": entry, "version": version(trainer), "minutes": minutes, "seed": seed, "mark": mark,
            "cpu_minutes": round(facts["cpu_s"] / 60, 3), "steps": facts["step"], "batch": batch,
            "n_parameters": facts["n_parameters"], "sittings": facts["sittings"],
            "errors": measure(dataset, trainer, model_file(trainer, folder, mark), tests, folder / "tests"),
            "date": datetime.now(UTC).date().isoformat(), "machine": machine(),
        }  # fmt: skip
        with log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{dataset} {entry} {mark:g} min, {facts['step']} steps: {shown(row)}", flush=True)


def probe(trainer: str, job: dict[str, Any], n: int, validated: float, minutes: float) -> int:
    """Return how many steps fit, from ``n`` behind the first 10; ``validated`` frames per trained one cost a third."""
    path = Path(job["folder"]) / "probe" / "probe.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        short = {**job, "folder": str(path.parent), "probe": [10, 10 + n], "steps": None}
        (path.parent / "job.json").write_text(json.dumps(short))
        start(trainer, f"train_{trainer}.py", str(path.parent / "job.json"))
    return int(60 * minutes / json.loads(path.read_text())["per_step_s"] / (1.02 + validated / 3))  # checkpoints: 2 %


def model_file(trainer: str, folder: Path, mark: float) -> str:
    if trainer == "mffm":
        return f"{folder / 'run'}=at-{mark:g}"
    return str(folder / f"at-{mark:g}") + {"mace": ".model", "sevennet": ".pth", "nequip": ".ckpt"}[trainer]


def version(trainer: str) -> str:
    return f"mffm {bake_off.commit()}" if trainer == "mffm" else install.version(trainer)


def rows(dataset: str, log: Path) -> list[dict[str, Any]]:
    if not log.exists():
        return []
    return [r for r in map(json.loads, log.read_text().splitlines()) if r["set"] == dataset]


# set → what the table and the figure show: (title, key of a row's errors)
SHOWN = {
    "acac": [
        ("energy 300 K, meV", "acac-300K/energy_rmse"),
        ("forces 300 K, meV/Å", "acac-300K/forces_rmse"),
        ("energy 600 K, meV", "acac-600K/energy_rmse"),
        ("forces 600 K, meV/Å", "acac-600K/forces_rmse"),
        ("dihedral, meV", "acac-dihedral/energy_rmse"),
        ("H transfer, meV", "acac-transfer/energy_rmse"),
    ],
    "crystals": [
        ("energy MAE, meV/atom", "crystals/energy_mae"),
        ("forces MAE, meV/Å", "crystals/forces_mae"),
        ("stress MAE, meV/Å³", "crystals/stress_mae"),
    ],
}


def shown(row: dict[str, Any]) -> str:
    return " | ".join(f"{row['errors'][key]:.2f}" for _, key in SHOWN[row["set"]])


def table(dataset: str, log: Path) -> str:
    """Return the points as markdown, an entry's together, the last of each schedule marked."""
    titles = " | ".join(title for title, _ in SHOWN[dataset])
    lines = [f"| peer | version | M parameters | schedule, min | CPU min | steps | ms/step | seed | {titles} |"]
    lines.append("|" + "---|" * (8 + len(SHOWN[dataset])))
    for r in sorted(rows(dataset, log), key=lambda r: (r["peer"], r["minutes"], r["seed"], r["mark"])):
        end = " (end)" if r["mark"] == r["minutes"] else ""
        lines.append(
            f"| {r['peer']} | {r['version']} | {r['n_parameters'] / 1e6:.2f} | {r['minutes']:g} "
            f"| {r['cpu_minutes']:.1f}{end} | {r['steps']} | {60000 * r['cpu_minutes'] / r['steps']:.0f} | {r['seed']} "
            f"| {shown(r)} |"
        )
    return "\n".join(lines)


def curves(dataset: str, log: Path, key: str) -> dict[str, list[tuple[list[float], list[float], bool]]]:
    """Return entry → (CPU minutes, errors, whether it is over; means over seeds) for every length of schedule."""
    found: dict[str, list[tuple[list[float], list[float], bool]]] = {}
    known = rows(dataset, log)
    order = list(ENTRIES[dataset])
    pairs = {(r["peer"], r["minutes"]) for r in known}
    for entry, minutes in sorted(pairs, key=lambda pair: (order.index(pair[0]), pair[1])):
        points = [r for r in known if (r["peer"], r["minutes"]) == (entry, minutes)]
        marks = sorted({r["mark"] for r in points})
        times = [float(np.mean([r["cpu_minutes"] for r in points if r["mark"] == m])) for m in marks]
        errors = [float(np.mean([r["errors"][key] for r in points if r["mark"] == m])) for m in marks]
        found.setdefault(entry, []).append((times, errors, marks[-1] == minutes))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="action", required=True)
    for action, text in (("run", "train and log"), ("table", "markdown"), ("plot", "error against CPU time")):
        command = commands.add_parser(action, help=text)
        command.add_argument("set", choices=sorted(SETS))
        command.add_argument("--log", type=Path, default=LOG)
        if action == "run":
            command.add_argument("peer", help=f"one of {', '.join(ENTRIES['acac'])}")
            command.add_argument("--minutes", type=float, default=60.0, help="CPU minutes of the whole schedule")
            command.add_argument("--seed", type=int, default=0)
            command.add_argument("--measure", action="store_true", help="train nothing; log the points that there are")
        if action == "plot":
            command.add_argument("--output", type=Path, default=ROOT / "docs" / "equal_time.png")
    args = parser.parse_args()
    if args.action == "run":
        if args.peer not in ENTRIES[args.set]:
            raise SystemExit(f"{args.peer}: known are {', '.join(ENTRIES[args.set])}")
        run(args.set, args.peer, args.minutes, args.seed, args.log, args.measure)
    elif args.action == "table":
        print(table(args.set, args.log))
    else:
        from mffm import plots

        plots.errors_at_time(args.output, {t: curves(args.set, args.log, key) for t, key in SHOWN[args.set]})


if __name__ == "__main__":
    main()
