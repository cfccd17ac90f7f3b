"""Barriers on catalysts: OC20NEB-OOD (Wander et al., arXiv:2405.02078), single points on DFT's paths.

The first frame, the one that DFT finds highest, and the last.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator

from mffm.errors import InputError
from mffm.evaluate.benchmark.task import LAMBENCH, DataFile, Options, Score, mean_absolute
from mffm.evaluate.lambench.differences import PUBLISHED, plain, read_frames

FAILED_FROM = 0.1  # eV of barrier error
KINDS = {"desorption": "ø_Desorption", "dissociation": "ø_Dissociation", "transfer": "ø_Transfer"}
ABSURD = 100.0  # eV
N_OF_SUITE = 460
LABELS = DataFile(
    "lambench/OC20NEB-OOD/label.csv",
    f"github.com/facebookresearch/fairchem OC20NEB (CC-BY-4.0); {PUBLISHED}",
    "columns traj, Ea, dE (eV); beside it traj.traj, 10 frames with energies; names start with desorption, "
    "dissociation or transfer",
)
PATHS = DataFile("lambench/OC20NEB-OOD/", LABELS.published, "traj.traj for each row of label.csv")


@dataclass(frozen=True)
class ReactionPath:
    """Initial, highest and final frame, and DFT's barrier and reaction energy, eV."""

    frames: tuple[Atoms, Atoms, Atoms]
    barrier: float
    reaction: float


class Neb:
    """MAE of barriers and reaction energies, and the share of barriers more than 0.1 eV off by kind, in percent."""

    name, suite = "neb", LAMBENCH
    title = "OC20NEB barriers"
    files = (LABELS, PATHS)

    def load(self, data: Path) -> Mapping[str, ReactionPath]:
        folder = (data / LABELS.path).parent
        with (data / LABELS.path).open(newline="") as file:
            rows = sorted(csv.DictReader(file), key=lambda r: r["traj"])
        found = {}
        for row in rows:
            path = folder / f"{row['traj']}.traj"
            if not path.is_file():
                raise InputError(f"{path}: no such file; expected {LABELS.layout}")
            frames = read_frames(path)
            highest = int(np.argmax([a.get_potential_energy() for a in frames]))
            chosen = (plain(frames[0]), plain(frames[highest]), plain(frames[-1]))
            found[row["traj"]] = ReactionPath(chosen, float(row["Ea"]), float(row["dE"]))
        return found

    def run(self, item: ReactionPath, calculator: BaseCalculator, options: Options) -> dict[str, Any]:
        energies = []
        for frame in item.frames:
            atoms = frame.copy()
            atoms.calc = calculator
            energies.append(float(atoms.get_potential_energy()))
        return {"Ea": energies[1] - energies[0], "dE": energies[2] - energies[0]}

    def doubt(self, item: ReactionPath, result: Mapping[str, Any]) -> str | None:
        barrier = result["Ea"]
        return f"barrier {barrier:.3g} eV; counts, as in the suite" if abs(barrier) > ABSURD else None

    def score(self, items: Mapping[str, ReactionPath], results: Mapping[str, Mapping[str, Any]]) -> Score:
        done = [i for i in items if i in results]
        errors = {i: results[i]["Ea"] - items[i].barrier for i in done}
        metrics: dict[str, float | None] = {
            "MAE_Ea": mean_absolute(list(errors.values())),
            "MAE_dE": mean_absolute([results[i]["dE"] - items[i].reaction for i in done]),
        }
        for kind, name in KINDS.items():  # a path that failed is no barrier within 0.1 eV
            own = [i for i in items if i.split("_")[0] == kind]
            off = [i for i in own if i not in errors or abs(errors[i]) > FAILED_FROM]
            metrics[name] = round(100 * len(off) / len(own), 2) if own else None
        metrics["success_rate"] = 100 * len(done) / len(items)
        is_whole = len(items) == N_OF_SUITE
        label = np.array([items[i].barrier for i in done])
        value = np.array([results[i]["Ea"] for i in done])
        return Score(
            metrics,
            "eV; ø and success_rate in percent",
            len(items),
            len(items) - len(done),
            {k: k for k in metrics} if is_whole else {},
            "" if is_whole else f"{len(items)} of {N_OF_SUITE}: not to be compared with the leaderboard",
            [("barriers", "eV", label, value)] if done else (),
        )

    def write(self, items: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
        """Write nothing: the suite takes no submissions of this task."""


TASK = Neb()
