"""Run by tests with ``mpiexec``: a triclinic alloy in a real LAMMPS beside the ASE calculator; JSON on rank 0's stdout.

python lammps_case.py RUN
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from ase.build import bulk
from lammps import lammps
from mpi4py import MPI

from mffm.deploy.ase import Calculator
from mffm.deploy.edges import of_release
from mffm.deploy.lammps.fix_external import FixExternal
from mffm.errors import InputError

COMM = MPI.COMM_WORLD
MASSES = {29: 63.546, 79: 196.967}
NKTV2P = 1.6021765e6  # eV/Å³ in bar, as LAMMPS has it in metal units
PRESSURES = (("pxx", 0, 0), ("pyy", 1, 1), ("pzz", 2, 2), ("pxy", 0, 1), ("pxz", 0, 2), ("pyz", 1, 2))


def alloy() -> Atoms:
    atoms = bulk("Cu", "fcc", a=3.7, cubic=True).repeat((3, 2, 2))
    atoms.numbers[::3] = 79
    atoms.set_cell([[11.1, 0, 0], [1.2, 7.4, 0], [-0.8, 0.6, 7.6]], scale_atoms=True)
    atoms.rattle(0.1, seed=1)
    atoms.wrap()
    return atoms


def start(atoms: Atoms, shell: float | None, setup: str = "units metal", boundary: str = "p p p") -> Any:
    lmp = lammps(cmdargs=["-log", "none", "-screen", "none"], comm=COMM)
    c = atoms.cell.array
    lmp.commands_string(
        f"""{setup}
        boundary {boundary}
        atom_style atomic
        atom_modify map array
        region box prism 0 {c[0, 0]} 0 {c[1, 1]} 0 {c[2, 2]} {c[1, 0]} {c[2, 0]} {c[2, 1]} units box
        create_box 2 box
        mass 1 {MASSES[29]}
        mass 2 {MASSES[79]}
        pair_style zero 3.5 nocoeff
        pair_coeff * *
        compute each all pe/atom
        compute each_sum all reduce sum c_each
        thermo_style custom step temp pe press pxx pyy pzz pxy pxz pyz c_each_sum
        thermo_modify norm no
        timestep 0.002"""
    )
    if shell is not None:
        lmp.command(f"comm_modify cutoff {shell}")
    types = [1 if z == 29 else 2 for z in atoms.numbers]
    lmp.create_atoms(len(atoms), list(range(1, len(atoms) + 1)), types, atoms.positions.ravel().tolist())
    return lmp


def gathered(lmp: Any, name: str, n: int) -> np.ndarray:
    return np.array(lmp.gather_atoms(name, 1, 3)).reshape(n, 3)


def differences(lmp: Any, atoms: Atoms, run: str) -> dict[str, float]:
    """Return how far LAMMPS is from the calculator: eV, eV/Å, and the pressure relative to its largest part."""
    here = atoms.copy()
    n = len(atoms)
    here.positions = gathered(lmp, "x", n)
    here.calc = Calculator(run, "r2scan", dtype="float64")
    velocities = gathered(lmp, "v", n) * units.Ang / (1e-12 * units.second)
    masses = np.array([MASSES[z] for z in atoms.numbers])
    kinetic = np.einsum("n,ni,nj->ij", masses, velocities, velocities)
    stress = here.get_stress(voigt=False) if here.pbc.all() else np.full((3, 3), np.nan)
    pressure = NKTV2P * (kinetic / here.get_volume() - stress)
    found = np.array([lmp.get_thermo(name) for name, _, _ in PRESSURES])
    wanted = np.array([pressure[i, j] for _, i, j in PRESSURES])
    n_local = lmp.extract_setting("nlocal")
    each = np.zeros(n)
    ids = lmp.numpy.extract_atom("id", nelem=n_local)[:n_local]
    each[ids - 1] = lmp.numpy.extract_compute("each", 1, 1)[:n_local]
    each = COMM.allreduce(each)
    return {
        "energy": abs(lmp.get_thermo("pe") - here.get_potential_energy()),
        "energies": float(np.abs(each - here.get_potential_energies()).max()),
        "forces": float(np.abs(gathered(lmp, "f", n) - here.get_forces()).max()),
        "pressure": float(np.abs(found - wanted).max() / np.abs(wanted).max()),
        "force size": float(np.abs(here.get_forces()).max()),
    }


def told(run: Any, *arguments: Any) -> str:
    """Return the message of the InputError that ``run`` raises, the same on all ranks, or none."""
    try:
        run(*arguments)
    except InputError as error:
        message = str(error)
    else:
        message = "nothing was raised"
    return message if all(m == message for m in COMM.allgather(message)) else "another message on another rank"


def main(run: str) -> dict[str, Any]:
    model, atoms, found = of_release(run, "r2scan"), alloy(), {}
    elements = ["Cu", "Au"]
    for mode in ("whole", "domain"):
        lmp = start(atoms, 9.0)
        FixExternal(lmp, model, elements, mode)
        lmp.command("run 0")
        found[f"{mode} start"] = differences(lmp, atoms, run)
        lmp.command("velocity all create 600 11")
        lmp.command("fix nve all nve")
        lmp.command("run 20")
        found[f"{mode} run"] = differences(lmp, atoms, run)
        lmp.close()

    cluster = Atoms("CuAuCu", [[1, 1, 1], [3.2, 1, 1], [2, 3, 1.5]], cell=np.diag([40.0, 40, 40]))
    for mode in ("whole", "domain"):  # with two ranks one has no atoms and no ghosts
        lmp = start(cluster, 9.0, boundary="f f f")
        FixExternal(lmp, model, elements, mode)
        lmp.command("run 0")
        found[f"{mode} cluster"] = differences(lmp, cluster, run)
        lmp.close()

    if COMM.size == 1:
        lmp = start(atoms, 9.0)
        FixExternal(lmp, model, elements)
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            lmp.command("run 1000000")
        except KeyboardInterrupt:
            found["interrupted"] = True
        lmp.command("run 1")
        lmp.close()

    lmp = start(atoms, 6.0)
    found["short shell"] = told(FixExternal, lmp, model, elements, "domain")
    lmp.command("comm_modify cutoff 9")
    FixExternal(lmp, model, elements, "domain")
    lmp.command("neighbor 0.3 bin")
    lmp.command("comm_modify cutoff 3.9")
    found["shell made short"] = told(lmp.command, "run 5")
    found["stopped at step"] = lmp.get_thermo("step")
    lmp.command("comm_modify cutoff 7.3")
    lmp.command("run 0")
    found["after the remedy"] = differences(lmp, atoms, run)
    lmp.command("set atom 3 x 0.0 y 0.0 z 0.0")
    lmp.command("set atom 4 x 0.0 y 0.0 z 0.0")
    found["on one another"] = told(lmp.command, "run 0")
    lmp.close()

    lmp = start(atoms, 9.0, "units real")
    found["units"] = told(FixExternal, lmp, model, elements)
    lmp.close()
    lmp = start(atoms, 9.0)
    found["types"] = told(FixExternal, lmp, model, ["Cu"])
    found["symbol"] = told(FixExternal, lmp, model, ["Cu", "Xx"])
    found["unknown"] = told(FixExternal, lmp, model, ["Cu", "Ag"])
    found["mode"] = told(FixExternal, lmp, model, elements, "half")
    from mffm.deploy.lammps.mliap import Unified

    found["no Python in ML-IAP"] = told(Unified(model).install, lmp)
    lmp.command("comm_modify cutoff 6")
    found["short shell of ML-IAP"] = told(Unified(model).install, lmp)
    lmp.close()
    found["ranks"] = COMM.size
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = main(str(Path(sys.argv[1])))
    if COMM.rank == 0:
        print(json.dumps(results), flush=True)
