"""Density functionals of crystals in plane waves through GPAW, which raises where a density does not converge."""

from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress

from mffm.frame import Frame
from mffm.label.level import Label

CUTOFF = 700  # eV; at 400 and 550 eV the stress of MgO has a Pulay error of 0.37 and 0.06 eV/Å^3
# 1/Å, 2 pi included. Energies of cubic cells of LiH, MgO, C and AlN are then within 2.2 meV/atom of 0.25/Å's
# (docs/label.md); at 0.75/Å, a mesh of 2 x 2 x 2, they are up to 47 meV/atom off.
MESH_SPACING = 0.4
FUNCTIONALS = {"pbe": "PBE", "r2scan": "MGGA_X_R2SCAN+MGGA_C_R2SCAN"}
MOST_ATOMS = 100
# Magnetism, +U and hard setups: nothing that these spin-paired settings can do.
D_AND_F_BLOCK = {*range(21, 31), *range(39, 49), *range(57, 81), *range(89, 104)}


def mesh(cell: np.ndarray, spacing: float = MESH_SPACING) -> list[int]:
    """Return the k-mesh of a cell [3, 3] for a spacing of at most so many 1/Å."""
    lengths = 2 * np.pi * np.linalg.norm(np.linalg.inv(cell), axis=0)
    return [max(1, int(np.ceil(length / spacing))) for length in lengths]


def refuse(frame: Frame) -> str:
    """Return why these settings cannot label a structure, or ""."""
    if not frame.pbc.all():
        return "not periodic in three directions: this level takes crystals; take pbe or r2scan for a molecule"
    if frame.charge or (frame.spin_multiplicity or 1) != 1:
        return "charged or open-shell: this level is spin-paired and neutral"
    blocked = sorted(D_AND_F_BLOCK & set(frame.atomic_numbers.tolist()))
    if blocked:
        return f"element {blocked[0]} of the d or f block: this level is spin-paired, without +U"
    return (
        "" if frame.n_atoms <= MOST_ATOMS else f"{frame.n_atoms} atoms: this level is set up for at most {MOST_ATOMS}"
    )


def label(frame: Frame, name: str, k: Sequence[int] | None = None) -> Label:
    """Label a crystal.

    Args:
        name: pbe or r2scan.
        k: mesh [3]; None: by ``mesh``.
    """
    from gpaw import GPAW, PW, FermiDirac

    k = list(k) if k is not None else mesh(frame.cell)
    atoms = Atoms(frame.atomic_numbers, frame.positions, cell=frame.cell, pbc=True)
    atoms.calc = GPAW(
        mode=PW(CUTOFF),
        xc=FUNCTIONALS[name],
        kpts={"size": k, "gamma": False},
        occupations=FermiDirac(0.05),
        txt=None,
        convergence={"energy": 1e-5, "density": 1e-5},
        maxiter=120,
    )
    energy = float(atoms.get_potential_energy())
    return Label(energy, atoms.get_forces(), voigt_6_to_full_3x3_stress(atoms.get_stress()), {"kmesh": k})
