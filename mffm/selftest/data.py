"""A small store made on the spot, without a download, and the recipe that the self-test trains on it.

Rattled crystals, alloys and molecules, labelled by two cheap potentials of ASE as two fidelities: ``emt`` (energy,
forces; stress of crystals) for every frame, ``morse`` (energy, forces, stress) for every third crystal.
"""

from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from ase.calculators.morse import MorsePotential

from mffm.config.base import validate
from mffm.config.data import DataConfig
from mffm.config.recipe import Recipe
from mffm.data.ingest import ingest

METALS = ("Cu", "Al", "Ni", "Ag", "Au", "Pd", "Pt")  # that EMT knows
MOLECULES = ("H2O", "NH3", "CH4", "CH3OH", "C2H6", "H2CO", "CO2", "N2H4")
CUTOFF = 5.0  # Å
CPU_EDGES = 1500  # of a microbatch: 0.06 s on one core
GPU_EDGES = 30_000


def edges(on_gpu: bool) -> int:
    """Return the edges of a microbatch."""
    return GPU_EDGES if on_gpu else CPU_EDGES


def crystals(n: int, seed: int = 0) -> list[Atoms]:
    """Return ``n`` strained and rattled fcc crystals and alloys of 8 or 16 atoms."""
    random = np.random.default_rng(seed)
    frames = []
    for i in range(n):
        first, second = random.choice(METALS, 2, replace=False)
        atoms = bulk(first, "fcc", cubic=True).repeat((2, 2, 1) if i % 4 == 0 else (2, 1, 1))
        if i % 2:
            swapped = random.random(len(atoms)) < 0.4
            atoms.symbols[swapped] = second
        atoms.set_cell(atoms.cell @ (np.eye(3) + random.normal(0, 0.02, (3, 3))), scale_atoms=True)
        atoms.positions += random.normal(0, 0.08, atoms.positions.shape)
        frames.append(atoms)
    return frames


def molecules(n: int, seed: int = 0) -> list[Atoms]:
    """Return ``n`` rattled molecules."""
    random = np.random.default_rng(seed)
    frames = []
    for i in range(n):
        atoms = molecule(MOLECULES[i % len(MOLECULES)])
        atoms.positions += random.normal(0, 0.05, atoms.positions.shape)
        frames.append(atoms)
    return frames


def _label(atoms: Atoms, name: str, calculator: Calculator) -> None:
    work = atoms.copy()
    work.calc = calculator
    atoms.info[f"energy_{name}"] = float(work.get_potential_energy())
    atoms.arrays[f"forces_{name}"] = work.get_forces()
    if work.pbc.all():
        atoms.info[f"stress_{name}"] = work.get_stress(voigt=False)


def make_store(folder: Path, n_crystals: int = 240, n_molecules: int = 80) -> Path:
    """Write the frames as extxyz, ingest them into ``folder / "store"`` and return that."""
    folder.mkdir(parents=True, exist_ok=True)
    frames = [*crystals(n_crystals), *molecules(n_molecules)]
    morse = MorsePotential(epsilon=0.25, r0=2.75, rho0=4.0, rcut1=4.5, rcut2=5.0)
    for i, atoms in enumerate(frames):
        atoms.info["frame"] = f"frame-{i:04d}"
        _label(atoms, "emt", EMT())
        if i < n_crystals and i % 3 == 0:
            _label(atoms, "morse", morse)
    ase.io.write(folder / "frames.extxyz", frames, format="extxyz")
    keys = {
        name: {"energy": f"energy_{name}", "forces": f"forces_{name}", "stress": f"stress_{name}"}
        for name in ("emt", "morse")
    }
    config = {
        "store": str(folder / "store"),
        "fidelities": {"emt": {"level_of_theory": "EMT", "code": "ASE"}, "morse": {"level_of_theory": "Morse"}},
        "sources": [{"name": "made", "path": "frames.extxyz", "frame_key": "frame", "licence": "none", "labels": keys}],
        "cutoffs": [CUTOFF],
    }
    ingest(validate(DataConfig, config, "selftest"), folder, progress=False)
    return folder / "store"


def recipe(store: Path, run: Path, n_ranks: int, steps: int, on_gpu: bool) -> Recipe:
    """Return the recipe: the default backbone, delta heads, one microbatch a rank and step on ``n_ranks``, ZeRO 1.

    The learning rate stays constant, so that runs of different length have the same beginning.
    """
    content = {
        "name": "selftest",
        "run": str(run),
        "data": {
            "store": str(store),
            "plan": {
                "pools": [
                    {"fidelity": "emt", "properties": ["energy", "forces", "stress"], "weight": 2},
                    {"fidelity": "morse", "properties": ["energy", "forces"], "weight": 1},
                ],
                "edge_budget": edges(on_gpu) * n_ranks,
                "edges_per_microbatch": edges(on_gpu),
            },
            "validation_max_frames": 8,
        },
        "model": {
            "backbone": {"cutoff": CUTOFF},
            "conditioning": {"kind": "onehot"},
            "heads": {"kind": "delta", "base": "emt"},
        },
        "optim": {"lr": 1e-3, "final_lr_fraction": 1.0, "warmup_steps": 5},
        "train": {
            "steps": steps,
            "validate_every": steps,
            "save_every": max(1, steps // 3),
            "keep": 10,
            "log_every": 1,
        },
        "deepspeed": {"zero_stage": 1},
        "log": {"wandb": "disabled"},
    }
    return validate(Recipe, content, "selftest")
