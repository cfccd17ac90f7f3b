"""Relaxations: ASE's optimizers and cell filters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import all_properties
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixSymmetry
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE, LBFGS
from ase.optimize.optimize import Optimizer

from mffm import plots
from mffm.errors import InputError, known
from mffm.properties.report import require_volume

OPTIMIZERS: dict[str, type[Optimizer]] = {"lbfgs": LBFGS, "fire": FIRE}
# What of the cell is relaxed with the atoms → arguments of ASE's filter.
CELLS: dict[str, dict[str, bool] | None] = {
    "fixed": None, "full": {}, "volume": {"hydrostatic_strain": True}, "shape": {"constant_volume": True}
}  # fmt: skip


class Diverged(InputError, FloatingPointError):
    """A relaxation whose forces are beyond reason: bad input to a user, a failed structure to a benchmark."""


@dataclass(frozen=True)
class Relaxation:
    """A relaxed structure and the way to it.

    Attributes:
        atoms: at the end, with its results.
        energies: [n_steps + 1], eV. max_forces: [n_steps + 1], eV/Å; of what is relaxed, so with a cell filter the
            derivative in the logarithm of the deformation (eV) is among them.
    """

    atoms: Atoms
    converged: bool
    energies: np.ndarray
    max_forces: np.ndarray
    volume_change: float

    @property
    def n_steps(self) -> int:
        return len(self.energies) - 1

    def found(self) -> dict[str, Any]:
        """Return what a report holds."""
        return {
            "formula": self.atoms.get_chemical_formula(),
            "n_atoms": len(self.atoms),
            "converged": self.converged,
            "n_steps": self.n_steps,
            "energy_ev": self.energies[-1],
            "energy_change_ev": self.energies[-1] - self.energies[0],
            "max_force_ev_per_ang": self.max_forces[-1],
            "volume_change": self.volume_change,
            "energies_ev": self.energies,
            "max_forces_ev_per_ang": self.max_forces,
        }


def relax(
    atoms: Atoms,
    optimizer: str = "lbfgs",
    cell: str = "fixed",
    fmax: float = 0.01,
    steps: int = 500,
    pressure: float = 0.0,
    symprec: float | None = None,
    strains: Sequence[bool] | None = None,
    largest_force: float = np.inf,
    each_step: Callable[[int], None] = lambda n: None,
) -> Relaxation:
    """Relax a copy of a structure with its calculator.

    Args:
        atoms: with a calculator.
        optimizer: a key of ``OPTIMIZERS``. cell: a key of ``CELLS``.
        fmax: eV/Å; converged where no force is longer.
        pressure: GPa, of a cell that is relaxed.
        symprec: keep the space group found at this tolerance, Å; None: no constraint.
        strains: [6] which of ASE's Voigt strains of a cell that is relaxed are free; None: all.
        largest_force: eV/Å; a component beyond it gives the relaxation up.

    Raises:
        InputError: an unknown name, a cell without volume, a pressure on a fixed cell; what the calculator raises.
        Diverged: a force that is not finite, or beyond ``largest_force``.
    """
    if optimizer not in OPTIMIZERS:
        raise InputError(f"optimizer {optimizer!r}: known are {known(OPTIMIZERS)}")
    if cell not in CELLS:
        raise InputError(f"cell {cell!r}: known are {known(CELLS)}")
    moving = atoms.copy()
    moving.calc = atoms.calc
    if symprec is not None:
        moving.set_constraint(FixSymmetry(moving, symprec=symprec))
    filtered: Any = moving
    arguments = CELLS[cell]
    if arguments is not None:
        require_volume(moving, f"relaxing the cell ({cell})")
        free = {} if strains is None else {"mask": list(strains)}
        filtered = FrechetCellFilter(moving, scalar_pressure=pressure * units.GPa, **arguments, **free)
    elif pressure:
        raise InputError(f"pressure {pressure:g} GPa on a fixed cell; relax it: cell full or volume")
    volume = moving.cell.volume
    energies: list[float] = []
    max_forces: list[float] = []
    work = OPTIMIZERS[optimizer](filtered, logfile=None)

    def record() -> None:
        force = float(np.abs(moving.get_forces(apply_constraint=False)).max())
        if not force <= largest_force or not np.isfinite(force):
            raise Diverged(
                f"force {force:g} eV/Å after {len(energies)} steps of relaxing {moving.get_chemical_formula()}; start "
                "nearer to a minimum, or compare with structures that the potential knows"
            )
        energies.append(float(moving.get_potential_energy()))
        max_forces.append(float(np.linalg.norm(np.asarray(filtered.get_forces()).reshape(-1, 3), axis=1).max()))
        each_step(len(energies) - 1)

    work.attach(record)
    converged = bool(work.run(fmax=fmax, steps=steps))
    relaxed = moving.copy()
    results = {key: value for key, value in atoms.calc.results.items() if key in all_properties}
    relaxed.calc = SinglePointCalculator(relaxed, **results)
    change = float(moving.cell.volume / volume - 1) if volume > 0 else 0.0
    return Relaxation(relaxed, converged, np.array(energies), np.array(max_forces), change)


def draw(relaxation: Relaxation, path: Path) -> None:
    """Draw energy and largest force against the step."""
    steps = np.arange(relaxation.n_steps + 1)
    n = len(relaxation.atoms)
    energies = 1e3 * (relaxation.energies - relaxation.energies[-1]) / n
    plots.curves(
        path,
        [
            ("step", "energy above the last, meV/atom", {"energy": (steps, energies, "-")}),
            ("step", "largest force, eV/Å", {"force": (steps, relaxation.max_forces, "-")}),
        ],
    )
