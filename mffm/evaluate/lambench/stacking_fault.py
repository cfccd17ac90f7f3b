"""Stacking faults: energy along 46 slip paths of 10 frames, single points, and the slope of the normalised profile."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator

from mffm.errors import InputError
from mffm.evaluate.benchmark.task import LAMBENCH, DataFile, Options, Score
from mffm.evaluate.lambench.differences import PUBLISHED, plain, read_frames

MJ_PER_M2 = 16021.766208  # of eV/Å²
N_POINTS = 200
N_OF_SUITE = 46
ABSURD = 1e5  # mJ/m²
FOLDER = DataFile(
    "lambench/stacking_fault/",
    PUBLISHED,
    "for each path NAME.traj (ASE trajectory) and NAME.csv with the columns Displacement and Energy (mJ/m²)",
)


@dataclass(frozen=True)
class SlipPath:
    """Frames of a path, their displacements and energies over the lowest, mJ/m²."""

    frames: tuple[Atoms, ...]
    displacements: np.ndarray
    energies: np.ndarray


def profile_errors(path: SlipPath, energies: np.ndarray) -> tuple[float, float]:
    """Return the MAE of a profile (mJ/m²) and of the slope of the profile over its maximum, on 200 PCHIP points.

    Both are rounded to 4 decimals, as the suite does before it averages.
    """
    from scipy.interpolate import PchipInterpolator

    x = np.linspace(path.displacements.min(), path.displacements.max(), N_POINTS)
    label, value = (PchipInterpolator(path.displacements, e)(x) for e in (path.energies, energies))
    slopes = [np.diff(y) * (N_POINTS - 1) / y.max() for y in (label, value)]
    return (
        round(float(np.abs(label - value).mean()), 4),
        round(float(np.abs(slopes[0] - slopes[1]).mean()), 4),
    )


class StackingFault:
    """Mean over paths of the errors of a profile and of its slope."""

    name, suite = "stacking_fault", LAMBENCH
    title = "stacking-fault profiles"
    files = (FOLDER,)

    def load(self, data: Path) -> Mapping[str, SlipPath]:
        found = {}
        for trajectory in sorted((data / FOLDER.path).rglob("*.traj")):
            table = trajectory.with_suffix(".csv")
            if not table.is_file():
                raise InputError(f"{trajectory}: no {table.name} beside it; expected {FOLDER.layout}")
            with table.open(newline="") as file:
                rows = list(csv.DictReader(file))
            columns = [np.array([float(r[k]) for r in rows]) for k in ("Displacement", "Energy")]
            name = str(trajectory.relative_to(data / FOLDER.path).with_suffix(""))
            found[name] = SlipPath(tuple(plain(a) for a in read_frames(trajectory)), columns[0], columns[1])
        return found

    def run(self, item: SlipPath, calculator: BaseCalculator, options: Options) -> dict[str, Any]:
        area = float(np.linalg.norm(np.cross(item.frames[0].cell[0], item.frames[0].cell[1])))
        energies = []
        for frame in item.frames:
            atoms = frame.copy()
            atoms.calc = calculator
            energies.append(float(atoms.get_potential_energy()))
        lowest = min(energies)
        return {"energies": [(e - lowest) * MJ_PER_M2 / area for e in energies]}

    def doubt(self, item: SlipPath, result: Mapping[str, Any]) -> str | None:
        highest = max(result["energies"])
        return f"{highest:.3g} mJ/m²; counts, as in the suite" if highest > ABSURD else None

    def score(self, items: Mapping[str, SlipPath], results: Mapping[str, Mapping[str, Any]]) -> Score:
        done = [i for i in items if i in results]
        errors = [profile_errors(items[i], np.array(results[i]["energies"])) for i in done]
        means = [round(float(np.mean(e)), 4) for e in zip(*errors, strict=True)] if done else [None, None]
        is_whole = len(items) == N_OF_SUITE
        panels = []
        if done:
            label = np.concatenate([items[i].energies for i in done])
            panels = [(self.title, "mJ/m²", label, np.concatenate([results[i]["energies"] for i in done]))]
        return Score(
            {"MAE_E": means[0], "MAE_dE": means[1]},
            "mJ/m²; MAE_dE per unit of displacement",
            len(items),
            len(items) - len(done),
            {"MAE_E": "MAE_E", "MAE_dE": "MAE_dE"} if is_whole else {},
            "" if is_whole else f"{len(items)} of {N_OF_SUITE}: not to be compared with the leaderboard",
            panels,
        )

    def write(self, items: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
        """Write nothing: the suite takes no submissions of this task."""


TASK = StackingFault()
