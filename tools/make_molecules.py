"""Thermal frames of small closed-shell CHNO molecules: geometries for label_molecules.py.

    python tools/make_molecules.py GEOMETRIES.extxyz --seed 8 --prefix g2s8

The molecules are those of ASE's g2 set with C, H, N and O only, three to twelve atoms, one to four heavy atoms, paired
electrons, and one dominant configuration: 48 of them. Each is run by GFN2-xTB Langevin dynamics (0.5 fs, friction
0.02/fs) at every temperature: 50 fs to equilibrate, then a frame every 10 fs. Frames with a force above 15 eV/Å are
left out and counted. The eight molecules of HOLDOUT are marked, so that no high-fidelity training set takes them.

Needs ``pip install -e ".[label]"``. 48 molecules, two temperatures, ten frames each: about a minute.
"""

import warnings
from pathlib import Path
from typing import Annotated

import labelling
import numpy as np
import typer
from ase import Atoms, units
from ase.build import molecule
from ase.collections import g2
from ase.io import write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution

from mffm.errors import InputError, known

HOLDOUT = ("CH3CH2NH2", "CH3CH2OCH3", "CH3COCH3", "CH3CONH2", "H2CCHCN", "HCOOCH3", "N2H4", "cyclobutene")
MULTIREFERENCE = ("CH2_s1A1d", "O3")  # CCSD(T) on one closed-shell determinant is no reference for these
TIME_STEP = 0.5  # fs
FRICTION = 0.02  # 1/fs
EQUILIBRATION_STEPS = 100
STEPS_PER_FRAME = 20
LARGEST_FORCE = 15.0  # eV/Å; above it a frame is on its way to dissociation


def small_molecules() -> dict[str, Atoms]:
    """Return the molecules of the g2 set that these scripts are about, by name."""
    chosen = {}
    for name in g2.names:
        atoms = molecule(name)
        n_heavy = int(np.sum(atoms.numbers > 1))
        paired = not atoms.get_initial_magnetic_moments().any() and atoms.numbers.sum() % 2 == 0
        small = 3 <= len(atoms) <= 12 and 1 <= n_heavy <= 4
        if set(atoms.numbers) <= {1, 6, 7, 8} and small and paired and name not in MULTIREFERENCE:
            chosen[name] = atoms
    return chosen


def thermal_frames(
    start: Atoms, temperature: float, n_frames: int, seeds: tuple[int, int]
) -> tuple[list[np.ndarray], int]:
    """Return positions [n_atoms, 3] in Å along a trajectory, and how many were left out for their forces.

    ``seeds``: of the first velocities and of the thermostat.
    """
    from tblite.ase import TBLite

    atoms = start.copy()
    atoms.calc = TBLite(method="GFN2-xTB", verbosity=0)
    velocities, thermostat = (np.random.RandomState(seed) for seed in seeds)
    friction = FRICTION / units.fs
    with (
        warnings.catch_warnings()
    ):  # ASE advises other settings; these are the ones data/molecules.extxyz was made with
        warnings.simplefilter("ignore")
        MaxwellBoltzmannDistribution(atoms, temperature_K=temperature, rng=velocities)
        dynamics = Langevin(atoms, TIME_STEP * units.fs, temperature_K=temperature, friction=friction, rng=thermostat)
    dynamics.run(EQUILIBRATION_STEPS)
    kept = []
    for _ in range(n_frames):
        dynamics.run(STEPS_PER_FRAME)
        if np.abs(atoms.get_forces()).max() <= LARGEST_FORCE:
            kept.append(atoms.positions.copy())
    return kept, n_frames - len(kept)


def generate(
    molecules: dict[str, Atoms], temperatures: list[float], n_frames: int, seed: int, prefix: str
) -> tuple[list[Atoms], int]:
    """Return shuffled frames named ``<prefix>-<number>``, and how many were left out."""
    rng = np.random.default_rng(seed)
    frames, left_out = [], 0
    for name, start in molecules.items():
        for temperature in temperatures:
            seeds = (int(rng.integers(2**31)), int(rng.integers(2**31)))
            positions, n_out = thermal_frames(start, temperature, n_frames, seeds)
            left_out += n_out
            for p in positions:
                frame = Atoms(start.numbers, p)
                frame.info.update(molecule=name, temperature=round(temperature), charge=0, multiplicity=1)
                frame.info["holdout"] = name in HOLDOUT
                frames.append(frame)
    rng.shuffle(frames)
    for index, frame in enumerate(frames):
        frame.info = {"frame_id": f"{prefix}-{index:04d}", **frame.info}
    return frames, left_out


def main(
    out: Annotated[Path, typer.Argument(help="extxyz file to write")],
    molecules: Annotated[str, typer.Option(help="comma-separated g2 names; empty: all 48")] = "",
    temperatures: Annotated[str, typer.Option(help="K, comma-separated")] = "400,1000",
    frames: Annotated[int, typer.Option(min=1, help="per molecule and temperature")] = 10,
    seed: Annotated[int, typer.Option(help="data/molecules.extxyz was made with 7")] = 8,
    prefix: Annotated[str, typer.Option(help="of frame_id; g2 is taken by data/molecules.extxyz")] = "new",
    split: Annotated[
        str, typer.Option(help="info key split of every frame: where held-out molecules get low-fidelity labels alone")
    ] = "",
) -> None:
    """Write thermal geometries of small closed-shell CHNO molecules (GFN2-xTB Langevin dynamics)."""
    found = small_molecules()
    names = [name.strip() for name in molecules.split(",") if name.strip()] or list(found)
    unknown = [name for name in names if name not in found]
    if unknown:
        raise InputError(f"--molecules: {', '.join(unknown)} is not among {known(found)}")
    try:
        kelvin = [float(t) for t in temperatures.split(",")]
    except ValueError as error:
        raise InputError(f"--temperatures {temperatures!r}: expected numbers with commas between them") from error
    labelling.versions(["tblite.ase"])
    made, left_out = generate({name: found[name] for name in names}, kelvin, frames, seed, prefix)
    for frame in made if split else []:
        frame.info["split"] = split
    out.parent.mkdir(parents=True, exist_ok=True)
    write(out, made, format="extxyz")
    print(
        f"{out}: {len(made)} frames of {len(names)} molecules; {left_out} left out (force above {LARGEST_FORCE} eV/Å)"
    )


if __name__ == "__main__":
    labelling.main(lambda: typer.run(main))
