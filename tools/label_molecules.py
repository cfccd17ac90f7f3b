"""Label molecules at several levels of theory on the same geometries.

    python tools/label_molecules.py GEOMETRIES.extxyz OUT.extxyz --levels gfn1,gfn2,pbe,ccsdt

Needs ``pip install -e ".[label]"`` (PySCF 2.14.0, tblite 0.8.0: wheels, no compiler). Gas phase, closed shell;
``info["charge"]`` (default 0). A level is its settings: do not change one, add another.

    gfn1, gfn2   GFN1-xTB, GFN2-xTB (tblite)                                          energy, forces
    pbe          PBE/def2-SVP, density fitting, grid 2                                energy, forces
    r2scan       r2SCAN/def2-SVP, density fitting, grid 3                             energy, forces
    wb97x        wB97X/6-31G*, Cartesian d, density fitting, grid 2 (the ANI level)   energy, forces
    ccsdt        CCSD(T)/cc-pVDZ, frozen core                                         energy
    ccsdt_ae     CCSD(T)/cc-pVDZ, all electrons: not the fidelity ccsdt               energy, forces

CPU seconds for 3, 6, 9 and 12 atoms: pbe 0.7, 1.9, 4.1, 7.3; ccsdt 0.4, 2.0, 6.8, 27; ccsdt_ae 25 for methanol; xTB
milliseconds. OUT has eV and eV/Å under ``energy_<level>`` and ``forces_<level>``, and the info of GEOMETRIES.
"""

from pathlib import Path
from typing import Annotated, Any

import labelling
import numpy as np
import typer
from ase import Atoms
from ase.units import Bohr, Hartree
from labelling import Job, Label, Level, NotConverged

from mffm.errors import InputError

HEAVIEST_FROZEN_CORE = 10  # up to neon, one core orbital for every atom but H and He
HEAVIEST_ALL_ELECTRON = 36  # beyond krypton def2-SVP needs an effective core potential, which is not set here

# functional, basis, Cartesian d functions, grid level
FUNCTIONALS = {
    "pbe": ("PBE", "def2-svp", False, 2),
    "r2scan": ("R2SCAN", "def2-svp", False, 3),
    "wb97x": ("wB97X", "6-31g*", True, 2),
}


def charge(frame: Atoms) -> int:
    return round(float(frame.info.get("charge", 0)))


def multiplicity(frame: Atoms) -> int:
    for key in ("multiplicity", "spin_multiplicity"):
        if key in frame.info:
            return int(frame.info[key])
    return 1


def xtb(frame: Atoms, method: str) -> Label:
    """GFN1- or GFN2-xTB. Always a new calculator: a used one starts from its last wavefunction (2e-4 eV/Å)."""
    from tblite.ase import TBLite

    atoms = Atoms(frame.numbers, frame.positions)
    atoms.calc = TBLite(method=method, charge=charge(frame), verbosity=0)
    return Label(atoms.get_potential_energy(), atoms.get_forces())


def _molecule(frame: Atoms, basis: str, cart: bool = False, heaviest: int = HEAVIEST_ALL_ELECTRON) -> Any:
    from pyscf import gto, lib

    lib.num_threads(1)
    if frame.numbers.max() > heaviest:
        raise InputError(
            f"element {frame.numbers.max()} with {basis}: this level is set up for elements up to {heaviest}"
        )
    geometry = [(symbol, tuple(p)) for symbol, p in zip(frame.symbols, frame.positions, strict=True)]
    return gto.M(atom=geometry, basis=basis, cart=cart, charge=charge(frame), verbose=0)


def density_functional(frame: Atoms, name: str) -> Label:
    """Restricted Kohn–Sham with density fitting; the grid's response is left out of the gradient."""
    from pyscf import dft

    functional, basis, cart, grid = FUNCTIONALS[name]
    field = dft.RKS(_molecule(frame, basis, cart), xc=functional).density_fit()
    field.grids.level = grid
    field.conv_tol = 1e-8
    energy = field.kernel()
    if not field.converged:  # PySCF returns an energy all the same, and it can be wrong by electronvolts
        raise NotConverged("the self-consistent field did not converge")
    gradients = field.nuc_grad_method()
    gradients.grid_response = False
    return Label(energy * Hartree, -gradients.kernel() * Hartree / Bohr)


