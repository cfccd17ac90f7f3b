"""Phonons: forces of displaced supercells by ASE, everything else by phonopy."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units

from mffm import plots
from mffm.errors import InputError
from mffm.properties.report import require_volume

IMAGINARY = -0.05  # THz; acoustic branches come this close to 0 by rounding alone
ACOUSTIC = 1e-3  # THz; below it a mode is a translation and has no part in the heat
TEMPERATURES = np.arange(0.0, 1001.0, 50.0)  # K
KJ_PER_MOL = units.kJ / units.mol  # eV


@dataclass(frozen=True)
class Phonons:
    """Frequencies and heat of a crystal.

    Attributes:
        phonopy: phonopy's own object, with force constants, mesh and density of states.
        branches: (distances [n_q], frequencies [n_q, n_bands], THz) along the path. ticks: (distance, name).
        heat: temperature (K) → free energy (eV), entropy (eV/K), heat capacity (eV/K), each [n_temperatures], per
            primitive cell.
    """

    formula: str
    phonopy: Any
    supercell: np.ndarray
    n_displacements: int
    lowest: float
    highest: float
    branches: list[tuple[np.ndarray, np.ndarray]] = field(repr=False)
    ticks: list[tuple[float, str]] = field(repr=False)
    density: tuple[np.ndarray, np.ndarray] = field(repr=False)
    heat: dict[str, np.ndarray] = field(repr=False)

    def found(self) -> dict[str, Any]:
        """Return what a report holds."""
        return {
            "formula": self.formula,
            "supercell": self.supercell,
            "n_displacements": self.n_displacements,
            "lowest_frequency_thz": self.lowest,
            "highest_frequency_thz": self.highest,
            "is_stable": self.lowest > IMAGINARY,
            "n_atoms_primitive": len(self.phonopy.primitive),
            "per": "primitive cell",
            **self.heat,
            "phonopy": "phonopy.yaml",
        }


def phonons(
    atoms: Atoms,
    supercell: Sequence[int] | None = None,
    min_length: float = 10.0,
    displacement: float = 0.01,
    mesh: float = 60.0,
    each: Callable[[int, int], None] = lambda done, of: None,
) -> Phonons:
    """Return the phonons of a crystal with its calculator, by finite displacements.

    Args:
        atoms: at its minimum, with a calculator; float64 is worth it.
        supercell: repeats of the given cell; where not given, as many as make each length ``min_length`` Å.
        displacement: Å.
        mesh: Å, phonopy's length of the q-points' mesh.
        each: called with the number of supercells that are done, and of all.

    Raises:
        InputError: phonopy is not installed; the structure has no volume; what the calculator raises.
    """
    require_volume(atoms, "phonons")
    try:
        from phonopy import Phonopy
        from phonopy.structure.atoms import PhonopyAtoms
    except ImportError as error:
        raise InputError(f"phonons need phonopy ({error}); install it: pip install 'mffm[properties]'") from error
    repeats = np.maximum(1, np.ceil(min_length / atoms.cell.lengths() - 1e-6)).astype(int)
    if supercell is not None:
        repeats = np.asarray(supercell, int)
    unit_cell = PhonopyAtoms(symbols=atoms.get_chemical_symbols(), cell=atoms.cell.array, positions=atoms.positions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of "auto", which phonopy 3 did not have as default
        work: Any = Phonopy(unit_cell, supercell_matrix=np.diag(repeats), primitive_matrix="auto")
    work.generate_displacements(distance=displacement)
    n_displacements = find_force_constants(work, atoms, each)
    work.run_mesh(mesh)
    frequencies = work.get_mesh_dict()["frequencies"]
    work.run_total_dos()
    work.run_thermal_properties(temperatures=TEMPERATURES, cutoff_frequency=ACOUSTIC)
    heat = work.get_thermal_properties_dict()
    density = work.get_total_dos_dict()
    branches, ticks = _path(work)
    return Phonons(
        formula=atoms.get_chemical_formula(),
        phonopy=work,
        supercell=repeats,
        n_displacements=n_displacements,
        lowest=float(min(frequencies.min(), *(f.min() for _, f in branches))),
        highest=float(frequencies.max()),
        branches=branches,
        ticks=ticks,
        density=(density["frequency_points"], density["total_dos"]),
        heat={
            "temperatures_k": heat["temperatures"],
            "free_energy_ev": heat["free_energy"] * KJ_PER_MOL,
            "entropy_ev_per_k": heat["entropy"] * 1e-3 * KJ_PER_MOL,
            "heat_capacity_ev_per_k": heat["heat_capacity"] * 1e-3 * KJ_PER_MOL,
        },
    )


def find_force_constants(work: Any, atoms: Atoms, each: Callable[[int, int], None] = lambda done, of: None) -> int:
    """Give a phonopy object with displacements its force constants, symmetrised; return how many supercells it took.

    Args:
        atoms: whose calculator, charge and spin the supercells get.
    """
    cells = [cell for cell in work.supercells_with_displacements or () if cell is not None]
    forces = []
    for done, cell in enumerate(cells):
        displaced = Atoms(cell.symbols, scaled_positions=cell.scaled_positions, cell=cell.cell, pbc=True)
        displaced.info = dict(atoms.info)
        displaced.calc = atoms.calc
        found = displaced.get_forces()
        forces.append(found - found.mean(axis=0))  # the drift that rounding leaves
        each(done + 1, len(cells))
    work.forces = np.array(forces)
    work.produce_force_constants()
    work.symmetrize_force_constants()
    return len(cells)


def _path(work: Any, points: int = 40) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[tuple[float, str]]]:
    """Run the bands along ASE's path through the primitive cell's special points."""
    primitive = work.primitive
    path = Atoms(primitive.symbols, cell=primitive.cell, pbc=True).cell.bandpath()
    segments, ends = [], []
    for piece in path.path.split(","):
        names = _names(piece)
        for a, b in pairwise(names):
            segments.append(np.linspace(path.special_points[a], path.special_points[b], points))
            ends.append((a, b))
    work.run_band_structure(segments)
    found = work.get_band_structure_dict()
    branches = list(zip(found["distances"], found["frequencies"], strict=True))
    ticks: list[tuple[float, str]] = []
    for (distances, _), names_of in zip(branches, ends, strict=True):
        for distance, name in zip((distances[0], distances[-1]), names_of, strict=True):
            shown = name.replace("G", "Γ")
            if not ticks or distance - ticks[-1][0] > 1e-8:
                ticks.append((float(distance), shown))
            elif shown not in ticks[-1][1].split("|"):
                ticks[-1] = ticks[-1][0], f"{ticks[-1][1]}|{shown}"
    return branches, ticks


def _names(piece: str) -> list[str]:
    """Split "GX1M" into G, X1, M."""
    names: list[str] = []
    for character in piece:
        if character.isdigit():
            names[-1] += character
        else:
            names.append(character)
    return names


def draw(result: Phonons, path: Path) -> None:
    """Draw bands and density of states."""
    plots.bands(path, result.branches, result.ticks, result.density)
