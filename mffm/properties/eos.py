"""Equations of state: energies of a scaled cell and a Birch-Murnaghan fit."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.eos import EquationOfState, birchmurnaghan

from mffm import plots
from mffm.errors import InputError
from mffm.properties.relax import relax
from mffm.properties.report import require_volume


@dataclass(frozen=True)
class Fit:
    """Minimum of an equation of state: volume (Å³), energy (eV), bulk modulus (GPa) and its pressure derivative."""

    volume: float
    energy: float
    bulk_modulus: float
    derivative: float

    def energies(self, volumes: np.ndarray) -> np.ndarray:
        """Return the fitted energies at volumes, eV."""
        return np.asarray(
            birchmurnaghan(volumes, self.energy, self.bulk_modulus * units.GPa, self.derivative, self.volume)
        )


def fit(volumes: np.ndarray, energies: np.ndarray) -> Fit | None:
    """Fit Birch-Murnaghan's equation of state.

    Args:
        volumes, energies: [n] Å³ and eV.

    Returns:
        the fit; None where it fails, its minimum lies outside the volumes, or it is none.
    """
    curve = EquationOfState(volumes, energies, eos="birchmurnaghan")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a minimum outside, which is looked at here
            minimum, energy, bulk = curve.fit()
    except (RuntimeError, ValueError):
        return None
    if not volumes.min() < minimum < volumes.max() or not 0 < bulk < np.inf:
        return None
    return Fit(float(minimum), float(energy), float(bulk / units.GPa), float(curve.eos_parameters[2]))


@dataclass(frozen=True)
class Eos:
    """Energies [n] (eV) of a cell at volumes [n] (Å³), and their fit where there is a minimum.

    Attributes:
        n_not_relaxed: cells whose atoms did not come to the largest force that was asked for.
    """

    formula: str
    n_atoms: int
    lengths: np.ndarray
    volume: float
    volumes: np.ndarray
    energies: np.ndarray
    fit: Fit | None
    n_not_relaxed: int = 0

    def found(self) -> dict[str, Any]:
        """Return what a report holds."""
        fitted: dict[str, Any] = {}
        if self.fit is not None:
            fitted = {
                "volume_ang3": self.fit.volume,
                "energy_ev": self.fit.energy,
                "bulk_modulus_gpa": self.fit.bulk_modulus,
                "bulk_modulus_derivative": self.fit.derivative,
                "cell_lengths_ang": self.lengths * np.cbrt(self.fit.volume / self.volume),
            }
        return {
            "formula": self.formula,
            "n_atoms": self.n_atoms,
            "has_minimum": self.fit is not None,
            "n_not_relaxed": self.n_not_relaxed,
            **fitted,
            "volumes_ang3": self.volumes,
            "energies_ev": self.energies,
        }


def eos(
    atoms: Atoms, strain: float = 0.06, points: int = 9, relaxed: bool = False, fmax: float = 0.01, steps: int = 500
) -> Eos:
    """Return the equation of state of a crystal with its calculator.

    Args:
        atoms: with a calculator.
        strain: of the lengths, both ways; atoms move with the cell.
        points: volumes.
        relaxed: relax the atoms in each cell to ``fmax`` eV/Å, by at most ``steps`` steps.

    Raises:
        InputError: no volume, fewer than 5 points, a strain outside of (0, 0.3); what the calculator raises.
    """
    require_volume(atoms, "an equation of state")
    if points < 5 or not 0 < strain < 0.3:
        raise InputError(f"{points} points within ±{strain:g}: expected 5 or more points, and a strain below 0.3")
    scales = 1 + np.linspace(-strain, strain, points)
    energies, n_not_relaxed = [], 0
    for scale in scales:
        cell = atoms.copy()
        cell.set_cell(atoms.cell * scale, scale_atoms=True)
        cell.calc = atoms.calc
        if relaxed:
            relaxation = relax(cell, fmax=fmax, steps=steps)
            n_not_relaxed += not relaxation.converged
            energies.append(relaxation.energies[-1])
        else:
            energies.append(cell.get_potential_energy())
    volumes = atoms.get_volume() * scales**3
    values = np.array(energies)
    return Eos(
        atoms.get_chemical_formula(), len(atoms), atoms.cell.lengths(), atoms.get_volume(), volumes, values,
        fit(volumes, values), n_not_relaxed,
    )  # fmt: skip


def draw(result: Eos, path: Path) -> None:
    """Draw the energies and the fit."""
    lowest, n = result.energies.min(), result.n_atoms
    entries = {"calculated": (result.volumes / n, 1e3 * (result.energies - lowest) / n, "o")}
    if result.fit is not None:
        fine = np.linspace(result.volumes.min(), result.volumes.max(), 200)
        entries["Birch-Murnaghan"] = (fine / n, 1e3 * (result.fit.energies(fine) - lowest) / n, "-")
    plots.curves(path, [("volume, Å³/atom", "energy above the lowest, meV/atom", entries)])
