"""VASP's vasprun.xml, as a stream: every ionic step with its energies, forces and stress, as VASP prints them.

``e_0_energy`` (extrapolated to no smearing), ``e_wo_entrp``, ``e_fr_energy`` (whose gradient the forces are) in eV,
``forces`` in eV/Å, ``stress`` in kbar with pressure's sign. A step whose electronic loop took NELM steps is not
converged and is rejected; one that was cut short, too. OUTCAR and the rest of VASP are read by the ``ase`` reader.
"""

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers

from mffm.data.readers import plain
from mffm.data.readers.chunk import Chunk
from mffm.data.readers.convert import Wanted
from mffm.data.readers.plain import Plain, Unreadable
from mffm.errors import InputError

parse = plain.parse

ENERGIES = ("e_0_energy", "e_wo_entrp", "e_fr_energy")


def chunks(path: Path, want: Wanted, start: int = 0, first: int = 0) -> Iterator[Chunk]:
    """Yield the ionic steps of a file some at a time; the first ``start`` are read again and passed over."""
    del first, want
    try:
        yield from plain.chunked(path, _frames(path), start)
    except plain.DAMAGED as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())[:120]})") from error


def _frames(path: Path) -> Iterator[Plain | Unreadable]:
    numbers: np.ndarray | None = None
    electronic = 0  # NELM
    depth = n = 0
    with plain.open_binary(path) as file:
        try:
            for event, element in ElementTree.iterparse(file, events=("start", "end")):
                depth += 1 if event == "start" else -1
                if event == "start":
                    continue
                if element.tag == "i" and element.get("name") == "NELM":
                    electronic = int(_text(element))
                elif element.tag == "atominfo":
                    numbers = _numbers(element)
                elif element.tag == "calculation":
                    n += 1
                    yield _step(element, numbers, electronic, n)
                if depth == 1:  # a whole part of the file is done with
                    element.clear()
        except ElementTree.ParseError as error:
            if n == 0 and depth == 0:
                raise InputError(f"{path}: not readable as vasprun.xml ({error})") from error
            fault = f"the file is damaged or cut short after {n} ionic steps ({error})"
            yield from [Unreadable(fault)] * max(_begun(path) - n, 1)
        except (ValueError, TypeError, KeyError, LookupError) as error:
            raise InputError(f"{path}: not a vasprun.xml as VASP writes it ({error})") from error
    if n == 0 and depth == 0:
        raise InputError(f"{path}: no ionic step; the calculation ended before the first one")


def _begun(path: Path) -> int:
    """Return how many ionic steps a file has the beginning of."""
    n = 0
    with plain.open_binary(path) as file:
        try:
            for line in file:
                n += line.count(b"<calculation>")
        except plain.DAMAGED:  # a packed file that was cut: what is whole of it was counted
            pass
    return n


def _text(element: Any) -> str:
    return (element.text or "").strip()


def _numbers(atominfo: Any) -> np.ndarray:
    symbols = [_text(row[0]) for row in atominfo.iterfind("array[@name='atoms']/set/rc")]
    return np.array([atomic_numbers[symbol] for symbol in symbols], np.int64)


def _array(parent: Any, name: str) -> np.ndarray | None:
    found = parent.find(f"varray[@name='{name}']")
    return None if found is None else np.array([_text(row).split() for row in found], np.float64)


def _step(element: Any, numbers: np.ndarray | None, electronic: int, n: int) -> Plain | Unreadable:
    """Return one ionic step, the ``n``-th of the file."""
    if numbers is None:
        return Unreadable(f"step {n}: the file does not name its atoms (atominfo)")
    n_electronic = len(element.findall("scstep"))
    if electronic and n_electronic >= electronic:
        return Unreadable(f"step {n}: the electronic loop did not converge in NELM = {electronic} steps")
    try:
        structure = element.find("structure")
        cell, fractional = _array(structure.find("crystal"), "basis"), _array(structure, "positions")
        forces, stress = _array(element, "forces"), _array(element, "stress")
        energies = {name: _energy(element, name) for name in ENERGIES}
    except (AttributeError, ValueError) as error:
        return Unreadable(f"step {n}: {error}")
    if cell is None or fractional is None or cell.shape != (3, 3) or fractional.shape != (len(numbers), 3):
        return Unreadable(f"step {n}: no cell and positions of {len(numbers)} atoms")
    info: dict[str, Any] = {name: value for name, value in energies.items() if value is not None}
    if stress is not None:
        info["stress"] = stress
    info |= {"step": n, "n_electronic": n_electronic}
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is rejected with its value
        positions = fractional @ cell
    return Plain(numbers, positions, cell, np.ones(3, bool), info, {} if forces is None else {"forces": forces})


def _energy(element: Any, name: str) -> float | None:
    """Return one energy of the step itself; its electronic steps have their own further in."""
    found = element.find(f"energy/i[@name='{name}']")
    return None if found is None else float(_text(found))
