"""Oxygen vacancies (Chem. Mater. 35, 10619 (2023)): unrelaxed formation energies against half an O2."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from ase import Atoms

from mffm.evaluate.benchmark.task import DataFile
from mffm.evaluate.lambench.differences import PUBLISHED, Difference, DifferenceTask, plain, read_frames

FOLDER = "lambench/vacancy/"
FILES = (
    DataFile(FOLDER + "vacancy_pristine_structures.traj", PUBLISHED, "ASE trajectory"),
    DataFile(FOLDER + "vacancy_defect_structures.traj", PUBLISHED, "ASE trajectory, in the same order"),
    DataFile(FOLDER + "vacancy_evf_label.npy", PUBLISHED, "[1813] eV"),
)
BOND, BOX = 1.23, 30.0  # Å


def load(data: Path) -> Mapping[str, Difference]:
    """Return pair → E(defect) + n E(O2)/2 − E(pristine)."""
    pristine, defect = (read_frames(data / f.path) for f in FILES[:2])
    labels = np.load(data / FILES[2].path, allow_pickle=False)
    half = BOX / 2
    oxygen = Atoms("O2", [(half, half, half - BOND / 2), (half, half, half + BOND / 2)], cell=[BOX] * 3, pbc=True)
    found = {}
    for n, (whole, vacant, label) in enumerate(zip(pristine, defect, labels, strict=True)):
        terms = [(1.0, plain(vacant)), ((len(whole) - len(vacant)) / 2, oxygen), (-1.0, plain(whole))]
        found[f"vacancy-{n}"] = Difference(terms, 1.0, float(label))
    return found


TASK = DifferenceTask("vacancy", "oxygen vacancies", FILES, load, "eV", 1813)
