"""Thermal frames of many different small CHNO molecules: geometries for label_molecules.py.

    python tools/enumerate_molecules.py FIRST.extxyz SECOND.extxyz

Molecules are graphs of up to five atoms of C, N and O with single, double and triple bonds and full valences, grown
from one atom by adding atoms, bond orders and rings. Left out are chains of three N or of two N or O and another, bonds
O-O, triple and cumulated double bonds in rings, more than one ring, and what has more atoms than --atoms. Of each comes
a geometry by distance geometry and MMFF94 (RDKit), then GFN2-xTB Langevin dynamics: after 50 fs a first frame and after
80 fs a second one. Molecules whose bonds are not those of the graph any more, or with a force above 15 eV/Å, are left
out and counted.

The first frames are for expensive levels: --holdout names a pattern (SMARTS), and what has it says split=ood. The
second ones say split=train: for cheap labels alone, also of molecules that are held out or tested at expensive levels.

Needs ``pip install -e ".[label]"``. 1200 molecules: about 10 CPU minutes.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import labelling
import numpy as np
import typer
from ase import Atoms, units
from ase.data import covalent_radii
from ase.io import write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from make_molecules import FRICTION, LARGEST_FORCE, TIME_STEP
from rdkit import Chem, RDLogger
from rdkit.Chem import AllChem
from rich.progress import track

from mffm.errors import InputError

VALENCES = {6: 4, 7: 3, 8: 2}
LEFT_OUT = [
    Chem.MolFromSmarts(s)
    for s in (
        "[#7]~[#7]~[#7]",
        "[#8]~[#8]",
        "[#7]~[#7]~[#8]",
        "[#8]~[#7]~[#8]",
        "[r]#[r]",
        "[r]=[r]=[*]",
        "[*]=[r]=[r]",
    )
]
FRAME_STEPS = (100, 60)
STRETCH = 1.35  # of the sum of covalent radii: a longer bond is broken, a shorter distance elsewhere is a new bond


def grown(molecule: Chem.Mol) -> Iterator[Chem.Mol]:
    """Yield the graphs with one atom more, and those with one bond order or one ring more."""
    free = [
        VALENCES[a.GetAtomicNum()] - sum(int(b.GetBondTypeAsDouble()) for b in a.GetBonds())
        for a in molecule.GetAtoms()
    ]
    n = molecule.GetNumAtoms()
    for i in range(n):
        for number in VALENCES:
            if free[i]:
                bigger = Chem.RWMol(molecule)
                bigger.AddBond(i, bigger.AddAtom(Chem.Atom(number)), Chem.BondType.SINGLE)
                yield bigger.GetMol()
        for j in range(i):
            if not (free[i] and free[j]):
                continue
            bigger, bond = Chem.RWMol(molecule), molecule.GetBondBetweenAtoms(i, j)
            if bond is None:
                bigger.AddBond(i, j, Chem.BondType.SINGLE)
            elif bond.GetBondTypeAsDouble() < 3:
                order = [Chem.BondType.DOUBLE, Chem.BondType.TRIPLE][int(bond.GetBondTypeAsDouble()) - 1]
                bigger.GetBondBetweenAtoms(i, j).SetBondType(order)
            else:
                continue
            yield bigger.GetMol()


def enumerate_smiles(n_heavy: int) -> list[str]:
    """Return canonical SMILES of all graphs with up to ``n_heavy`` atoms of C, N and O, sorted."""
    known: set[str] = set()
    front = [Chem.MolFromSmiles(s, sanitize=False) for s in ("[C]", "[N]", "[O]")]
    seen: set[str] = set()
    while front:
        found = []
        for graph in front:
            for bigger in grown(graph):
                if bigger.GetNumAtoms() > n_heavy:
                    continue
                bigger.UpdatePropertyCache(strict=False)
                key = Chem.MolToSmiles(bigger)
                if key not in seen:
                    seen.add(key)
                    found.append(bigger)
                    smiles = chemical(bigger)
                    if smiles:
                        known.add(smiles)
        front = found
    return sorted(known)


def chemical(graph: Chem.Mol) -> str:
    """Return the SMILES of a graph with its hydrogens, or "" where it is left out."""
    molecule = Chem.RWMol(graph)
    for atom in molecule.GetAtoms():
        atom.SetNoImplicit(False)
        atom.SetNumRadicalElectrons(0)
    Chem.SanitizeMol(molecule)
    if molecule.GetRingInfo().NumRings() > 1 or any(molecule.HasSubstructMatch(p) for p in LEFT_OUT):
        return ""
    return Chem.MolToSmiles(molecule)


def bonded(numbers: np.ndarray, positions: np.ndarray) -> set[tuple[int, int]]:
    """Return the pairs closer than STRETCH times the sum of their covalent radii."""
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=2)
    near = distances < STRETCH * (covalent_radii[numbers][:, None] + covalent_radii[numbers][None])
    return {(int(i), int(j)) for i, j in zip(*np.nonzero(np.triu(near, 1)), strict=True)}


def thermal_frames(smiles: str, temperature: float, seed: int) -> list[Atoms] | None:
    """Return a frame after each of FRAME_STEPS; None where the molecule has no such geometry."""
    from tblite.ase import TBLite

    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    if AllChem.EmbedMolecule(molecule, randomSeed=seed & 0x7FFFFFFF) != 0:
        return None
    AllChem.MMFFOptimizeMolecule(molecule)
    expected = {tuple(sorted((b.GetBeginAtomIdx(), b.GetEndAtomIdx()))) for b in molecule.GetBonds()}
    numbers = np.array([a.GetAtomicNum() for a in molecule.GetAtoms()])
    atoms = Atoms(numbers, molecule.GetConformer().GetPositions())
    atoms.calc = TBLite(method="GFN2-xTB", verbosity=0)
    rng = np.random.RandomState(seed % 2**32)
    with warnings.catch_warnings():  # as in make_molecules.py
        warnings.simplefilter("ignore")
        MaxwellBoltzmannDistribution(atoms, temperature_K=temperature, rng=rng)
        dynamics = Langevin(
            atoms, TIME_STEP * units.fs, temperature_K=temperature, friction=FRICTION / units.fs, rng=rng
        )
    frames = []
    for steps in FRAME_STEPS:
        dynamics.run(steps)
        if np.abs(atoms.get_forces()).max() > LARGEST_FORCE or bonded(numbers, atoms.positions) != expected:
            return None
        frames.append(Atoms(numbers, atoms.positions))
    return frames


def main(
    first: Annotated[Path, typer.Argument(help="extxyz file to write: a frame of each molecule")],
    second: Annotated[Path, typer.Argument(help="extxyz file to write: another one of each")],
    molecules: Annotated[int, typer.Option(min=1, help="how many, chosen by the seed")] = 1200,
    heavy: Annotated[int, typer.Option(min=1, max=6, help="atoms of C, N and O at most")] = 5,
    atoms: Annotated[int, typer.Option(min=3, help="atoms at most")] = 10,
    temperature: Annotated[float, typer.Option(min=1.0, help="K")] = 500.0,
    holdout: Annotated[str, typer.Option(help="SMARTS: first frames of what has it say split=ood")] = "C#N",
    seed: Annotated[int, typer.Option()] = 9,
    prefix: Annotated[str, typer.Option(help="of frame_id")] = "many",
) -> None:
    """Write thermal geometries of many small CHNO molecules (RDKit, GFN2-xTB Langevin dynamics)."""
    RDLogger.DisableLog("rdApp.*")
    pattern = Chem.MolFromSmarts(holdout)
    if pattern is None:
        raise InputError(f"--holdout {holdout!r}: not a SMARTS pattern")
    labelling.versions(["tblite.ase"])
    names = [s for s in enumerate_smiles(heavy) if 3 <= Chem.AddHs(Chem.MolFromSmiles(s)).GetNumAtoms() <= atoms]
    rng = np.random.default_rng(seed)
    chosen = [names[i] for i in rng.permutation(len(names))[:molecules]]
    frames: list[tuple[Atoms, Atoms]] = []
    for smiles in track(chosen, f"{len(names)} molecules"):
        found = thermal_frames(smiles, temperature, int(rng.integers(2**31)))
        if found is not None:
            held = Chem.MolFromSmiles(smiles).HasSubstructMatch(pattern)
            for frame, split in zip(found, ("ood" if held else "", "train"), strict=True):
                frame.info = {"frame_id": "", "molecule": smiles, "temperature": round(temperature)}
                frame.info |= {"charge": 0, "multiplicity": 1, "holdout": held} | ({"split": split} if split else {})
            frames.append((found[0], found[1]))
    for path, part, name in ((first, 0, prefix), (second, 1, f"{prefix}2")):
        for index, pair in enumerate(frames):
            pair[part].info["frame_id"] = f"{name}-{index:04d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, [pair[part] for pair in frames], format="extxyz")
    n_out = len(chosen) - len(frames)
    print(f"{first}, {second}: {len(frames)} molecules; {n_out} left out (bonds changed, or large forces)")


if __name__ == "__main__":
    labelling.main(lambda: typer.run(main))
