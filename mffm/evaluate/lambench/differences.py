"""Tasks whose answer is a sum of total energies with coefficients: reactions, conformers, defects, surfaces."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from ase.io import read

from mffm.evaluate.benchmark.task import LAMBENCH, DataFile, Options, Score, mean_absolute, root_mean_square
from mffm.evaluate.lambench.scores import PROPERTY

KCAL_PER_EV = 23.06092234465  # the suite's, but for two tasks of conformers
HARTREE_IN_KCAL = 627.50947406
ABSURD = 100  # times the dummy's error: reported, and counted as the suite does
PUBLISHED = "aissquare.com data set 336 (LAMBench test data)"


@dataclass(frozen=True)
class Difference:
    """``factor`` × Σ coefficient × energy (eV), and its label in the task's unit."""

    terms: Sequence[tuple[float, Atoms]]
    factor: float
    label: float


def molecule(atoms: Atoms, charge: int, multiplicity: int) -> Atoms:
    """Return atoms that say charge and spin multiplicity in the ways that calculators read them.

    In ``info`` as ``charge`` and ``spin``; where they are not neutral singlets also as initial charges and moments,
    which TBLite reads.
    """
    found = Atoms(atoms.symbols, atoms.positions, info={"charge": charge, "spin": multiplicity})
    if charge:
        found.set_initial_charges([float(charge)] + [0.0] * (len(found) - 1))
    if multiplicity > 1:
        found.set_initial_magnetic_moments([multiplicity - 1.0] + [0.0] * (len(found) - 1))
    return found


def plain(atoms: Atoms) -> Atoms:
    """Return atoms without stored results, constraints or notes."""
    return Atoms(atoms.symbols, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)


def read_frames(path: Path) -> list[Atoms]:
    """Return all frames of a trajectory."""
    frames = read(path, index=":")
    return [a for a in frames if isinstance(a, Atoms)]


@dataclass(frozen=True)
class DifferenceTask:
    """A task of the suite that consists of `Difference`.

    Attributes:
        loader: data folder → id → difference.
        unit: of labels and metrics.
        n_of_suite: size of the published set; another size is not compared with the leaderboard.
        has_success_rate: whether the suite reports one.
    """

    name: str
    title: str
    files: Sequence[DataFile]
    loader: Callable[[Path], Mapping[str, Difference]]
    unit: str
    n_of_suite: int
    has_success_rate: bool = False
    remark: str = ""
    suite: str = LAMBENCH

    def load(self, data: Path) -> Mapping[str, Difference]:
        return self.loader(data)

    def run(self, item: Difference, calculator: BaseCalculator, options: Options) -> dict[str, Any]:
        total = 0.0
        for coefficient, structure in item.terms:
            atoms = structure.copy()
            atoms.calc = calculator
            total += coefficient * float(atoms.get_potential_energy())
        return {"value": total * item.factor}

    def doubt(self, item: Difference, result: Mapping[str, Any]) -> str | None:
        dummy = PROPERTY[self.name].dummies["MAE"] if self.name in PROPERTY else 100.0
        error = result["value"] - item.label
        return f"{error:+.3g} {self.unit} off; counts, as in the suite" if abs(error) > ABSURD * dummy else None

    def score(self, items: Mapping[str, Difference], results: Mapping[str, Mapping[str, Any]]) -> Score:
        done = [i for i in items if i in results]
        label = np.array([items[i].label for i in done])
        value = np.array([results[i]["value"] for i in done])
        errors = (value - label).tolist()
        metrics: dict[str, float | None] = {"MAE": mean_absolute(errors), "RMSE": root_mean_square(errors)}
        if self.has_success_rate:
            metrics["success_rate"] = len(done) / len(items)
        is_whole = len(items) == self.n_of_suite
        part = "" if is_whole else f"{len(items)} of {self.n_of_suite}: not to be compared with the leaderboard"
        return Score(
            metrics,
            self.unit,
            len(items),
            len(items) - len(done),
            {"MAE": "MAE", "RMSE": "RMSE"} if is_whole and self.name in PROPERTY else {},
            ". ".join(t for t in (part, self.remark) if t),
            [(self.title, self.unit, label, value)] if done else (),
        )

    def write(self, items: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
        """Write nothing: the suite takes no submissions of this task."""
