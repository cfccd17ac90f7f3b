"""Molecular dynamics with ASE: NVE, NVT and NPT, resumable, with the drift of the energy.

    DIR/md.config.json   what decides the trajectory      DIR/log.csv            a row every ``log_every`` steps
    DIR/state.npz        where it stands                  DIR/trajectory.extxyz  a frame every ``save_every`` steps

The state holds positions, momenta, cell and barostat to the last bit and the sizes of the other two files; what a kill
left behind it is cut off. Noise is a function of the seed and the step, so a resumed trajectory is the same as one
that was never stopped, wherever it stopped; a stop between leaves its own frame and row in the files.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.extxyz import write_extxyz
from ase.md.langevinbaoab import LangevinBAOAB
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary

from mffm import plots
from mffm.config.properties import MdConfig
from mffm.errors import InputError
from mffm.properties.report import charge_and_spin, plain, require_volume
from mffm.release import write_json

BAROSTAT = ("p_eps", "force_eps")  # of ASE's integrator; the force is that of the last half step's momenta
# First parts of the keys of random streams. numpy pads keys with nothing, but lists of seeds with zeros: [3] is [3, 0].
MOMENTA, NOISE = 0, 1
COLUMNS = ("step", "time_ps", "potential_ev", "kinetic_ev", "total_ev", "temperature_k", "volume_ang3")


@dataclass(frozen=True)
class Trajectory:
    """What a run of molecular dynamics came to.

    Attributes:
        log: [n_rows, len(COLUMNS)] float64.
        drift: eV/atom/ps, slope of the total energy by least squares; of a thermostat's it says nothing.
        fluctuation: eV/atom, root mean square of the total energy around that line.
    """

    config: MdConfig
    folder: Path
    n_atoms: int
    n_steps: int
    n_resumed: int
    log: np.ndarray
    drift: float
    fluctuation: float

    def found(self) -> dict[str, Any]:
        """Return what a report holds."""
        column = dict(zip(COLUMNS, self.log.T, strict=True))
        later = slice(len(self.log) // 2, None)
        return {
            "n_atoms": self.n_atoms,
            "n_steps": self.n_steps,
            "time_ps": column["time_ps"][-1],
            "energy_drift_ev_per_atom_per_ps": self.drift if self.config.ensemble == "nve" else None,
            "energy_fluctuation_ev_per_atom": self.fluctuation if self.config.ensemble == "nve" else None,
            "mean_temperature_second_half_k": column["temperature_k"][later].mean(),
            "mean_volume_second_half_ang3": column["volume_ang3"][later].mean(),
            "trajectory": "trajectory.extxyz",
            "log": "log.csv",
        }


def md(
    atoms: Atoms,
    config: MdConfig,
    steps: int,
    folder: Path,
    made_by: Any = None,
    each_save: Callable[[int], None] = lambda n: None,
) -> Trajectory:
    """Run, or go on with, a trajectory up to a number of steps.

    Args:
        atoms: with a calculator; its momenta are used where there are some, otherwise they are drawn.
        folder: see above; a trajectory there goes on, where the structure and the configuration are the same.
        made_by: JSON of what the calculator is, compared when a trajectory goes on.
        each_save: called with the number of steps that are saved.

    Raises:
        InputError: another trajectory is in the folder; NPT without a volume; no momenta and no temperature; energies
            or positions that are not finite.
    """
    if config.ensemble == "npt":
        require_volume(atoms, "npt")
    moving = atoms.copy()
    moving.calc = atoms.calc
    folder.mkdir(parents=True, exist_ok=True)
    _same_trajectory(folder, atoms, config, made_by)
    start = 0
    dynamics = None
    log, frames, state = folder / "log.csv", folder / "trajectory.extxyz", folder / "state.npz"
    if state.is_file():
        start, dynamics = _restore(moving, config, state, log, frames)
    else:
        _first_momenta(moving, config)
        dynamics = _dynamics(moving, config)
        log.write_text(",".join(COLUMNS) + "\n" + _row(moving, 0, config))
        frames.write_text("")
        _save(moving, dynamics, 0, log, frames, state)
    step = start
    while step < steps:
        end = min(steps, (step // config.save_every + 1) * config.save_every)
        rows = []
        while step < end:
            dynamics.rng = _rng(config, NOISE, step)
            dynamics.step()
            step += 1
            if step % config.log_every == 0 or step == steps:
                rows.append(_row(moving, step, config))
        if not np.isfinite(moving.positions).all():
            raise InputError(f"{folder}: positions are not finite at step {step}; give a smaller timestep")
        with log.open("a") as file:
            file.writelines(rows)
        _save(moving, dynamics, step, log, frames, state)
        each_save(step)
    table = np.loadtxt(log, delimiter=",", skiprows=1, ndmin=2)
    drift, fluctuation = energy_drift(table[:, 1], table[:, 4] / len(atoms))
    return Trajectory(config, folder, len(atoms), step, start, table, drift, fluctuation)


def energy_drift(times: np.ndarray, energies: np.ndarray) -> tuple[float, float]:
    """Return the slope of energies by least squares and the root mean square of what remains.

    Args:
        times: [n], ps. energies: [n], eV/atom.
    """
    if len(times) < 2:
        return 0.0, 0.0
    slope, offset = np.polyfit(times, energies, 1)
    return float(slope), float(np.sqrt(np.mean((energies - slope * times - offset) ** 2)))


def draw(trajectory: Trajectory, path: Path) -> None:
    """Draw total energy and temperature (and of NPT the volume) against time."""
    column = dict(zip(COLUMNS, trajectory.log.T, strict=True))
    n, time = trajectory.n_atoms, column["time_ps"]
    total = 1e3 * (column["total_ev"] - column["total_ev"][0]) / n
    panels: list[Any] = [("time, ps", "total energy above the first, meV/atom", {"energy": (time, total, "-")})]
    panels.append(("time, ps", "temperature, K", {"temperature": (time, column["temperature_k"], "-")}))
    if trajectory.config.ensemble == "npt":
        panels.append(("time, ps", "volume, Å³/atom", {"volume": (time, column["volume_ang3"] / n, "-")}))
    plots.curves(path, panels)


def _first_momenta(atoms: Atoms, config: MdConfig) -> None:
    if atoms.has("momenta"):
        return
    if config.temperature is None:
        raise InputError("the structure has no momenta; give a temperature to draw them from")
    MaxwellBoltzmannDistribution(atoms, temperature_K=config.temperature, rng=_rng(config, MOMENTA))
    Stationary(atoms, preserve_temperature=False)


def _rng(config: MdConfig, *key: int) -> np.random.Generator:
    """Return the random stream of a key; different keys are different streams."""
    return np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=key))


def _dynamics(atoms: Atoms, config: MdConfig) -> LangevinBAOAB:
    """Return the integrator; without a thermostat it is velocity Verlet."""
    arguments: dict[str, Any] = {}
    if config.ensemble != "nve":
        if config.temperature is None:
            raise InputError(f"{config.ensemble} needs a temperature")
        arguments |= {"temperature_K": config.temperature, "T_tau": config.thermostat_time * units.fs, "rng": 0}
    if config.ensemble == "npt":
        c = 1.66 * units.fs  # ASE's heuristic for the mass, which it announces with a warning
        tau = config.barostat_time * units.fs
        arguments |= {
            "externalstress": -config.pressure * units.GPa,
            "hydrostatic": config.volume_only,
            "P_tau": tau,
            "P_mass": (tau / 4 / c * len(atoms) ** (1 / 6)) ** 2,
        }
    return LangevinBAOAB(atoms, config.timestep * units.fs, **arguments)


def _row(atoms: Atoms, step: int, config: MdConfig) -> str:
    potential, kinetic = float(atoms.get_potential_energy()), float(atoms.get_kinetic_energy())
    values = (
        step * config.timestep * 1e-3, potential, kinetic, potential + kinetic, atoms.get_temperature(),
        atoms.cell.volume,
    )  # fmt: skip
    return ",".join([str(step), *(repr(float(v)) for v in values)]) + "\n"


def _save(atoms: Atoms, dynamics: LangevinBAOAB, step: int, log: Path, frames: Path, state: Path) -> None:
    """Append a frame and write the state; the state is renamed into place, so that a kill leaves the one before."""
    written = atoms.copy()
    written.info["step"] = step
    written.calc = SinglePointCalculator(written, energy=atoms.get_potential_energy(), forces=atoms.get_forces())
    with frames.open("a") as file:
        write_extxyz(file, [written], write_results=True)
    aside = state.with_suffix(".partial.npz")
    np.savez(
        aside,
        step=step,
        positions=atoms.positions,
        momenta=atoms.get_momenta(),
        cell=atoms.cell.array,
        barostat=np.stack(np.broadcast_arrays(*(getattr(dynamics, name, 0.0) for name in BAROSTAT))),
        sizes=[log.stat().st_size, frames.stat().st_size],
    )
    os.replace(aside, state)


def _restore(atoms: Atoms, config: MdConfig, state: Path, log: Path, frames: Path) -> tuple[int, LangevinBAOAB]:
    """Return the step of a saved state and its integrator, with the atoms put there and the files cut to it."""
    with np.load(state) as saved:
        atoms.set_cell(saved["cell"])
        atoms.positions = saved["positions"]
        atoms.set_momenta(saved["momenta"])
        step, barostat, sizes = int(saved["step"]), saved["barostat"], saved["sizes"].tolist()
    for path, size in zip((log, frames), sizes, strict=True):
        if path.stat().st_size < size:
            raise InputError(f"{path}: shorter than {state} says; remove the folder and begin again")
        os.truncate(path, size)
    dynamics = _dynamics(atoms, config)
    if config.ensemble == "npt":
        for name, value in zip(BAROSTAT, barostat, strict=True):
            setattr(dynamics, name, value)
    return step, dynamics


def _same_trajectory(folder: Path, atoms: Atoms, config: MdConfig, made_by: Any) -> None:
    """Write what decides the trajectory, or compare it with what is there."""
    digest = sha256()
    for part in (atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, atoms.get_momenta(), atoms.get_masses()):
        digest.update(np.ascontiguousarray(part).tobytes())
    decides = {
        **config.model_dump(mode="json"),
        "structure": digest.hexdigest(),
        **plain(charge_and_spin(atoms)),
        "made_by": made_by,
    }
    path = folder / "md.config.json"
    if not path.is_file():
        write_json(path, decides)
        return
    before = json.loads(path.read_text())
    for key, value in decides.items():
        if before.get(key) != json.loads(json.dumps(value)):
            raise InputError(
                f"{folder}: its trajectory has {key} {before.get(key)!r}, now {value!r}; give another folder, or "
                "remove this one"
            )
