"""Volumes under pressure (Loew et al., J. Phys. Mater. 9, 015010 (2026)): 45 crystals at each of six pressures.

The suite reads one file for the start and for the label, so relaxations start from DFT's answer.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator

from mffm.evaluate.benchmark.task import LAMBENCH, DataFile, Options, Score, mean_absolute, root_mean_square
from mffm.evaluate.lambench.differences import PUBLISHED, plain, read_frames
from mffm.evaluate.relaxation import relax

PRESSURES = (25, 50, 75, 100, 125, 150)  # GPa
FMAX, STEPS = 1e-3, 500
ABSURD = 10.0  # times DFT's volume
N_OF_SUITE = 270
FILES = tuple(
    DataFile(f"lambench/pressure/P{p:03d}.traj", PUBLISHED, f"ASE trajectory, DFT's structures at {p} GPa")
    for p in PRESSURES
)


class Compressed(NamedTuple):
    """A structure at its pressure, GPa."""

    atoms: Atoms
    pressure: int


class Pressure:
    """MAE and RMSE of the volume an atom."""

    name, suite = "pressure", LAMBENCH
    title = "volumes under pressure"
    files = FILES

    def load(self, data: Path) -> Mapping[str, Compressed]:
        return {
            f"P{p:03d}-{n}": Compressed(plain(atoms), p)
            for p, file in zip(PRESSURES, FILES, strict=True)
            for n, atoms in enumerate(read_frames(data / file.path))
        }

    def run(self, item: Compressed, calculator: BaseCalculator, options: Options) -> dict[str, Any]:
        found = relax(item.atoms, calculator, FMAX, STEPS, pressure=item.pressure)
        volume = found.atoms.get_volume() / len(found.atoms)
        return {"volume": float(volume), "converged": found.converged, "n_steps": found.n_steps}

    def doubt(self, item: Compressed, result: Mapping[str, Any]) -> str | None:
        ratio = result["volume"] * len(item.atoms) / item.atoms.get_volume()
        return f"{ratio:.3g} times DFT's volume; counts, as in the suite" if not 1 / ABSURD < ratio < ABSURD else None

    def score(self, items: Mapping[str, Compressed], results: Mapping[str, Mapping[str, Any]]) -> Score:
        done = [i for i in items if i in results]
        label = np.array([items[i].atoms.get_volume() / len(items[i].atoms) for i in done])
        value = np.array([results[i]["volume"] for i in done])
        errors = (value - label).tolist()
        is_whole = len(items) == N_OF_SUITE
        return Score(
            {
                "MAE": mean_absolute(errors),
                "RMSE": root_mean_square(errors),
                "success_rate": len(done) / len(items),
            },
            "Å³/atom",
            len(items),
            len(items) - len(done),
            {"MAE": "MAE", "RMSE": "RMSE"} if is_whole else {},
            "" if is_whole else f"{len(items)} of {N_OF_SUITE}: not to be compared with the leaderboard",
            [("volume", "Å³/atom", label, value)] if done else (),
        )

    def write(self, items: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
        """Write nothing: the suite takes no submissions of this task."""


TASK = Pressure()