def ccsdt(frame: Atoms) -> Label:
    """CCSD(T)/cc-pVDZ with a frozen core and its T1 diagnostic (above 0.02 one reference is doubtful)."""
    from pyscf import cc, scf

    field = scf.RHF(_molecule(frame, "cc-pvdz", heaviest=HEAVIEST_FROZEN_CORE))
    field.conv_tol = 1e-9
    field.kernel()
    cluster = cc.CCSD(field)
    cluster.frozen = int(np.sum(frame.numbers > 2))
    cluster.kernel()
    if not (field.converged and cluster.converged):
        raise NotConverged("Hartree-Fock or CCSD did not converge")
    energy = (cluster.e_tot + cluster.ccsd_t()) * Hartree
    return Label(energy, info={"t1_diagnostic": float(cluster.get_t1_diagnostic())})


def ccsdt_all_electron(frame: Atoms) -> Label:
    """CCSD(T)/cc-pVDZ with all electrons and analytic forces.

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
    return Label((cluster.e_tot + cluster.ccsd_t()) * Hartree, forces)


LEVELS = {
    "gfn1": Level(("tblite.ase",), lambda frame: xtb(frame, "GFN1-xTB")),
    "gfn2": Level(("tblite.ase",), lambda frame: xtb(frame, "GFN2-xTB")),
    "pbe": Level(("pyscf.dft",), lambda frame: density_functional(frame, "pbe")),
    "r2scan": Level(("pyscf.dft",), lambda frame: density_functional(frame, "r2scan")),
    "wb97x": Level(("pyscf.dft",), lambda frame: density_functional(frame, "wb97x")),
    "ccsdt": Level(("pyscf.cc",), ccsdt),
    "ccsdt_ae": Level(("pyscf.cc",), ccsdt_all_electron),
}


def label(job: Job) -> Atoms:
    """Return the frame with its labels (runs in a worker)."""
    return labelling.compute(job, LEVELS)


def reason_to_leave_out(frame: Atoms, max_atoms: int) -> str | None:
    """Return why these levels cannot label a frame, or None."""
    if not 1 < len(frame) <= max_atoms:
        return f"not 2 to {max_atoms} atoms"
    if (frame.numbers.sum() - charge(frame)) % 2:
        return "odd number of electrons"
    if multiplicity(frame) != 1:
        return "not a singlet"
    return None


def main(
    geometries: Annotated[Path, typer.Argument(help="anything ASE reads; info: frame_id, charge")],
    out: Annotated[Path, typer.Argument(help="extxyz file to write or to go on with")],
    levels: Annotated[str, typer.Option(help="comma-separated")] = "gfn1,gfn2,pbe,ccsdt",
    n: Annotated[int, typer.Option(help="label a random subset of this size; 0: all")] = 0,
    seed: Annotated[int, typer.Option(help="of the order and the subset")] = 0,
    max_atoms: Annotated[int, typer.Option(help="leave larger molecules out")] = 12,
    workers: Annotated[int, typer.Option(min=1, help="processes, one thread each")] = 1,
    minutes: Annotated[float, typer.Option(help="nothing is started after this time")] = 50,
) -> None:
    """Label closed-shell molecules with gfn1, gfn2, pbe, r2scan, wb97x, ccsdt or ccsdt_ae. Resumes."""
    names = labelling.choose_levels(levels, LEVELS)
    frames = labelling.read_frames([geometries])
    chosen = labelling.report_left_out(frames, lambda frame: reason_to_leave_out(frame, max_atoms))
    if not chosen:
        raise InputError(f"{geometries}: no frame is left to label")
    labelling.versions(module for name in names for module in LEVELS[name].modules)
    jobs = labelling.plan(chosen, names, n, seed)
    labelling.run(jobs, out, label, minutes, workers)


if __name__ == "__main__":
    labelling.main(lambda: typer.run(main))
