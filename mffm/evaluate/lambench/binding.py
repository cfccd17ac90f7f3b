"""Protein fragments and ligands: PLF547 (J. Chem. Inf. Model. 60, 1453 (2020)), E(complex) − E(site) − E(ligand)."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mffm.evaluate.benchmark.task import DataFile
from mffm.evaluate.lambench.differences import KCAL_PER_EV, PUBLISHED, Difference, DifferenceTask, molecule, read_frames

FOLDER = "lambench/PLF547/"
FILES = (
    *(
        DataFile(FOLDER + f"{n}.traj", PUBLISHED, "ASE trajectory with charge and spin in info")
        for n in ("combined", "active_site", "drug")
    ),
    DataFile(FOLDER + "labels.npy", PUBLISHED, "[547] kcal/mol"),
)


def load(data: Path) -> Mapping[str, Difference]:
    """Return pair → interaction energy."""
    parts = [
        [molecule(a, int(a.info["charge"]), int(a.info["spin"])) for a in read_frames(data / f.path)] for f in FILES[:3]
    ]
    labels = np.load(data / FILES[3].path, allow_pickle=False)
    return {
        f"PLF-{n}": Difference(list(zip((1.0, -1.0, -1.0), atoms, strict=True)), KCAL_PER_EV, float(labels[n]))
        for n, atoms in enumerate(zip(*parts, strict=True))
    }


TASK = DifferenceTask("binding_energy", "PLF547 interaction energies", FILES, load, "kcal/mol", 547, True)
