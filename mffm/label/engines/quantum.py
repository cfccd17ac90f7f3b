"""Density functionals and CCSD(T) of molecules through PySCF, which returns an energy from an unconverged field too."""

from typing import Any

import numpy as np
from ase.data import chemical_symbols
from ase.units import Bohr, Hartree

from mffm.errors import InputError
from mffm.frame import Frame
from mffm.label.level import Label, NotConverged

HEAVIEST = 36  # beyond krypton def2-SVP needs an effective core potential, which is not set here
HEAVIEST_FROZEN_CORE = 10  # up to neon: one core orbital for every atom but H and He
MOST_ATOMS = {"dft": 150, "ccsdt": 24, "ccsdt_ae": 12}  # an hour or so each

# functional, basis, Cartesian d functions, grid level
FUNCTIONALS = {
    "pbe": ("PBE", "def2-svp", False, 2),
    "r2scan": ("R2SCAN", "def2-svp", False, 3),
    "wb97x": ("wB97X", "6-31g*", True, 2),
}


def refuse_dft(frame: Frame) -> str:
    """Return why a density functional cannot label a structure, or ""."""
    return _refuse(frame, "dft", HEAVIEST, "gfn2, or gpaw_pbe for a crystal")


def refuse_ccsdt(frame: Frame, all_electron: bool) -> str:
    """Return why CCSD(T) cannot label a structure, or ""."""
    if (frame.spin_multiplicity or 1) != 1:
        return f"spin multiplicity {frame.spin_multiplicity}: this level is set up for closed shells; take pbe"
    if frame.n_atoms == 1 and frame.atomic_numbers[0] == 1:
        return "one electron has no correlation energy"
    kind = "ccsdt_ae" if all_electron else "ccsdt"
    return _refuse(frame, kind, HEAVIEST if all_electron else HEAVIEST_FROZEN_CORE, "pbe or gfn2")


def _refuse(frame: Frame, kind: str, heaviest: int, instead: str) -> str:
    if frame.pbc.any():
        return f"periodic: this level takes molecules; take {instead}"
    z = int(frame.atomic_numbers.max())
    if z > heaviest:
        return f"element {chemical_symbols[z]}: this level is set up for elements up to {chemical_symbols[heaviest]}"
    if frame.n_atoms > MOST_ATOMS[kind]:
        growth = "fourth power of the atoms in memory, the seventh in time" if kind != "dft" else "third power"
        return (
            f"{frame.n_atoms} atoms: this level is set up for at most {MOST_ATOMS[kind]}, its cost grows with the "
            f"{growth}; take {instead}"
        )
    return ""


def _molecule(frame: Frame, basis: str, cart: bool = False) -> Any:
    from pyscf import gto, lib
    from pyscf.lib.exceptions import BasisNotFoundError

    lib.num_threads(1)
    geometry = [(chemical_symbols[z], tuple(p)) for z, p in zip(frame.atomic_numbers, frame.positions, strict=True)]
    spin = (frame.spin_multiplicity or 1) - 1  # PySCF counts unpaired electrons
    try:
        return gto.M(atom=geometry, basis=basis, cart=cart, charge=frame.charge or 0, spin=spin, verbose=0)
    except BasisNotFoundError as error:
        raise InputError(f"{basis}: {error}") from error


def density_functional(frame: Frame, name: str) -> Label:
    """Kohn–Sham with density fitting, unrestricted for open shells; the grid's response is left out of the gradient."""
    from pyscf import dft

    functional, basis, cart, grid = FUNCTIONALS[name]
    kind = dft.RKS if (frame.spin_multiplicity or 1) == 1 else dft.UKS
    field = kind(_molecule(frame, basis, cart), xc=functional).density_fit()
    field.grids.level = grid
    field.conv_tol = 1e-8
    energy = field.kernel()
    if not field.converged:  # its energy can be wrong by electronvolts
        raise NotConverged("the self-consistent field did not converge")
    gradients = field.nuc_grad_method()
    gradients.grid_response = False
    return Label(float(energy * Hartree), -gradients.kernel() * Hartree / Bohr)


def ccsdt(frame: Frame) -> Label:
    """CCSD(T)/cc-pVDZ with a frozen core and its T1 diagnostic (above 0.02 one reference is doubtful)."""
    from pyscf import cc, scf

    field = scf.RHF(_molecule(frame, "cc-pvdz"))
    field.conv_tol = 1e-9
    field.kernel()
    cluster = cc.CCSD(field)
    cluster.frozen = int(np.sum(frame.atomic_numbers > 2))
    cluster.kernel()
    if not (field.converged and cluster.converged):
        raise NotConverged("Hartree-Fock or CCSD did not converge")
    energy = float((cluster.e_tot + cluster.ccsd_t()) * Hartree)
    return Label(energy, info={"t1_diagnostic": float(cluster.get_t1_diagnostic())})


def ccsdt_all_electron(frame: Frame) -> Label:
    """CCSD(T)/cc-pVDZ with all electrons, analytic forces and its T1 diagnostic.

    The (T) lambda equations are needed: ``Gradients(CCSD).kernel()`` alone takes the CCSD lambda and is 2 % wrong.
    Agrees with finite differences to 2e-6 Hartree/bohr.
    """
    from pyscf import cc, scf
    from pyscf.cc import ccsd_t_lambda_slow
    from pyscf.grad import ccsd_t as gradient

    field = scf.RHF(_molecule(frame, "cc-pvdz"))
    field.conv_tol = 1e-10
    field.kernel()
    cluster = cc.CCSD(field)
    cluster.conv_tol = 1e-8
    cluster.kernel()
    integrals = cluster.ao2mo()
    solved, l1, l2 = ccsd_t_lambda_slow.kernel(cluster, integrals, cluster.t1, cluster.t2, tol=1e-6, verbose=0)
    if not (field.converged and cluster.converged and solved):
        raise NotConverged("Hartree-Fock, CCSD or the (T) lambda equations did not converge")
    forces = -gradient.Gradients(cluster).kernel(cluster.t1, cluster.t2, l1, l2, eris=integrals) * Hartree / Bohr
    energy = float((cluster.e_tot + cluster.ccsd_t()) * Hartree)
    return Label(energy, forces, info={"t1_diagnostic": float(cluster.get_t1_diagnostic())})
