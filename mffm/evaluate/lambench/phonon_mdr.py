"""Phonons of the MDR set (Loew et al., arXiv:2412.16551): 9958 crystals, PBE.

Protocol: relax (FIRE, FrechetCellFilter, FixSymmetry, fmax 1e-3, 500 steps); displacements of 0.01 Å along no diagonals
in the reference's supercell, the mean force subtracted; force constants symmetrised; thermal properties at 300 K on
phonopy's default mesh; the highest frequency among the q-points that fit the supercell.
"""

import bz2
import csv
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator

from mffm.evaluate.benchmark.task import LAMBENCH, DataFile, Options, Score, mean_absolute
from mffm.evaluate.lambench.differences import PUBLISHED
from mffm.evaluate.relaxation import relax
from mffm.properties.phonons import find_force_constants

DISPLACEMENT, FMAX, STEPS, SYMPREC, KELVIN = 0.01, 1e-3, 500, 1e-2, 300.0
KELVIN_PER_THZ = 47.9924  # the suite's digits
N_OF_SUITE = 9958
ABSURD = 1e5  # K of the highest frequency
KEYS = ("max_freq", "entropy", "free_energy", "heat_capacity")
LABELS = DataFile(
    "lambench/MDR_PBE_phonon/pbe.csv",
    f"alexandria.icams.rub.de, phonon benchmark; {PUBLISHED}",
    "columns mp_id, max_freq (K), entropy, free_energy, heat_capacity (J/K/mol, kJ/mol, J/K/mol); beside it a phonopy "
    "file mp_id.yaml.bz2 for each",
)
PHONONS = DataFile("lambench/MDR_PBE_phonon/", LABELS.published, "mp_id.yaml.bz2 for each row of pbe.csv")


@dataclass(frozen=True)
class Phonons:
    """A phonopy file of the reference, and its labels by name."""

    file: Path
    labels: Mapping[str, float]


def compute(file: Path, calculator: BaseCalculator) -> dict[str, float]:
    """Return highest frequency (K), entropy, free energy and heat capacity at 300 K of a phonopy file's unit cell."""
    import phonopy
    from phonopy.structure.atoms import PhonopyAtoms

    reference = read_phonopy(file)
    cell = reference.unitcell
    atoms = Atoms(cell.symbols, cell=cell.cell, scaled_positions=cell.scaled_positions, pbc=True)
    relaxed = relax(atoms, calculator, FMAX, STEPS, symprec=SYMPREC).atoms
    phonons = phonopy.Phonopy(
        PhonopyAtoms(list(relaxed.symbols), cell=relaxed.cell.array, positions=relaxed.positions),
        supercell_matrix=reference.supercell_matrix,
        primitive_matrix=reference.primitive_matrix,
    )
    phonons.generate_displacements(distance=DISPLACEMENT, is_diagonal=False)
    relaxed.calc = calculator
    find_force_constants(phonons, relaxed)
    return quantities(phonons)


def quantities(phonons: Any) -> dict[str, float]:
    """Return the four quantities of a phonopy object with force constants, per mole of primitive cells.

    Modes of almost no frequency at Γ count, as in the suite; they change the free energy by 6 J/mol.
    """
    from phonopy.harmonic.dynmat_to_fc import get_commensurate_points

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        phonons.run_mesh()
        phonons.run_thermal_properties(temperatures=[KELVIN])
    thermal = phonons.thermal_properties
    points = get_commensurate_points(phonons.supercell_matrix)
    highest = max(float(np.max(phonons.get_frequencies(q))) for q in points)
    return {
        "max_freq": highest * KELVIN_PER_THZ,
        **{k: float(getattr(thermal, k)[0]) for k in KEYS[1:]},
    }


def read_phonopy(file: Path) -> Any:
    """Return phonopy's object of a compressed file, without force constants."""
    import phonopy

    with tempfile.NamedTemporaryFile("wb", suffix=".yaml") as plain:
        plain.write(bz2.decompress(file.read_bytes()))
        plain.flush()
        return phonopy.load(plain.name, produce_fc=False, log_level=0)


class PhononMdr:
    """MAE of four quantities; a failure is left out of the MAE and divides the score."""

    name, suite = "phonon_mdr", LAMBENCH
    title = "phonons of the MDR set"
    files = (LABELS, PHONONS)

    def load(self, data: Path) -> Mapping[str, Phonons]:
        folder = (data / LABELS.path).parent
        with (data / LABELS.path).open(newline="") as file:
            return {
                row["mp_id"]: Phonons(folder / f"{row['mp_id']}.yaml.bz2", {k: float(row[k]) for k in KEYS})
                for row in csv.DictReader(file)
            }

    def run(self, item: Phonons, calculator: BaseCalculator, options: Options) -> dict[str, Any]:
        return compute(item.file, calculator)

    def doubt(self, item: Phonons, result: Mapping[str, Any]) -> str | None:
        highest = result["max_freq"]
        return f"highest frequency {highest:.3g} K; counts, as in the suite" if highest > ABSURD else None

    def score(self, items: Mapping[str, Phonons], results: Mapping[str, Mapping[str, Any]]) -> Score:
        done = [i for i in items if i in results]
        metrics: dict[str, float | None] = {
            f"mae_{k}": mean_absolute([results[i][k] - items[i].labels[k] for i in done]) for k in KEYS
        }
        metrics["success_rate"] = len(done) / len(items)
        is_whole = len(items) == N_OF_SUITE
        panels = [
            (k, unit, np.array([items[i].labels[k] for i in done]), np.array([results[i][k] for i in done]))
            for k, unit in zip(KEYS, ("K", "J/K/mol", "kJ/mol", "J/K/mol"), strict=True)
        ]
        return Score(
            metrics,
            "K, J/K/mol, kJ/mol, J/K/mol",
            len(items),
            len(items) - len(done),
            {k: k for k in metrics} if is_whole else {},
            "" if is_whole else f"{len(items)} of {N_OF_SUITE}: not to be compared with the leaderboard",
            panels if done else (),
        )

    def write(self, items: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
        """Write nothing: the suite takes no submissions of this task."""


TASK = PhononMdr()
