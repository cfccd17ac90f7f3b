"""Anything that ``ase.io.iread`` reads: VASP, Gaussian, ORCA, GPAW, trajectories, JSON.

A label key is looked for in ``atoms.info``, then ``atoms.arrays``, then in the results of the calculator that ASE
attaches.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mffm.data.readers.chunk import CHUNK_FRAMES, Chunk, Parsed
from mffm.data.readers.convert import RejectedFrame, Wanted, build
from mffm.errors import InputError
from mffm.frame import Frame


def _plain(atoms: Any) -> tuple[Any, ...]:
    """Return what matters of an Atoms object as plain arrays and mappings (cheap to hand to another process)."""
    info = dict(atoms.info)
    arrays = {k: v for k, v in atoms.arrays.items() if k not in ("numbers", "positions")}
    for name, value in (getattr(atoms.calc, "results", None) or {}).items():
        if value is not None:
            (
                arrays if np.ndim(value) == 2 and len(value) == len(atoms) and np.shape(value) != (3, 3) else info
            ).setdefault(name, value)
    if "forces" in info and np.shape(info["forces"]) == (len(atoms), 3):
        arrays.setdefault("forces", info.pop("forces"))
    return atoms.numbers, atoms.positions, np.asarray(atoms.cell), atoms.pbc, info, arrays


def chunks(path: Path, want: Wanted, start: int = 0, first: int = 0) -> Iterator[Chunk]:
    """Yield frames some at a time; ``start`` frames are read again and passed over (formats have no common seek)."""
    del want, first
    from ase.io import iread

    frames: list[Any] = []
    index = 0
    try:
        for atoms in iread(str(path), index=":"):
            if index >= start:
                frames.append(_plain(atoms))
            index += 1
            if len(frames) == CHUNK_FRAMES:
                yield Chunk(str(path), index - len(frames), len(frames), index, frames)
                frames = []
    except InputError:
        raise
    except Exception as error:  # ASE's formats raise anything
        raise InputError(
            f"{path}: ASE cannot read frame {index} ({type(error).__name__}: {' '.join(str(error).split())[:200]}); "
            "name another `reader`, or repair the file"
        ) from error
    if frames:
        yield Chunk(str(path), index - len(frames), len(frames), index, frames)


def parse(chunk: Chunk, want: Wanted) -> Parsed:
    """Return the frames of a chunk."""
    keys: set[str] = set()
    frames: list[Frame | RejectedFrame] = []
    for i, item in enumerate(chunk.payload):
        index = chunk.first + i
        numbers, positions, cell, pbc, info, arrays = item
        keys.update(info)
        keys.update(arrays)
        frames.append(
            build(numbers, positions, cell if np.any(cell) else None, pbc, info, arrays, want, chunk.path, index)
        )
    return Parsed(frames, keys)
