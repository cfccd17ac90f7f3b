"""Strained conformers: Wiggle150 (Brew et al., JCTC 21, 3922 (2025)), energies over each molecule's ground state."""

import json
from collections.abc import Mapping
from pathlib import Path

from ase import Atoms

from mffm.errors import InputError
from mffm.evaluate.benchmark.task import DataFile
from mffm.evaluate.lambench.differences import PUBLISHED, Difference, DifferenceTask, read_frames

KCAL_PER_EV = 23.0609  # as the suite's task has it
MOLECULES, FRAMES_EACH = ("ado", "bpn", "efa"), 51
FULL = DataFile(
    "lambench/Wiggle150.traj",
    f"supporting information of doi 10.1021/acs.jctc.5c00015 (ct5c00015_si_003.xyz); {PUBLISHED}",
    "ASE trajectory, 3 × (ground state and 50 conformers) of ado, bpn and efa, energies in kcal/mol",
)
MINI = DataFile(
    "wiggle150_mini/wiggle150_mini.json",
    "github.com/instadeepai/mlipaudit tests/data (Apache-2.0)",
    "list of {molecule_name, atom_symbols, conformer_coordinates, dft_energy_profile (kcal/mol)}, ground state first",
    "dec6e042459356886d359983d3fdb70ee190e6fa65005634fdcccaaf3354bb6a",
)


def _over_ground(ground: Atoms, conformer: Atoms, label: float) -> Difference:
    return Difference([(1.0, conformer), (-1.0, ground)], KCAL_PER_EV, label)


def load(data: Path) -> Mapping[str, Difference]:
    """Return conformer → energy over the ground state."""
    frames = read_frames(data / FULL.path)
    if len(frames) != FRAMES_EACH * len(MOLECULES):
        raise InputError(f"{data / FULL.path}: {len(frames)} frames; expected {FRAMES_EACH * len(MOLECULES)}")
    found = {}
    for k, name in enumerate(MOLECULES):
        own = frames[k * FRAMES_EACH : (k + 1) * FRAMES_EACH]
        energies = [atoms.get_potential_energy() for atoms in own]
        plain = [Atoms(a.symbols, a.positions) for a in own]
        for n in range(1, FRAMES_EACH):
            found[f"{name}-{n}"] = _over_ground(plain[0], plain[n], energies[n] - energies[0])
    return found


def load_mini(data: Path) -> Mapping[str, Difference]:
    """Return the three conformers that are public in a repository."""
    found = {}
    for entry in json.loads((data / MINI.path).read_text()):
        symbols, energies = entry["atom_symbols"], entry["dft_energy_profile"]
        conformers = [Atoms(symbols, xyz) for xyz in entry["conformer_coordinates"]]
        for n in range(1, len(conformers)):
            name = f"{entry['molecule_name']}-{n}"
            found[name] = _over_ground(conformers[0], conformers[n], energies[n] - energies[0])
    return found


TASK = DifferenceTask("wiggle150", "Wiggle150 strained conformers", (FULL,), load, "kcal/mol", 150)
TASK_MINI = DifferenceTask(
    "wiggle150-mini", "3 of Wiggle150's 150 conformers", (MINI,), load_mini, "kcal/mol", 3,
    remark="3 of 150 conformers: shows that the task runs, says nothing of quality",
)  # fmt: skip
