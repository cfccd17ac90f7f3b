"""Relaxations as both suites do them: ASE's FIRE, cell and positions together.

What does not converge within its steps counts in both.
"""

from typing import Any

from ase import Atoms
from ase.calculators.calculator import BaseCalculator

from mffm.properties.relax import Relaxation
from mffm.properties.relax import relax as driver

LARGEST_FORCE = 1e4  # eV/Å; beyond it a relaxation is given up, as LAMBench's phonon task does


def relax(atoms: Atoms, calculator: BaseCalculator, fmax: float, steps: int, **options: Any) -> Relaxation:
    """Relax positions and cell (FIRE, FrechetCellFilter).

    Args:
        atoms: not changed.
        fmax: eV/Å, also of the cell's generalised forces.
        options: pressure (GPa), symprec and strains, as of the driver.

    Raises:
        Diverged: forces that are not finite or beyond 1e4 eV/Å.
    """
    start = atoms.copy()
    start.calc = calculator
    return driver(start, "fire", "full", fmax, steps, largest_force=LARGEST_FORCE, **options)
