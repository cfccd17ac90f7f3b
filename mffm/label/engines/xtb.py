"""GFN1- and GFN2-xTB through tblite."""

from typing import Any

import numpy as np
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress

from mffm.errors import InputError
from mffm.frame import Frame
from mffm.label.level import Label, NotConverged

HEAVIEST = 86
GAMMA_LENGTH = 9.0  # Å; diamond is then within 3 meV/atom of larger cells with GFN1, at 3.6 Å it is 0.8 eV/atom off
MOST_ATOMS = 1000  # of a molecule: minutes and gigabytes beyond
MOST_REPEATED = 300  # atoms of a repeated cell; half a minute


def extents(cell: np.ndarray) -> np.ndarray:
    """Return the distances between opposite faces of a cell [3, 3], Å [3]."""
    return 1 / np.linalg.norm(np.linalg.inv(cell), axis=0)


def repeats(lengths: np.ndarray, n_atoms: int, most: int) -> np.ndarray:
    """Return how often a cell is repeated along each vector: the shortest again and again, to >= 9 Å.

    Args:
        lengths: Å [3].
        most: atoms beyond which it stops short.
    """
    n = np.ones(3, int)
    while (lengths * n).min() < GAMMA_LENGTH:
        shortest = int(np.argmin(lengths * n))
        if np.prod(n) // n[shortest] * (n[shortest] + 1) * n_atoms > most:
            break
        n[shortest] += 1
    return n


def refuse(frame: Frame) -> str:
    """Return why xTB cannot label a structure, or ""."""
    heaviest = int(frame.atomic_numbers.max())
    if heaviest > HEAVIEST:
        return f"element {heaviest}: xTB has parameters up to {HEAVIEST} (radon)"
    if not frame.pbc.any():
        return "" if frame.n_atoms <= MOST_ATOMS else f"{frame.n_atoms} atoms: more than {MOST_ATOMS} are too many here"
    if not frame.pbc.all():
        return f"periodic along {int(frame.pbc.sum())} of 3 directions: this level takes molecules and crystals"
    if frame.charge or (frame.spin_multiplicity or 1) != 1:
        return "a charged or open-shell crystal: this level takes neutral closed-shell ones"
    lengths = extents(frame.cell)
    n = repeats(lengths, frame.n_atoms, MOST_REPEATED)
    if (lengths * n).min() < GAMMA_LENGTH:
        needed = np.ceil(GAMMA_LENGTH / lengths - 1e-9).astype(int)
        shown = "x".join(map(str, needed))
        return (
            f"short cell ({lengths.min():.2f} Å between faces): tblite samples the Gamma point only, so "
            f"{GAMMA_LENGTH:g} Å are needed, {shown} cells or {int(needed.prod()) * frame.n_atoms} atoms; "
            f"at most {MOST_REPEATED}"
        )
    return ""


def label(frame: Frame, method: str, spin_polarization: float | None = None) -> Label:
    """Label a structure. Always a new calculator: a used one starts from its last wavefunction (2e-4 eV/Å).

    Args:
        method: GFN1-xTB or GFN2-xTB.
        spin_polarization: factor on the spin-polarisation energy; None: without, as the methods were published.
    """
    if frame.pbc.any():
        return repeated(frame, method, repeats(extents(frame.cell), frame.n_atoms, MOST_REPEATED), spin_polarization)
    atoms = Atoms(frame.atomic_numbers, frame.positions)
    settings: dict[str, Any] = {"charge": frame.charge or 0}
    if frame.spin_multiplicity is not None and frame.spin_multiplicity != 1:
        settings["multiplicity"] = frame.spin_multiplicity
    energy, forces, _ = _calculated(atoms, method, spin_polarization, **settings)
    return Label(energy, forces)


def repeated(frame: Frame, method: str, n: np.ndarray, spin_polarization: float | None = None) -> Label:
    """Label a crystal as n [3] cells of it; energy and forces are those of one cell."""
    cells = Atoms(frame.atomic_numbers, frame.positions, cell=frame.cell, pbc=True).repeat(n)
    energy, forces, stress = _calculated(cells, method, spin_polarization)
    assert stress is not None
    return Label(
        energy / int(np.prod(n)),
        forces[: frame.n_atoms],
        voigt_6_to_full_3x3_stress(stress),
        {"repeated": [int(x) for x in n]},
    )


def _calculated(
    atoms: Atoms, method: str, spin_polarization: float | None, **settings: Any
) -> tuple[float, np.ndarray, np.ndarray | None]:
    from tblite.ase import TBLite
    from tblite.exceptions import TBLiteRuntimeError

    atoms.calc = TBLite(method=method, spin_polarization=spin_polarization, verbosity=0, **settings)
    try:
        energy = float(atoms.get_potential_energy())
    except Exception as error:  # ASE's CalculationFailed hides what it is
        cause = str(error.__cause__ or error)
        if isinstance(error.__cause__, TBLiteRuntimeError) and "converge" not in cause.lower():
            raise InputError(f"tblite: {' '.join(cause.split())[:200]}") from error
        raise NotConverged(f"tblite: {' '.join(cause.split())[:200]}") from error
    return energy, atoms.get_forces(), atoms.get_stress() if atoms.pbc.all() else None
