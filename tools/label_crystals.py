"""Label small crystal cells with GFN1-xTB, PBE and r2SCAN on the same cells: energy, forces, stress.

    python tools/label_crystals.py OUT.extxyz --generate 7                # 140 cells of 20 compounds
    python tools/label_crystals.py OUT.extxyz --alloys 2                  # 66 cells of six pseudo-binaries
    python tools/label_crystals.py OUT.extxyz CELLS.extxyz [MORE ...]     # given cells

gfn1 needs ``pip install -e ".[label]"``. pbe and r2scan need GPAW, which is compiled against libxc and is no dependency
of mffm:

    apt-get install libxc-dev libopenblas-dev gcc g++
    CC=g++ pip install gpaw==26.7.0 gpaw-data==1.2.1

(plain ``gcc`` fails: GPAW's .c files include C++ headers). CI has no GPAW, so of these levels only gfn1 is tested.

A level is its settings: do not change one, add another.

    gfn1     GFN1-xTB, tblite. tblite samples the Gamma point only, so the shortest cell vector is repeated again and
             again until all are >= 9 Å, but never beyond 120 atoms; energy and forces are folded back. Of the shipped
             cells the cap stops some short of 9 Å: ``gfn1_repeat`` in a new frame says what was done.
    pbe      GPAW 26.7.0, plane waves 700 eV, PBE PAW setups, spin-paired, Fermi smearing 0.05 eV, half-shifted mesh
             2x2x2 for generated cells, for given ones by a spacing of 0.75/Å. At 400 and 550 eV the stress of MgO has
             a Pulay error of 0.37 and 0.06 eV/Å^3. One consistent level, not converged DFT.
    r2scan   as pbe, self-consistent r2SCAN through libxc, on PBE PAW setups

CPU seconds for 8 atoms: gfn1 4.4, pbe 9.7, r2scan 29. OUT has eV, eV/Å and eV/Å^3 under ``energy_<level>``,
``forces_<level>``, ``stress_<level>`` (Voigt xx yy zz yz xz xy, ASE's sign: negative under compression).
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import labelling
import numpy as np
import typer
from ase import Atoms
from ase.build import bulk
from labelling import Job, Level

from mffm.errors import InputError
from mffm.frame import Frame
from mffm.label.engines import plane_waves, xtb
from mffm.label.level import Label

GENERATED_MESH = [2, 2, 2]
GIVEN_SPACING = 0.75  # 1/Å
GFN1_ATOMS = 120

# Experimental lattice constants (Å) of the conventional cubic cells.
PROTOTYPES: dict[str, dict[str, float]] = {
    "rocksalt": {
        "LiH": 4.08,
        "LiF": 4.03,
        "LiCl": 5.13,
        "NaF": 4.63,
        "NaCl": 5.64,
        "KF": 5.35,
        "KCl": 6.29,
        "MgO": 4.21,
        "MgS": 5.20,
        "CaO": 4.81,
        "CaS": 5.69,
    },
    "zincblende": {"BN": 3.62, "BP": 4.54, "AlN": 4.38, "AlP": 5.46, "SiC": 4.36, "BeO": 3.80, "BeS": 4.86},
    "diamond": {"C": 3.57, "Si": 5.43},
}

# Two cations share the four sites of one sublattice.
PSEUDO_BINARIES = [
    ("rocksalt", "Mg", "Ca", "O"),
    ("rocksalt", "Na", "K", "Cl"),
    ("rocksalt", "Li", "Na", "F"),
    ("rocksalt", "Li", "Na", "Cl"),
    ("zincblende", "Al", "B", "N"),
    ("zincblende", "Al", "B", "P"),
]
HOLDOUT = ("AlBP", "MgCaO")


def distort(atoms: Atoms, rng: np.random.Generator, volume: float, shear: float, rattle: float) -> None:
    """Strain a cell by up to ``volume`` per axis and ``shear``; rattle it by a normal of 0.02 Å up to ``rattle``."""
    strain = np.eye(3) * (1 + rng.uniform(-volume, volume)) + rng.uniform(-shear, shear, (3, 3))
    atoms.set_cell(atoms.cell @ ((strain + strain.T) / 2), scale_atoms=True)
    atoms.positions += rng.normal(0, rng.uniform(0.02, rattle), atoms.positions.shape)


def generate_compounds(n_each: int, seed: int) -> list[Atoms]:
    """Return ``n_each`` distorted 8-atom cells of every compound: volume ±15 %, shear ±4 %, rattle 0.02 to 0.15 Å."""
    rng = np.random.default_rng(seed)
    cells = []
    for structure, compounds in PROTOTYPES.items():
        for compound, length in compounds.items():
            for index in range(n_each):
                cell = bulk(compound, structure, a=length, cubic=True)
                distort(cell, rng, 0.05, 0.04, 0.15)
                name = f"{structure}-{compound}-{index}{_suffix(seed)}"
                cell.info.update(frame_id=name, structure=structure, compound=compound)
                cell.info["kmesh"] = np.array(GENERATED_MESH)
                cells.append(cell)
    return cells


def generate_alloys(n_each: int, seed: int) -> list[Atoms]:
    """Return cells A(4-n)B(n)X4 with n = 0 to 4 of every pseudo-binary.

    For every n one ideal cell at Vegard's lattice constant, and for n = 1, 2, 3 ``n_each`` distorted ones: volume ±6 %,
    shear ±2 %, rattle 0.02 to 0.10 Å, cations in random order.
    """
    rng = np.random.default_rng(seed + 1)
    cells = []
    for structure, first, second, anion in PSEUDO_BINARIES:
        lengths = [_length(structure, cation, anion) for cation in (first, second)]
        for n_second in range(5):
            for index in range(1 + (n_each if 0 < n_second < 4 else 0)):
                length = lengths[0] + (lengths[1] - lengths[0]) * n_second / 4
                order = np.arange(4) if index == 0 else rng.permutation(4)
                cell = _ordered_cell(
                    structure, length, [second if i < n_second else first for i in range(4)], order, anion
                )
                if index:
                    distort(cell, rng, 0.02, 0.02, 0.10)
                name = f"{first}{second}{anion}"
                frame_id = f"alloy-{structure}-{name}-{n_second}-{index}{_suffix(seed)}"
                cell.info.update(frame_id=frame_id, structure=structure)
                cell.info.update(pseudo_binary=name, n_second=n_second, ideal=index == 0, holdout=name in HOLDOUT)
                cell.info["kmesh"] = np.array(GENERATED_MESH)
                cells.append(cell)
    return cells


def _suffix(seed: int) -> str:
    """Return what tells frames of other seeds from the shipped ones (seed 0) by name."""
    return f"-s{seed}" if seed else ""


def _length(structure: str, cation: str, anion: str) -> float:
    compounds = PROTOTYPES[structure]
    return compounds[cation + anion] if cation + anion in compounds else compounds[anion + cation]


def _ordered_cell(structure: str, length: float, cations: list[str], order: np.ndarray, anion: str) -> Atoms:
    """Return the conventional cell with ``cations[i]`` on the cation site ``order[i]``."""
    cell = bulk("NaCl" if structure == "rocksalt" else "ZnS", structure, a=length, cubic=True)
    symbols = cell.get_chemical_symbols()
    sites = [i for i, symbol in enumerate(symbols) if symbol == symbols[0]]
    cell.symbols[:] = anion
    for cation, site in zip(cations, order, strict=True):
        cell.symbols[sites[site]] = cation
    return cell


def repeats(atoms: Atoms) -> np.ndarray:
    """Return how often each cell vector is repeated for a Gamma-only level: to >= 9 Å, at most 120 atoms."""
    return xtb.repeats(atoms.cell.lengths(), len(atoms), GFN1_ATOMS)


def _frame(atoms: Atoms) -> Frame:
    return Frame(atoms.numbers.astype(np.uint8), atoms.positions, atoms.cell.array, np.ones(3, bool))


def gfn1(atoms: Atoms) -> Label:
    """GFN1-xTB on the repeated cell, per given cell."""
    n = repeats(atoms)
    return replace(xtb.repeated(_frame(atoms), "GFN1-xTB", n), info={"gfn1_repeat": n})


def density_functional(atoms: Atoms, name: str) -> Label:
    """GPAW, on the frame's mesh where it has one."""
    k = atoms.info.get("kmesh", plane_waves.mesh(atoms.cell.array, GIVEN_SPACING))
    label = plane_waves.label(_frame(atoms), name, [int(i) for i in k])
    return replace(label, info={"kmesh": np.array(label.info["kmesh"])})


