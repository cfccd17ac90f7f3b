"""A level of theory that can be computed: what it is called, what it refuses, how it labels one structure."""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from ase import Atoms

from mffm.errors import InputError
from mffm.fidelity import Fidelity
from mffm.frame import Frame

# `input` and `convergence` fail again on every attempt; `resource` may not with other limits, `lost` not on another
# machine.
ErrorClass = Literal["input", "convergence", "resource", "lost", "unknown"]
ERROR_CLASSES: tuple[ErrorClass, ...] = ("input", "convergence", "resource", "lost", "unknown")
HOW_TO_INSTALL = {
    "tblite": "pip install 'mffm[label]'",
    "pyscf": "pip install 'mffm[label]'",
    "gpaw": "see docs/label.md: it is compiled against libxc",
}


class NotConverged(RuntimeError):
    """A self-consistent field or an amplitude equation did not converge: its energy is worthless."""


class Inconsistent(RuntimeError):
    """A calculator labelled something else than what it was given."""


@dataclass(frozen=True)
class Label:
    """What one level says of one structure: energy in eV, forces [n_atoms, 3] in eV/Å, stress [3, 3] in eV/Å³.

    Stress has ASE's sign. ``info`` is what else is to be known: a diagnostic, a repetition.
    """

    energy: float
    forces: np.ndarray | None = None
    stress: np.ndarray | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def check(self, n_atoms: int) -> None:
        """Refuse what is no label of a structure of so many atoms.

        Raises:
            NotConverged: a value is not finite.
            Inconsistent: forces or stress of another shape.
        """
        shapes = {"energy": (), "forces": (n_atoms, 3), "stress": (3, 3)}
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value is None:
                continue
            if np.shape(value) != shape:
                raise Inconsistent(f"{name} of shape {np.shape(value)}, expected {shape}")
            if not np.all(np.isfinite(value)):
                raise NotConverged(f"the {name} is not finite")


def _nothing(frame: Frame) -> str:
    return ""


@dataclass(frozen=True)
class Level:
    """One level of theory.

    Attributes:
        fidelity: of its labels, with versions of codes and settings. The settings are the level: others are another.
        modules: what it imports.
        compute: labels a structure; raises where there is no label.
        refuse: why it cannot label a structure, or "": told before anything is computed.
        is_molecular: electrons are counted, so that charge and spin multiplicity must fit.
    """

    fidelity: Fidelity
    modules: tuple[str, ...]
    compute: Callable[[Frame], Label]
    refuse: Callable[[Frame], str] = _nothing
    is_molecular: bool = True

    def fault(self, frame: Frame) -> str:
        """Return why a structure cannot be labelled at this level, or ""."""
        return (spin_fault(frame) if self.is_molecular else "") or self.refuse(frame)


def spin_fault(frame: Frame) -> str:
    """Return why charge and spin multiplicity do not say what the electrons of a structure do, or "".

    Codes differ here: one silently takes another multiplicity, so none is asked.
    """
    charge, multiplicity = frame.charge or 0, frame.spin_multiplicity
    n = int(frame.atomic_numbers.astype(int).sum()) - charge
    if n < 0:
        return f"charge {charge:+d} leaves {n} electrons"
    if multiplicity is None:
        if charge:
            return f"charge {charge:+d} without a spin multiplicity; give both (multiplicity 1: closed shell)"
        if n % 2:
            return f"{n} electrons, an odd number, are charged or open-shell; give charge and spin multiplicity"
        return ""
    if (n - multiplicity) % 2 == 0 or multiplicity - 1 > n:
        return f"spin multiplicity {multiplicity} is impossible with {n} electrons (charge {charge:+d})"
    return ""


def atoms_of(frame: Frame) -> Atoms:
    """Return a structure for ASE, with charge and spin multiplicity in its info where they are given."""
    info = {"charge": frame.charge, "spin_multiplicity": frame.spin_multiplicity}
    return Atoms(
        frame.atomic_numbers,
        frame.positions,
        cell=frame.cell,
        pbc=frame.pbc,
        info={key: value for key, value in info.items() if value is not None},
    )


def versions(modules: Iterable[str]) -> dict[str, str]:
    """Return the versions of the packages of ``modules`` without importing these.

    Raises:
        InputError: a package is not installed.
    """
    found = {}
    for module in modules:
        package = module.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            remedy = HOW_TO_INSTALL.get(package, f"pip install {package}, where that is its name")
            raise InputError(f"{package} is not installed; {remedy}")
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "of unknown version"
    return found


def import_all(modules: Iterable[str]) -> None:
    """Import modules, so that start-up belongs to no label's cost.

    Raises:
        InputError: one cannot be imported.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            package = module.partition(".")[0]
            remedy = HOW_TO_INSTALL.get(package, "install it")
            raise InputError(f"{module} cannot be imported ({error}); {remedy}") from error


def classify(error: BaseException) -> ErrorClass:
    """Return the error class of a failure."""
    text = f"{type(error).__name__} {error}".lower()
    if isinstance(error, MemoryError) or "out of memory" in text or "cannot allocate" in text:
        return "resource"
    if isinstance(error, BrokenProcessPool):
        return "lost"
    if isinstance(error, InputError):
        return "input"
    if isinstance(error, NotConverged) or "converge" in text or "convergence" in text:
        return "convergence"
    return "unknown"
