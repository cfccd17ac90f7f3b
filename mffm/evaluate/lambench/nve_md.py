"""Stability of molecular dynamics: 9 systems, 10,000 steps of 1 fs at constant energy from 300 K.

The suite fits energies against steps × time step × ``ase.units.fs`` and multiplies by 1000; as ``fs`` is 0.0982 in
ASE's time, what it prints as eV/atom/ps is 10.18 times the drift. It is copied, so that values compare.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from ase.io import iread
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary, ZeroRotation
from ase.md.verlet import VelocityVerlet
from ase.units import fs

from mffm.evaluate.benchmark.task import LAMBENCH, DataFile, Options, Score
from mffm.evaluate.lambench.scores import WORST_DRIFT, instability

STEPS, TIMESTEP, KELVIN, SEED = 10_000, 1.0, 300.0, 0  # TIMESTEP in fs
EVERY, WARM_UP = 100, 0.2
N_OF_SUITE = 9
DIVERGED = 1e10  # eV, where a trajectory is given up
FILE = DataFile(
    "lambench/nve_md.extxyz",
    "github.com/deepmodeling/LAMBench, tasks/calculator/nve_md/nve_md_data.py",
    "the 9 structures of that file, in its order; info: system, a name of each",
)


def drift(energies: np.ndarray, every: int, n_atoms: int) -> float:
    """Return the suite's slope from total energies, [n] eV, ``every`` steps of 1 fs apart, without the first fifth."""
    first = int(WARM_UP * (len(energies) - 1))
    times = np.arange(first, len(energies)) * every * TIMESTEP * fs
    return abs(1000 * float(np.polyfit(times, energies[first:], 1)[0]) / n_atoms)


class NveMd:
    """M_IS: the mean over systems of log10(slope / 5e-4) in 0 to 5; a trajectory that ends early counts 5."""

    name, suite = "nve_md", LAMBENCH
    title = "energy drift of NVE trajectories"
    files = (FILE,)
    steps = STEPS

    def load(self, data: Path) -> Mapping[str, Atoms]:
        return {str(a.info["system"]): a for a in iread(data / FILE.path, index=":", format="extxyz")}

    def run(self, item: Atoms, calculator: BaseCalculator, options: Options) -> dict[str, Any]:
        atoms = item.copy()
        atoms.calc = calculator
        MaxwellBoltzmannDistribution(atoms, temperature_K=KELVIN, rng=np.random.default_rng(SEED))
        Stationary(atoms)
        ZeroRotation(atoms)
        energies: list[float] = []

        def record() -> None:
            energies.append(float(atoms.get_total_energy()))
            if not abs(energies[-1]) < DIVERGED:
                raise FloatingPointError(f"total energy {energies[-1]:.3g} eV after {len(energies) * EVERY} steps")

        dynamics = VelocityVerlet(atoms, TIMESTEP * fs)
        dynamics.attach(record, interval=EVERY)
        dynamics.run(self.steps)
        return {
            "slope": drift(np.array(energies), EVERY, len(atoms)),
            "steps": self.steps,
            "momenta_diff": float(np.linalg.norm(atoms.get_momenta().sum(axis=0))),
            "energy_range": max(energies) - min(energies),
        }

    def doubt(self, item: Atoms, result: Mapping[str, Any]) -> str | None:
        return f"slope {result['slope']:.3g}; counts {WORST_DRIFT:g}" if instability([result["slope"]]) == 5 else None

    def score(self, items: Mapping[str, Atoms], results: Mapping[str, Mapping[str, Any]]) -> Score:
        slopes = [results[i]["slope"] if i in results else None for i in items]
        known = [s for s in slopes if s is not None and s > 0]
        metrics: dict[str, float | None] = {
            "M_IS": instability(slopes),
            "slope": float(np.exp(np.mean(np.log(known)))) if known else None,
            "success_rate": len(results) / len(items),
        }
        return Score(
            metrics,
            "slope in the suite's eV/atom/ps, 10.18 times the drift",
            len(items),
            len(items) - len(results),
            {"M_IS": "M_IS"} if len(items) == N_OF_SUITE else {},
        )

    def write(self, items: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
        """Write nothing: the suite takes no submissions of this task."""


TASK = NveMd()
