"""Two small files of one molecule at two levels, for docs/tutorials/how_many_labels.md.

    python tools/tutorial_files.py QM-22/Malonaldehyde.zip --low gfn2.extxyz --high ccsdt.extxyz

Malonaldehyde of QM-22 (github jmbowma/QM-22, Apache-2.0; Bowman et al., J. Chem. Phys. 156, 240901, 2022): CCSD(T)/CBS
energies, relative to the minimum, of geometries far from it too. The low file gets GFN2-xTB energies and forces by
tblite (``pip install -e ".[label]"``), milliseconds a structure. Some structures are in both files, most in one.
"""

import zipfile
from pathlib import Path
from typing import Annotated, Any

import ase.io
import numpy as np
import typer
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.units import Hartree
from label_molecules import LEVELS

HIGHEST = 0.12 * Hartree  # eV above the minimum; the set goes on to 8.4 Hartree, where no molecule is left


def read_qm22(path: Path) -> list[Atoms]:
    """Return the structures of a QM-22 zip with ``info["energy"]`` in eV."""
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".xyz"))
        lines = archive.read(name).decode().splitlines()
    frames, at = [], 0
    while at < len(lines) and lines[at].strip():
        n = int(lines[at])
        rows = [line.split() for line in lines[at + 2 : at + 2 + n]]
        positions = np.array([row[1:4] for row in rows], np.float64)
        energy = float(lines[at + 1].split()[0]) * Hartree
        frames.append(Atoms([row[0] for row in rows], positions, info={"energy": energy}))
        at += n + 2
    return frames


def labelled(frame: Atoms, **labels: Any) -> Atoms:
    """Return the bare structure with these labels."""
    atoms = Atoms(frame.numbers, frame.positions)
    atoms.calc = SinglePointCalculator(atoms, **labels)
    return atoms


def gfn2(frame: Atoms) -> Atoms:
    label = LEVELS["gfn2"].compute(frame)
    return labelled(frame, energy=label.energy, forces=label.forces)


def main(
    source: Annotated[Path, typer.Argument(help="Malonaldehyde.zip of QM-22")],
    low: Annotated[Path, typer.Option(help="file with GFN2-xTB energies and forces")],
    high: Annotated[Path, typer.Option(help="file with CCSD(T) energies")],
    n_low: Annotated[int, typer.Option(help="structures")] = 400,
    n_high: Annotated[int, typer.Option(help="structures")] = 240,
    n_both: Annotated[int, typer.Option(help="structures that are in both files")] = 100,
) -> None:
    """Write both files."""
    frames = [frame for frame in read_qm22(source) if frame.info["energy"] <= HIGHEST]
    chosen = [frames[i] for i in np.random.default_rng(0).permutation(len(frames))[: n_low + n_high - n_both]]
    ase.io.write(low, [gfn2(f) for f in chosen[:n_low]], format="extxyz")
    of_high = chosen[n_low - n_both : n_low - n_both + n_high]
    ase.io.write(high, [labelled(f, energy=f.info["energy"]) for f in of_high], format="extxyz")
    print(f"{low}: {n_low} structures, {high}: {n_high}, {n_both} of them in both")


if __name__ == "__main__":
    typer.run(main)
