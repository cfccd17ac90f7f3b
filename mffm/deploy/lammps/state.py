"""What a LAMMPS object has, checked: units, elements of types, the box, how far ghost atoms reach."""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers

from mffm.deploy.edges.model import Description
from mffm.errors import InputError, known

VOIGT = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))  # LAMMPS' order: xx yy zz xy xz yz


def numbers_of(elements: Sequence[str], description: Description) -> np.ndarray:
    """Return the atomic numbers of an element list.

    Raises:
        InputError: a symbol that is none, or that the potential does not know.
    """
    if isinstance(elements, str):
        raise InputError(f"elements {elements!r}: give a list of symbols, one an atom type: {elements.split()}")
    for symbol in elements:
        if symbol not in description.elements:
            what = "unknown to this potential" if symbol in atomic_numbers else "no element symbol"
            raise InputError(f"element {symbol!r}: {what}; known elements: {' '.join(description.elements)}")
    return np.array([atomic_numbers[symbol] for symbol in elements])


def require_types(lmp: Any, elements: Sequence[str]) -> None:
    """Refuse a LAMMPS object in other units, or with other types than the list has elements.

    Raises:
        InputError: with what is found and what to do.
    """
    units = lmp.extract_global("units")
    if units != "metal":
        raise InputError(f"LAMMPS units {units}: the potential is in eV and Å; begin the input with: units metal")
    n_types = lmp.extract_setting("ntypes")
    if n_types == 0:
        raise InputError("LAMMPS has no simulation box yet: create or read it first")
    if n_types != len(elements):
        raise InputError(
            f"{len(elements)} elements ({known(elements)}) for {n_types} atom types; give one for each type"
        )


def require_map(lmp: Any) -> None:
    """Refuse atoms that cannot be told apart by consecutive ids.

    Raises:
        InputError: naming the command.
    """
    if not lmp.extract_setting("tag_enable") or lmp.extract_setting("map_style") == 0:
        raise InputError("LAMMPS has no atom map; give, before the box is made: atom_modify map array")


def box(lmp: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return origin [3], cell [3, 3] (rows), Å, and pbc [3] of the box, which may be triclinic."""
    low, high, xy, yz, xz, periodic, _ = lmp.extract_box()
    lx, ly, lz = np.subtract(high, low)
    return np.array(low), np.array([[lx, 0, 0], [xy, ly, 0], [xz, yz, lz]]), np.array(periodic, bool)


def communication_cutoff(lmp: Any) -> float:
    """Return the cutoff of ghost atoms that LAMMPS reports between runs, Å: of comm_modify, or of the last run, or 0.

    Raises:
        InputError: it has one for each type (mode multi).
    """
    if lmp.extract_setting("comm_mode") != 0:
        raise InputError(
            "comm_modify mode multi: ghost atoms of each type reach differently; give: comm_modify mode single"
        )
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "info"
        lmp.command(f"info communication out overwrite {report}")
        found = re.search(r"ommunication cutoff\s*=\s*([-+.\deE]+)", report.read_text() if report.exists() else "")
    cutoff, comm = float(found.group(1)) if found else 0.0, communicator(lmp)
    return cutoff if comm is None else comm.bcast(cutoff)  # LAMMPS writes on rank 0


def communicator(lmp: Any) -> Any:
    """Return the communicator of LAMMPS, None for one rank.

    Raises:
        InputError: several ranks, and no mpi4py.
    """
    if lmp.extract_setting("world_size") == 1:
        return None
    found = lmp.get_mpi_comm()
    if found is None:
        raise InputError("LAMMPS runs on several ranks without mpi4py; install it: pip install 'mffm[lammps]'")
    return found


def short_shell(reach: str, needed: float, found: str) -> InputError:
    """Return the error for ghost atoms that do not reach far enough; Å."""
    return InputError(
        f"ghost atoms {found}, the potential needs {reach} and the skin of the neighbor list: give, with skin 2 Å, "
        f"comm_modify cutoff {needed + 2:g}"
    )


def reach_of(description: Description) -> str:
    """Return for messages how far an atom sees."""
    layers = f"{description.n_layers} layer{'s' * (description.n_layers > 1)}"
    return f"{layers} × {description.cutoff:g} Å = {description.reach:g} Å"
