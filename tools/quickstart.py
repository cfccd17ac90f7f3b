"""The whole of mffm in a few minutes: ingest the shipped molecules, train, judge against three baselines, release.

Every stage is an ordinary `mffm` command, printed as it runs; results go to ./quickstart. Training runs two at a time.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from mffm import plots
from mffm.data.store import Store
from mffm.distributed import tune_allocator
from mffm.evaluate import parity
from mffm.executor import Job, LocalExecutor, State
from mffm.release import load, refit_references, write_json

FOLDER = Path("quickstart")
RUNS = FOLDER / "runs"
HIGH, LOW = "pbe", "gfn2"
ARMS = {
    "multi_fidelity": "multi-fidelity",
    "hf_only": "50 PBE labels alone",
    "low_fidelity": "GFN2 alone, references refitted",
    "fine_tune": "pretrain on GFN2, fine-tune on PBE",
}
SPLITS = {
    "test": "other frames of the training molecules",
    "ood": "8 molecules that no training set holds at any level",
}
PROPERTIES = {"energy": "meV/atom", "forces": "meV/Å"}
PRETRAINED = {"fine_tune": 300}  # steps before the first of its own
console = Console(width=120)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "mffm", *arguments]


def run(*arguments: str) -> None:
    console.print(f"$ mffm {' '.join(arguments)}", style="bold")
    subprocess.run(command(*arguments), check=True)


def train() -> None:
    """Train the arms, two processes at a time; each writes quickstart/runs/<name>.log."""

    def job(name: str, recipe: str, after: tuple[str, ...] = ()) -> Job:
        return Job(name, command("train", recipe), RUNS / f"{name}.log", {"OMP_NUM_THREADS": "1"}, after)

    jobs = [
        job("multi_fidelity", "configs/quickstart.yaml"),
        job("pretrain", "configs/quickstart_pretrain.yaml"),
        job("hf_only", "configs/quickstart_hf_only.yaml"),
        job("low_fidelity", "configs/quickstart_low_fidelity.yaml"),
        job("fine_tune", "configs/quickstart_fine_tune.yaml", ("pretrain",)),
    ]
    for each in jobs:
        console.print(f"$ mffm {' '.join(each.command[3:])}", style="bold")
    shown: dict[str, float] = {"at": 0.0}

    def report(states: Mapping[str, State]) -> None:
        if time.monotonic() - shown["at"] < 15:
            return
        shown["at"] = time.monotonic()
        lines = []
        for name, state in states.items():
            last = ""
            if state == "running" and (RUNS / f"{name}.log").is_file():
                steps = [s for s in (RUNS / f"{name}.log").read_text().splitlines() if s.startswith("step ")]
                last = " " + steps[-1].split("  ")[0] if steps else " starting"
            lines.append(f"{name} {state}{last}")
        console.print("  " + "; ".join(lines))

    states = LocalExecutor(workers=2).run(jobs, report)
    failed = [name for name, state in states.items() if state == "failed"]
    if failed:
        console.print((RUNS / f"{failed[0]}.log").read_text()[-3000:] if (RUNS / f"{failed[0]}.log").is_file() else "")
        sys.exit(f"failed: {', '.join(failed)}; the logs are in {RUNS}")


def judge(store: Store, split: str) -> dict[str, parity.Evaluation]:
    """Return the errors of every arm on the high-fidelity labels of a split."""
    results = {}
    for arm in ARMS:
        loaded = load(RUNS / arm)
        if arm == "low_fidelity":
            # the HF labels that the other arms train on, in the same number and choice
            rows = np.array(json.loads((RUNS / "hf_rows.json").read_text())["rows"])
            references = refit_references(loaded, store, rows, HIGH, LOW)
            results[arm] = parity.evaluate(loaded, store, split, [HIGH], predict_as=LOW, references=references)
        else:
            results[arm] = parity.evaluate(loaded, store, split, [HIGH])
    return results


def high_fidelity_rows(store: Store) -> None:
    """Write down which PBE frames the recipes draw."""
    from mffm.config.base import load as load_config
    from mffm.config.recipe import Recipe
    from mffm.data.plan import build_pools
    from mffm.fidelity import FidelityTable

    recipe = load_config(Recipe, "configs/quickstart_hf_only.yaml")
    (pool,) = build_pools(
        store, recipe.data.plan, FidelityTable([store.fidelities[HIGH]]), recipe.model.backbone.cutoff
    )
    write_json(RUNS / "hf_rows.json", {"rows": pool.rows.tolist()})


def error(evaluation: parity.Evaluation, prop: str) -> float:
    return next(r["mae"] for r in evaluation.rows() if r["fidelity"] == HIGH and r["property"] == prop)


def plot(results: Mapping[str, Mapping[str, parity.Evaluation]]) -> None:
    """Draw learning curves on the validation frames above, parity of the multi-fidelity potential below."""
    curves = {}
    for prop, unit in PROPERTIES.items():
        key = f"val/{HIGH}/{prop}_mae"
        lines: dict[str, tuple[list[float], list[float]]] = {}
        for arm, title in ARMS.items():
            rows = [json.loads(s) for s in (RUNS / arm / "metrics.jsonl").read_text().splitlines()]
            found = [(r["step"] + PRETRAINED.get(arm, 0), r[key]) for r in rows if key in r]
            if found:
                lines[title] = ([s for s, _ in found], [v for _, v in found])
            else:  # a low fidelity does not measure itself on the high one
                lines[title] = ([0], [error(results["val"][arm], prop)])
        curves[f"{HIGH} {prop} MAE, validation, {unit}"] = lines
    panels = [
        (f"multi-fidelity, test, {t}", unit, x, y) for t, unit, x, y in results["test"]["multi_fidelity"].panels()
    ]
    plots.comparison(FOLDER / "quickstart.png", curves, panels)


def main() -> None:
    started = time.monotonic()
    tune_allocator()
    shutil.rmtree(FOLDER, ignore_errors=True)
    run("ingest", "configs/data/molecules.yaml", "--store", str(FOLDER / "molecules"))
    run("references", str(FOLDER / "molecules"), "--split", "train")
    store = Store(FOLDER / "molecules")
    RUNS.mkdir(parents=True)
    high_fidelity_rows(store)
    train()
    for split in ("test", "ood"):
        run("evaluate", str(RUNS / "multi_fidelity"), "--split", split)
    run("release", str(RUNS / "multi_fidelity"), str(FOLDER / "release"))

    results = {split: judge(store, split) for split in ("val", *SPLITS)}
    summary = {
        arm: {f"{split}/{prop}": error(results[split][arm], prop) for split in SPLITS for prop in PROPERTIES}
        for arm in ARMS
    }
    seconds = round(time.monotonic() - started)
    write_json(FOLDER / "summary.json", {"high_fidelity": HIGH, "mae": summary, "seconds": seconds})
    plot(results)
    table = Table(f"MAE on {HIGH} labels", *(f"{s} {p}" for s in SPLITS for p in PROPERTIES))
    for arm, title in ARMS.items():
        table.add_row(title, *(f"{v:.1f}" for v in summary[arm].values()))
    console.print(table)
    console.print("energy in meV/atom, forces in meV/Å; " + "; ".join(f"{s}: {t}" for s, t in SPLITS.items()))
    console.print(f"\nplot: {FOLDER / 'quickstart.png'}\nrelease: {FOLDER / 'release'}   ({seconds} s in all)\n")
    print(
        "from mffm.deploy.ase import Calculator; from ase.build import molecule\n"
        f'atoms = molecule("CH3CH2OH"); atoms.calc = Calculator("{FOLDER / "release"}", fidelity="{HIGH}")\n'
        "print(atoms.get_potential_energy(), atoms.get_forces())"
    )


if __name__ == "__main__":
    main()
