"""Relaxations as both suites do them: ASE's FIRE, cell and positions together."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from ase.constraints import FixSymmetry
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE

LARGEST_FORCE = 1e4  # eV/Å; beyond it a relaxation is given up, as LAMBench's phonon task does


@dataclass(frozen=True)
class Relaxed:
    """The end of a relaxation; what did not converge within its steps still counts in both suites."""

    atoms: Atoms
    energy: float
    converged: bool
    n_steps: int


def relax(
    atoms: Atoms,
    calculator: BaseCalculator,
    fmax: float,
    steps: int,
    symprec: float | None = None,
    mask: list[bool] | None = None,
    pressure: float = 0.0,
) -> Relaxed:
    """Relax positions and cell (FIRE, FrechetCellFilter).

    Args:
        atoms: not changed.
        fmax: eV/Å, also of the cell's generalised forces.
        symprec: keep the space group found at this tolerance, Å; None: no constraint.
        mask: [6] Voigt strains that are free; None: all.
        pressure: eV/Å³.

    Raises:
        FloatingPointError: forces that are not finite or beyond 1e4 eV/Å.
    """
    atoms = atoms.copy()
    atoms.calc = calculator
    if symprec is not None:
        atoms.set_constraint(FixSymmetry(atoms, symprec=symprec))
    options: dict[str, Any] = {} if mask is None else {"mask": mask}
    optimiser = FIRE(FrechetCellFilter(atoms, scalar_pressure=pressure, **options), logfile=None)

    def check() -> None:
        largest = float(np.abs(atoms.get_forces(apply_constraint=False)).max())
        if not largest <= LARGEST_FORCE:
            raise FloatingPointError(f"force {largest:g} eV/Å after {optimiser.nsteps} steps of relaxation")

    optimiser.attach(check)
    converged = bool(optimiser.run(fmax=fmax, steps=steps))
    energy = float(atoms.get_potential_energy())
    return Relaxed(atoms, energy, converged, int(optimiser.nsteps))