LEVELS = {
    "gfn1": Level(("tblite.ase",), gfn1),
    "pbe": Level(("gpaw",), partial(density_functional, name="pbe")),
    "r2scan": Level(("gpaw",), partial(density_functional, name="r2scan")),
}


def label(job: Job) -> Atoms:
    """Return the cell with its labels (runs in a worker)."""
    return labelling.compute(job, LEVELS)


def reason_to_leave_out(frame: Atoms, max_atoms: int, max_z: int, max_volume: float) -> str | None:
    """Return why these levels cannot label a given cell in reasonable time, or None."""
    if not frame.pbc.all():
        return "not periodic in three directions"
    if len(frame) > max_atoms:
        return f"more than {max_atoms} atoms"
    if frame.numbers.max() > max_z or plane_waves.D_AND_F_BLOCK & set(frame.numbers.tolist()):
        return f"an element beyond Z = {max_z} or of the d and f blocks"
    if frame.cell.volume > max_volume or frame.cell.volume / len(frame) <= 4:
        return f"volume above {max_volume} Å^3, or not above 4 Å^3 per atom"
    return None


def main(
    out: Annotated[Path, typer.Argument(help="extxyz file to write or to go on with")],
    cells: Annotated[list[Path] | None, typer.Argument(help="given cells, anything ASE reads")] = None,
    generate: Annotated[int, typer.Option(min=0, help="distorted cells of each of 20 compounds")] = 0,
    alloys: Annotated[int, typer.Option(help="distorted cells per composition; 0: ideal ones only; -1: none")] = -1,
    levels: Annotated[str, typer.Option(help="comma-separated")] = "gfn1,pbe,r2scan",
    n: Annotated[int, typer.Option(help="label a random subset of this size; 0: all")] = 0,
    seed: Annotated[int, typer.Option(help="of the distortions, the order and the subset")] = 0,
    max_atoms: Annotated[int, typer.Option(help="leave larger given cells out")] = 8,
    max_z: Annotated[int, typer.Option(help="leave given cells with heavier elements out")] = 20,
    max_volume: Annotated[float, typer.Option(help="Å^3; leave larger given cells out")] = 180,
    workers: Annotated[int, typer.Option(min=1, help="processes, one thread each")] = 1,
    minutes: Annotated[float, typer.Option(help="nothing is started after this time")] = 55,
) -> None:
    """Label crystal cells with gfn1 (tblite), pbe and r2scan (GPAW): energy, forces, stress. Resumes."""
    names = labelling.choose_levels(levels, LEVELS)
    chosen = generate_compounds(generate, seed)
    if alloys >= 0:
        chosen += generate_alloys(alloys, seed)
    given = labelling.read_frames(cells or [])
    chosen += labelling.report_left_out(given, lambda cell: reason_to_leave_out(cell, max_atoms, max_z, max_volume))
    if not chosen:
        raise InputError("no cell to label: give --generate, --alloys, or a file of cells")
    labelling.versions(module for name in names for module in LEVELS[name].modules)
    labelling.run(labelling.plan(chosen, names, n, seed), out, label, minutes, workers, restart_after=20)


if __name__ == "__main__":
    labelling.main(lambda: typer.run(main))
