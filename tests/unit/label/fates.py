"""An ASE calculator that labels helium and does with each other noble gas what a code can do to a run."""

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.lj import LennardJones

DIES, SLOW, HUNGRY, UNCONVERGED, NAN, RAISES = 10, 18, 36, 54, 86, 3


class Fates(LennardJones):
    """Lennard-Jones, but for neon, argon, krypton, xenon, radon and lithium."""

    converged = True

    def calculate(
        self, atoms: Atoms | None = None, properties: Sequence[str] = ("energy",), changes: Any = all_changes
    ) -> None:
        assert atoms is not None
        fate = int(atoms.numbers[0])
        if fate == DIES:
            os._exit(9)
        if fate == SLOW:
            time.sleep(60)
        if fate == HUNGRY:
            held = np.ones(50_000_000)  # 400 MB
            time.sleep(60)
            del held
        if fate == RAISES:
            raise RuntimeError("a fault\nof the code")
        super().calculate(atoms, properties, changes)
        self.converged = fate != UNCONVERGED
        if fate == NAN:
            self.results["energy"] = float("nan")


class Moves(Calculator):
    """A calculator that relaxes what it is given."""

    implemented_properties = ["energy"]  # noqa: RUF012 - as ASE has it

    def calculate(self, atoms: Atoms | None = None, *arguments: Any) -> None:
        assert atoms is not None
        atoms.positions += 0.1
        self.results = {"energy": 0.0}


def no_calculator() -> int:
    return 1
