"""Train one recipe on 1 and on 2 ranks and compare the loss curves with what rounding alone does.

    OMP_NUM_THREADS=1 python tools/rank_curves.py --output docs/ranks.png -- optim.lr=0.0003

The noise floor comes from runs of one rank that split the same global batches into 1, 2, 3 and 4 microbatches: they
only add the same numbers in another order. At a step it is the largest difference between any two of them at any step
so far (differences grow, and cross zero now and then), and at least the rounding of the float32 that the loss is.
Exit code 1 where the two ranks differ from the one by more than 3 times that.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from mffm import plots
from mffm.config.base import dump, load
from mffm.config.recipe import Recipe

ROOT = Path(__file__).parents[1]
MICROBATCHES = (1, 2, 3, 4)
FACTOR = 3.0
TRAIN_ALL = """
import os, sys
from mffm import distributed
from mffm.config.base import load
from mffm.config.recipe import Recipe
from mffm.training.loop import train
for path in sys.argv[1:]:
    train(load(Recipe, path))
distributed.stop()
sys.stdout.flush()
os._exit(0)  # DeepSpeed now and then aborts at interpreter exit, after all work is done
"""


def losses(run: Path) -> np.ndarray:
    """Return the training loss of every step, [n_steps]."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return np.array([row["train/loss"] for row in found if "train/loss" in row])


def train_all(recipe: Recipe, folder: Path) -> dict[str, np.ndarray]:
    """Return the loss curves: ``2`` for two ranks, ``1x<n>`` for one rank with n microbatches. Two starts in all."""
    plan = recipe.data.plan
    if plan.edges_per_microbatch is not None:
        raise SystemExit("the recipe must leave data.plan.edges_per_microbatch to this tool")

    def write(name: str, n: int) -> Path:
        budget = -(-plan.edge_budget // n)
        data = recipe.data.model_copy(update={"plan": plan.model_copy(update={"edges_per_microbatch": budget})})
        path = folder / f"{name}.yaml"
        path.write_text(dump(recipe.model_copy(update={"name": name, "run": str(folder / name), "data": data})))
        return path

    ones = [write(f"1x{n}", n) for n in MICROBATCHES]
    two = write("2", 1)
    script = folder / "train_all.py"
    script.write_text(TRAIN_ALL)
    subprocess.run([sys.executable, str(script), *map(str, ones)], check=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([sys.executable, *launcher, str(script), str(two)], check=True)
    return {path.stem: losses(folder / path.stem) for path in (*ones, two)}


def noise_floor(curves: dict[str, np.ndarray]) -> np.ndarray:
    """Return the floor of every step, [n_steps], from the runs of one rank."""
    ones = [curve for name, curve in curves.items() if name != "2"]
    spread = np.max([np.abs(a - b) for a, b in itertools.combinations(ones, 2)], axis=0)
    return np.maximum(np.maximum.accumulate(spread), np.finfo(np.float32).eps * ones[0])


def quickstart(folder: Path, overrides: list[str]) -> Recipe:
    """Return the quickstart's recipe, with changes, on a store made from the shipped molecules."""
    from mffm.config.data import DataConfig
    from mffm.data.ingest import ingest

    data = ROOT / "configs" / "data" / "molecules.yaml"
    ingest(load(DataConfig, data), data.parent, folder / "store", progress=False)
    return load(Recipe, ROOT / "configs" / "quickstart.yaml", [f"data.store={folder / 'store'}", *overrides])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("overrides", nargs="*", help="key.key=value")
    parser.add_argument("--recipe", type=Path, help="YAML; configs/quickstart.yaml where not given")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--output", type=Path, help="PNG")
    parser.add_argument("--json", type=Path, help="the curves and the floor")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mffm-ranks-") as temporary:
        if options.recipe is None:
            recipe = quickstart(Path(temporary), options.overrides)
        else:
            recipe = load(Recipe, options.recipe, options.overrides)
        changes = {"steps": options.steps, "log_every": 1, "validate_every": options.steps, "save_every": options.steps}
        log = recipe.log.model_copy(update={"wandb": "disabled"})
        train = recipe.train.model_copy(update=changes)
        curves = train_all(recipe.model_copy(update={"train": train, "log": log}), Path(temporary))
    floor, difference = noise_floor(curves), np.abs(curves["2"] - curves["1x1"])
    if options.json is not None:
        content = {"curves": {k: v.tolist() for k, v in curves.items()}, "floor": floor.tolist()}
        options.json.write_text(json.dumps(content))
    if options.output is not None:
        plots.rank_curves(options.output, curves["1x1"], curves["2"], difference, floor, FACTOR)
    worst = float((difference / floor).max())
    print(f"{options.steps} steps; |2 ranks - 1 rank| is at most {worst:.2f} of the noise floor (allowed: {FACTOR:g})")
    print(f"at the last step: loss {curves['1x1'][-1]:.6f}, difference {difference[-1]:.1e}, floor {floor[-1]:.1e}")
    return int(worst > FACTOR)


if __name__ == "__main__":
    sys.exit(main())
