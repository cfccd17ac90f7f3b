"""ASE's EMT with faults on chosen structures, and a task of small clusters: imported by workers by its name."""

import importlib
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.emt import EMT

from mffm.evaluate.lambench.differences import Difference, DifferenceTask

BOND = 2.5  # Å


class Faulty(EMT):
    """EMT that goes wrong on a cluster by its number of atoms: 3 raises, 4 NaN, 5 hangs, 6 absurd, 7 dies."""

    def calculate(self, atoms: Any = None, *args: Any, **kwargs: Any) -> None:
        super().calculate(atoms, *args, **kwargs)
        n = len(atoms)
        if n == 3:
            raise RuntimeError("the SCF did not converge")
        if n == 4:
            self.results["energy"] = np.nan
        if n == 5:
            time.sleep(3600)
        if n == 6:
            self.results["energy"] += 1e6
        if n == 7:
            os.kill(os.getpid(), signal.SIGKILL)


class Slow(EMT):
    """EMT that takes at least 0.3 s."""

    def calculate(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(0.3)
        super().calculate(*args, **kwargs)


class Threads(EMT):
    """A calculator whose energy says how many threads it may use."""

    def calculate(self, *args: Any, **kwargs: Any) -> None:
        super().calculate(*args, **kwargs)
        self.results["energy"] = float(os.environ["OMP_NUM_THREADS"] + os.environ["MKL_NUM_THREADS"])


class Unbuildable(EMT):
    """A calculator that cannot be made."""

    def __init__(self) -> None:
        raise OSError("weights.pth: not found")


class Lacking(EMT):
    """EMT that asks for a package when it computes, as tasks and some calculators do."""

    def calculate(self, *args: Any, **kwargs: Any) -> None:
        importlib.import_module("no_such_package")


def chain(n: int) -> Atoms:
    """Return a chain of copper atoms."""
    return Atoms(f"Cu{n}", [[BOND * i, 0, 0] for i in range(n)])


def load(data: Path) -> Mapping[str, Difference]:
    """Return chains of 2 to 9 atoms; labels are EMT's own energies."""
    found = {}
    for n in range(2, 10):
        atoms = chain(n)
        atoms.calc = EMT()
        found[f"Cu{n}"] = Difference([(1.0, chain(n))], 1.0, float(atoms.get_potential_energy()))
    return found


def task(name: str) -> DifferenceTask:
    """Return the task of chains."""
    return DifferenceTask(name, "chains", (), load, "eV", 8, has_success_rate=True)
