"""DeePMD-kit's systems (``deepmd/npy`` and ``deepmd/npy/mixed`` of dpdata): a folder with ``type.raw``,
``type_map.raw``, perhaps ``nopbc``, and sets ``set.*`` of ``coord.npy`` [frames, 3 n], ``box.npy`` [frames, 9],
``energy.npy`` [frames], ``force.npy`` [frames, 3 n], ``virial.npy`` [frames, 9].

The file of a system is its ``type.raw``. Å, eV, eV/Å; the virial is in eV with pressure's sign: minus stress times
volume. Every other .npy of a set with a value a frame is a value of the frame (``spin.npy``, ``fparam.npy``).
"""

import tokenize
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


def companions(path: Path) -> list[Path]:
    """Return the other files of the system: what its frames depend on."""
    folder = path.parent
    raw = [p for p in (folder / "type_map.raw", folder / "nopbc") if p.is_file()]
    return [*raw, *sorted(folder.glob("set.*/*.npy"))]


def chunks(path: Path, want: Wanted, start: int = 0, first: int = 0) -> Iterator[Chunk]:
    """Yield the frames of a system some at a time, set by set; the first ``start`` are passed over."""
    del first
    yield from plain.chunked(path, _frames(path, want), start)


def _frames(path: Path, want: Wanted) -> Iterator[Plain | Unreadable]:
    folder = path.parent
    kinds = _kinds(folder)
    types = _types(path)
    sets = sorted(p for p in folder.glob("set.*") if p.is_dir())
    if not sets:
        raise InputError(f"{folder}: no set.* beside type.raw; not a system of deepmd/npy")
    for part in sets:
        yield from _set(part, types, kinds, (folder / "nopbc").exists(), want)


def _kinds(folder: Path) -> np.ndarray:
    """Return the atomic numbers of the types, 0 for a name that is no element."""
    path = folder / "type_map.raw"
    if not path.is_file():
        raise InputError(f"{path}: no such file; it names the elements of the types in type.raw, one a line")
    names = path.read_text(encoding="utf-8", errors="replace").split()
    unknown = next((name for name in names if name not in atomic_numbers), None)
    if not names or unknown is not None:
        raise InputError(
            f"{path}: {'empty' if not names else f'{unknown!r} is no element'}; expected symbols, one a line"
        )
    return np.array([atomic_numbers[name] for name in names])


def _types(path: Path) -> np.ndarray:
    try:
        return np.array([int(word) for word in path.read_text(encoding="utf-8", errors="replace").split()], np.int64)
    except (ValueError, OverflowError) as error:
        raise InputError(f"{path}: expected whole numbers, one an atom ({error})") from error


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError, MemoryError, OverflowError) as error:
        raise InputError(f"{path}: not readable as a .npy file ({' '.join(str(error).split())[:120]})") from error


def _set(folder: Path, types: np.ndarray, kinds: np.ndarray, nopbc: bool, want: Wanted) -> Iterator[Plain | Unreadable]:
    """Yield the frames of one set.

    Raises:
        InputError: arrays that are missing or have no shape that fits the others.
    """
    files = {p.stem: p for p in sorted(folder.glob("*.npy"))}
    if "coord" not in files:
        raise InputError(f"{folder}: no coord.npy")
    coord = _load(files["coord"])
    if coord.ndim < 2 or coord.dtype.kind not in "fiu" or coord.size != len(coord) * 3 * len(types):
        raise InputError(
            f"{files['coord']}: shape {list(coord.shape)} of {coord.dtype}, expected [frames, {3 * len(types)}] for "
            f"the {len(types)} atoms of type.raw"
        )
    n = len(coord)
    box = None if nopbc else _values(files, "box", n)
    if not nopbc and (box is None or box.size != 9 * n):
        fault = "is missing" if box is None else f"has shape {list(box.shape)}"
        raise InputError(
            f"{folder}: box.npy {fault}, expected [{n}, 9]; a file nopbc beside type.raw says that there is no cell"
        )
    mixed = _values(files, "real_atom_types", n)
    if mixed is not None and (mixed.size != n * len(types) or mixed.dtype.kind not in "iu"):
        raise InputError(f"{files['real_atom_types']}: shape {list(mixed.shape)}, expected [{n}, {len(types)}]")
    taken = {name: _values(files, name, n) for name in files if want.takes(name) and name != "coord"}
    about: dict[str, Any] = {name: None for name in files if name not in taken}
    about |= {"system": folder.parent.name, "set": folder.name}
    for i in range(n):
        kind = types if mixed is None else mixed[i].ravel()
        if (kind < -1).any() or (kind >= len(kinds)).any():
            yield Unreadable(f"{folder.name}: type {int(kind.max())} of an atom; type_map.raw has {len(kinds)}")
            continue
        real = kind >= 0  # mixed systems are padded with -1
        info: dict[str, Any] = {**about, "frame": f"{folder.parent.name}/{folder.name}/{i}"}
        arrays: dict[str, Any] = {}
        for name, values in taken.items():
            assert values is not None
            value = values[i]
            if value.size == 3 * len(types) and (name in want.array_keys or len(types) != 3):
                arrays[name] = value.reshape(-1, 3)[real]
            elif value.shape == (len(types),) and name in want.array_keys:
                arrays[name] = value[real]
            else:
                info[name] = value
        cell = None if box is None else box[i].reshape(3, 3)
        yield Plain(kinds[kind[real]], coord[i].reshape(-1, 3)[real], cell, np.full(3, not nopbc), info, arrays)


def _values(files: dict[str, Path], name: str, n: int) -> np.ndarray | None:
    """Return an array with a value for each of ``n`` frames, or None where there is no such file."""
    if name not in files:
        return None
    array = _load(files[name])
    if array.ndim == 0 or len(array) != n:
        raise InputError(f"{files[name]}: shape {list(array.shape)}, but coord.npy has {n} frames")
    return array
