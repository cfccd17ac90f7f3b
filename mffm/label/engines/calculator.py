"""Any ASE calculator, made anew for each structure by a function that a module has."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from ase.stress import voigt_6_to_full_3x3_stress

from mffm.errors import InputError
from mffm.frame import Frame
from mffm.label.level import Label, NotConverged, atoms_of


def factory_of(place: str) -> Callable[[], Any]:
    """Return the function or class ``package.module:name`` that makes a calculator without arguments.

    Raises:
        InputError: there is none.
    """
    module, colon, name = place.partition(":")
    if not colon or not module or not name:
        raise InputError(f"level 'ase:{place}': expected ase:package.module:factory, e.g. ase:ase.calculators.emt:EMT")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise InputError(f"level 'ase:{place}': {module} cannot be imported ({error}); install it") from error
    if not callable(found):
        raise InputError(f"level 'ase:{place}': {module} has no function {name!r} that makes a calculator")
    return found


def made_by(factory: Callable[[], Any], place: str) -> Any:
    """Return a new calculator.

    Raises:
        InputError: the factory fails, or makes something else.
    """
    try:
        calculator = factory()
    except Exception as error:  # somebody else's function
        raise InputError(f"level 'ase:{place}': {type(error).__name__}: {error}") from error
    if not hasattr(calculator, "get_property") or "energy" not in calculator.implemented_properties:
        raise InputError(f"level 'ase:{place}': made {type(calculator).__name__}, no ASE calculator with an energy")
    return calculator


def settings(calculator: Any) -> str:
    """Return the parameters of a calculator as text."""
    parameters = dict(getattr(calculator, "parameters", None) or {})
    return ", ".join(f"{key}={value!r}" for key, value in sorted(parameters.items()))


def label(frame: Frame, factory: Callable[[], Any]) -> Label:
    """Label a structure with whatever of energy, forces and (with a cell) stress the calculator has.

    Charge and spin multiplicity are in ``atoms.info``; whether the calculator looks there is its own matter.
    """
    atoms = atoms_of(frame)
    calculator = factory()
    properties = [
        name
        for name in ("energy", "forces", "stress")
        if name in calculator.implemented_properties and (name != "stress" or frame.pbc.all())
    ]
    # As copies: a calculator that wraps or relaxes would label another structure.
    values = {name: np.array(calculator.get_property(name, atoms), float) for name in properties}
    converged = getattr(calculator, "converged", None)
    converged = converged() if callable(converged) else converged
    if converged is not None and not converged:
        raise NotConverged(f"{type(calculator).__name__} says that it has not converged")
    if not np.array_equal(atoms.positions, frame.positions) or not np.array_equal(atoms.cell.array, frame.cell):
        raise InputError(f"{type(calculator).__name__} moved the atoms: its labels are of another structure")
    stress = values.get("stress")
    if stress is not None and stress.shape == (6,):
        stress = voigt_6_to_full_3x3_stress(stress)
    return Label(float(values["energy"]), values.get("forces"), stress)
