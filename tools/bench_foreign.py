"""Fine-tuning SevenNet's 7net-0 to another level of theory, by mffm and by sevenn's own trainer. Resumable.

    python tools/peers/install.py sevennet
    mffm ingest configs/data/solids.yaml
    mffm convert sevennet:7net-0 runs/equal_time/7net-0 --conditioning onehot --heads independent
    python tools/bench_foreign.py run mffm --minutes 20
    python tools/bench_foreign.py table

The same r2SCAN labels of the shipped crystals and alloys, the same CPU minutes; tools/bench_training.py says what is
counted:

sevenn    its preset fine_tune, from its own 7net-0
mffm      configs/sevennet.yaml from the converted 7net-0, r2SCAN labels alone
mffm-mf   the same with the frames' PBE labels too, as a second fidelity

Levels of theory and codes differ by a sum over atoms of several eV. mffm refits element references to what the start
leaves of the labels; sevenn keeps those of its checkpoint, so it is given labels less the difference of the two: both
start from the same errors. Structures with an element that no training label has are left out of validation and test.
"""

import argparse
from pathlib import Path
from typing import Any

import ase.io
import bench_training
import numpy as np

from mffm.data.store import Store
from mffm.release import load, refit_references

SET, FIDELITY, PARENT = "solids", "r2scan_gpaw", "pbe_mp"
STORE, LOG = Path("stores/solids"), bench_training.ROOT / "docs" / "fine_tuning_7net.jsonl"
RELEASE = bench_training.RUNS / "7net-0"
BATCH = 4  # frames a step, sevenn's preset; of 8 atoms with 60 edges each
bench_training.SETS[SET] = {"fidelity": FIDELITY, "stress": True, "n_atoms": None, "probe": 20}
bench_training.SHOWN[SET] = [
    (f"{prop} MAE, {unit}", f"test/{prop}_mae")
    for prop, unit in (("energy", "meV/atom"), ("forces", "meV/Å"), ("stress", "meV/Å³"))
]
_LABELS = "properties: [energy, forces, stress]"
_POOL = f"{{fidelity: {FIDELITY}, {_LABELS}}}"
_BOTH = f"{{fidelity: pbe_gpaw, {_LABELS}}}, {_POOL}"


def changes(pools: str, fidelities: list[str]) -> list[str]:
    """Return the changes of configs/sevennet.yaml."""
    parents = ", ".join(f"{name}: {PARENT}" for name in fidelities)
    n = BATCH * len(fidelities) * 8 * 60
    return [
        f"data.store={STORE.resolve()}", f"start_from={RELEASE}", f"data.plan.pools=[{pools}]",
        f"data.plan.edge_budget={n}", f"model.init_from={{{parents}}}", "train.keep=2",
    ]  # fmt: skip


ENTRIES: dict[str, tuple[str, list[str]]] = {
    "sevenn": ("sevennet", []),
    "mffm": ("mffm", changes(_POOL, [FIDELITY])),
    "mffm-mf": ("mffm", changes(_BOTH, ["pbe_gpaw", FIDELITY])),
}


def export(folder: Path) -> dict[str, Any]:
    """Write the frames of the store as ``bench_training.export`` does, less what the checkpoint's references lack."""
    store, base = Store(STORE), load(RELEASE)
    rows = store.rows(split="train", fidelity=FIDELITY)
    refitted = refit_references(base, store, rows, FIDELITY, PARENT)
    table = np.nan_to_num(refitted - base.spec.references.array([PARENT])[0])
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"tests": {}}
    for split in ("train", "val", "test"):
        path = folder / f"{split}.xyz"
        rows = store.rows(split=split, fidelity=FIDELITY)
        rows = rows[~(store.composition(rows)[:, np.isnan(refitted)] > 0).any(axis=1)]
        frames = [bench_training.frame(store, int(row), FIDELITY, table) for row in rows]
        if not path.exists():
            aside = path.with_suffix(".partial")
            ase.io.write(aside, frames, format="extxyz")
            aside.replace(path)
        if split == "test":
            found["tests"][split] = path
            continue
        found |= {split: str(path), f"n_{split}": len(frames)}
        if split == "train":
            found["symbols"] = sorted({s for atoms in frames for s in atoms.get_chemical_symbols()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="action", required=True)
    run = commands.add_parser("run", help="train and log")
    run.add_argument("entry", choices=ENTRIES)
    run.add_argument("--minutes", type=float, default=20.0, help="CPU minutes of the whole schedule")
    run.add_argument("--seed", type=int, default=0)
    commands.add_parser("table", help="markdown")
    for command in commands.choices.values():
        command.add_argument("--log", type=Path, default=LOG)
    args = parser.parse_args()
    if args.action == "table":
        print(bench_training.table(SET, args.log))
        return
    for path, remedy in ((STORE, "mffm ingest configs/data/solids.yaml"), (RELEASE, f"mffm convert sevennet:7net-0 "
                         f"{RELEASE} --conditioning onehot --heads independent")):  # fmt: skip
        if not path.exists():
            raise SystemExit(f"{path} is missing: {remedy}")
    trainer, own = ENTRIES[args.entry]
    bench_training.interpreter(trainer)
    options = {"recipe": str(bench_training.ROOT / "configs" / "sevennet.yaml"), "changes": own}
    how = (trainer, BATCH, options if trainer == "mffm" else {"preset": "fine_tune"})
    data = export(bench_training.RUNS / "frames" / SET)
    bench_training.follow(SET, args.entry, how, data, args.minutes, args.seed, args.log)


if __name__ == "__main__":
    main()
