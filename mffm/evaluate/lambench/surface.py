"""Cleavage energies of surfaces (Mehdizadeh and Schindler, AI Sci. 1, 025002 (2025)), unrelaxed."""

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ase import Atoms

from mffm.errors import InputError
from mffm.evaluate.benchmark.task import DataFile
from mffm.evaluate.lambench.differences import PUBLISHED, Difference, DifferenceTask

FOLDER = DataFile(
    "lambench/surface/",
    PUBLISHED,
    "one JSON, {data: [{structure_slab, structure_bulk (pymatgen), area_slab (Å²), cleavage_energy_DFT (eV/Å²)}]}",
)
MEV = 1000.0


def load(data: Path) -> Mapping[str, Difference]:
    """Return slab → (E(slab) − n E(bulk)) / 2A, meV/Å²."""
    files = sorted((data / FOLDER.path).glob("*.json"))
    if not files:
        raise InputError(f"{data / FOLDER.path}: no JSON file; expected {FOLDER.layout}")
    found = {}
    for n, entry in enumerate(json.loads(files[0].read_text())["data"]):
        slab, bulk = (_atoms(entry[f"structure_{k}"]) for k in ("slab", "bulk"))
        terms = [(1.0, slab), (-len(slab) / len(bulk), bulk)]
        found[f"surface-{n}"] = Difference(
            terms, MEV / (2 * entry["area_slab"]), MEV * float(entry["cleavage_energy_DFT"])
        )
    return found


def _atoms(structure: Any) -> Atoms:
    """Return the atoms of a pymatgen dictionary, which the file also holds as text of JSON or of Python."""
    from pymatgen.core import Structure
    from pymatgen.io.ase import AseAtomsAdaptor

    if isinstance(structure, str):
        try:
            structure = json.loads(structure)
        except json.JSONDecodeError:
            structure = ast.literal_eval(structure)
    atoms = AseAtomsAdaptor.get_atoms(Structure.from_dict(structure))
    return Atoms(atoms.symbols, atoms.positions, cell=atoms.cell, pbc=True)


TASK = DifferenceTask("surface", "surface cleavage energies", (FOLDER,), load, "meV/Å²", 3671)
