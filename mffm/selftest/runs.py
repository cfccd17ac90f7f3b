"""Runs as the self-test compares them: rows of metrics.jsonl, checkpoints, and copies cut back to an earlier step."""

import json
import shutil
import statistics
from collections.abc import Iterable
from pathlib import Path

import yaml

from mffm.config.base import read_yaml

Rows = dict[int, dict[str, float]]
CLOCK = ("time", "cpu_s")


def training_rows(run: Path) -> Rows:
    """Return the training rows of a run by step, without what depends on the clock."""
    return {
        step: {name: value for name, value in row.items() if name not in CLOCK and not name.endswith("_per_s")}
        for step, row in _rows(run).items()
    }


def rates(run: Path, after: int = 4) -> tuple[float, float]:
    """Return the medians of atoms and edges per second over all ranks, without the first steps."""
    rows = [row for step, row in _rows(run).items() if step > after]
    return statistics.median(r["atoms_per_s"] for r in rows), statistics.median(r["edges_per_s"] for r in rows)


def _rows(run: Path) -> Rows:
    rows: Rows = {}
    path = run / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # being written
        if "train/loss" in row:
            rows[int(row["step"])] = row
    return rows


def first_difference(rows: Rows, reference: Rows, steps: Iterable[int], tolerance: float) -> str | None:
    """Return the first step and metric that differ, None where all agree.

    Counts of labels must be equal; the gradient's norm may differ ten times as much as losses.

    Args:
        tolerance: relative, of losses; 0: bit for bit.
    """
    for step in steps:
        if step not in rows or step not in reference:
            return f"step {step} is missing"
        mine, other = rows[step], reference[step]
        if mine.keys() != other.keys():
            return f"step {step}: other metrics: {', '.join(sorted(mine.keys() ^ other.keys()))}"
        for name, value in other.items():
            if name != "train/loss" and name != "grad_norm" and not name.startswith("labels/") and tolerance:
                continue  # small parts of the loss
            bound = 0.0 if name.startswith("labels/") else tolerance * (10 if name == "grad_norm" else 1) * abs(value)
            if not abs(mine[name] - value) <= bound:
                return f"step {step}: {name} is {mine[name]:.9g}, not {value:.9g}"
    return None


def largest_difference(rows: Rows, reference: Rows, steps: Iterable[int]) -> float:
    """Return the largest relative difference of the loss."""
    name = "train/loss"
    return max(abs(rows[s][name] - reference[s][name]) / abs(reference[s][name]) for s in steps)


def cut_rows(run: Path, step: int) -> None:
    """Remove the rows after a step, as a resume does: what is there later, the resumed run has written."""
    path = run / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
    path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


def mean_loss(rows: Rows) -> float:
    """Return the mean loss over the steps."""
    return statistics.fmean(row["train/loss"] for row in rows.values())


def latest(run: Path) -> int:
    """Return the step of the newest checkpoint."""
    return int((run / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))


def checkpoint(run: Path, step: int) -> Path:
    """Return the folder of a checkpoint."""
    return run / "checkpoints" / f"step-{step:08d}"


def differing_files(run: Path, reference: Path, step: int) -> list[str]:
    """Return the tensor files of a checkpoint that are not the same byte for byte."""
    mine, whole = checkpoint(run, step), checkpoint(reference, step)
    names = sorted(path.name for path in whole.glob("*.safetensors"))
    same = [(mine / n).is_file() and (mine / n).read_bytes() == (whole / n).read_bytes() for n in names]
    return [name for name, is_same in zip(names, same, strict=True) if not is_same]


def branch(run: Path, target: Path, step: int, steps: int) -> Path:
    """Copy a run as it stood after a checkpoint, to be resumed there up to ``steps``; return the copy."""
    shutil.rmtree(target, ignore_errors=True)
    (target / "checkpoints").mkdir(parents=True)
    shutil.copytree(checkpoint(run, step), checkpoint(target, step))
    (target / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")
    for name in ("potential", "weights"):
        shutil.copytree(run / name, target / name)
    shutil.copy(run / "metrics.jsonl", target)
    recipe = read_yaml(run / "recipe.yaml")
    recipe["run"] = str(target)
    recipe["train"] |= {"steps": steps, "validate_every": steps}
    (target / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    return target
