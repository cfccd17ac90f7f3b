"""Reaction barriers: BH876 of GSCDB137 (Liang and Head-Gordon, arXiv:2508.13468), sums of single points."""

import csv
import gzip
from collections.abc import Mapping
from io import StringIO
from pathlib import Path

from ase.io import iread

from mffm.errors import InputError
from mffm.evaluate.benchmark.task import DataFile
from mffm.evaluate.lambench.differences import HARTREE_IN_KCAL, KCAL_PER_EV, Difference, DifferenceTask, molecule

GSCDB = "github.com/JiashuLiang/GSCDB c6da4d8 (CC BY 4.0)"
SPECIES = DataFile(
    "bh876/BH876.extxyz.gz",
    GSCDB,
    "extxyz with ID, charge and spin (multiplicity) in the comments",
    "6f5d7ad76ca8b99782b6347140fd1a1ab0175f2ae00b794f51c1e1a46e6f146b",
)
REACTIONS = DataFile(
    "bh876/stoichiometry.csv",
    GSCDB,
    "columns Reaction, Dataset, Reference (Hartree), Stoichiometry (coefficient,ID,coefficient,ID,...)",
    "712ea4d48734e3429c4f74f420aaeac52cf913400eb3a4ddc4a41a97fbf47fbd",
)


def load(data: Path) -> Mapping[str, Difference]:
    """Return reaction → difference of its species' energies, kcal/mol."""
    with gzip.open(data / SPECIES.path, "rt") as file:
        text = StringIO(file.read())
    species = {
        str(atoms.info["ID"]): molecule(atoms, int(atoms.info["charge"]), int(atoms.info["spin"]))
        for atoms in iread(text, format="extxyz")
    }
    found = {}
    with (data / REACTIONS.path).open(newline="") as file:
        for row in csv.DictReader(file):
            parts = row["Stoichiometry"].split(",")
            names = parts[1::2]
            unknown = [n for n in names if n not in species]
            if unknown:
                raise InputError(
                    f"{data / REACTIONS.path}: reaction {row['Reaction']} has no structure of {unknown[0]}"
                )
            terms = [(float(c), species[n]) for c, n in zip(parts[::2], names, strict=True)]
            label = float(row["Reference"]) * HARTREE_IN_KCAL
            found[row["Reaction"]] = Difference(terms, KCAL_PER_EV, label)
    return found


TASK = DifferenceTask(
    "rxn_barrier", "BH876 reaction barriers", (SPECIES, REACTIONS), load, "kcal/mol", 876, has_success_rate=True
)
