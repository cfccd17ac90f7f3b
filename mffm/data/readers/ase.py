"""Anything that ``ase.io.iread`` reads: VASP, Gaussian, ORCA, GPAW, trajectories, JSON.

A label key is looked for in ``atoms.info``, then ``atoms.arrays``, then in the results of the calculator that ASE
attaches.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mffm.data.readers import plain
from mffm.data.readers.chunk import Chunk
from mffm.data.readers.convert import Wanted
from mffm.data.readers.plain import Plain
from mffm.errors import InputError

if TYPE_CHECKING:
    from ase import Atoms

parse = plain.parse


def _plain(atoms: Any) -> Plain:
    info = dict(atoms.info)
    arrays = {k: v for k, v in atoms.arrays.items() if k not in ("numbers", "positions")}
    for name, value in (getattr(atoms.calc, "results", None) or {}).items():
        if value is not None:
            (
                arrays if np.ndim(value) == 2 and len(value) == len(atoms) and np.shape(value) != (3, 3) else info
            ).setdefault(name, value)
    if "forces" in info and np.shape(info["forces"]) == (len(atoms), 3):
        arrays.setdefault("forces", info.pop("forces"))
    return Plain(atoms.numbers, atoms.positions, np.asarray(atoms.cell), atoms.pbc, info, arrays)


def chunks(path: Path, want: Wanted, start: int = 0, first: int = 0) -> Iterator[Chunk]:
    """Yield frames some at a time; ``start`` frames are read again and passed over."""
    del want, first
    yield from plain.chunked(path, _frames(path), start)


def _frames(path: Path) -> Iterator[Plain]:
    from ase.io import iread

    index = 0
    try:
        for index, atoms in enumerate(iread(str(path), index=":"), 1):  # noqa: B007 (told in the message)
            yield _plain(atoms)
    except Exception as error:  # ASE's formats raise anything
        raise InputError(
            f"{path}: ASE cannot read frame {index} ({type(error).__name__}: {' '.join(str(error).split())[:200]}); "
            "name another `reader`, or repair the file"
        ) from error


def structures_of(path: Path) -> "Iterator[Atoms]":
    """Yield the structures of a file that ASE reads, as ASE has them.

    Raises:
        InputError: there is no such file, or ASE cannot read it.
    """
    from ase.io import iread

    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        yield from iread(str(path), ":")
    except Exception as error:  # ASE's formats raise anything
        raise InputError(
            f"{path}: ASE cannot read it ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from error
