"""HDF5 of molecules: ANI-1x, SPICE, QM7-X, Transition1x, COMP6 and others with a group per molecule.

A group that has positions ([frames, atoms, 3], or [atoms, 3] for one frame) holds frames; atomic numbers are in it or
in a group above. Its other datasets are the frames' values: one a frame where they are as long as the positions, else
the same for all. ``group`` is the path of the group, ``group_0``, ``group_1``, … its parts, ``frame`` path and index;
``smiles_charge`` the sum of the formal charges where there is a ``smiles``.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers

from mffm.config.data import Hdf5Spec
from mffm.data.readers import plain
from mffm.data.readers.chunk import CHUNK_FRAMES, Chunk
from mffm.data.readers.convert import Wanted
from mffm.data.readers.plain import Plain, Unreadable
from mffm.errors import InputError, known
from mffm.keys import ENERGY

parse = plain.parse

POSITIONS = ("coordinates", "conformations", "positions", "atXYZ", "coords", "geometry", "xyz", "R")
NUMBERS = ("atomic_numbers", "atNUM", "species", "numbers", "elements", "Z", "z")
_NO_POSITIONS = "no positions"
_MOST_PACKED = 2000  # how much larger than the file a dataset may be: deflate packs 1032 to 1
_CHARGE = re.compile(r"\[[^\]]*?(\++|-+)(\d*)(?::\d+)?\]")  # of an atom in brackets, e.g. [O-:3], [Ca+2]


def chunks(path: Path, want: Wanted, start: int = 0, first: int = 0) -> Iterator[Chunk]:
    """Yield the frames of a file some at a time, groups by name; the first ``start`` are passed over."""
    del first
    try:
        import h5py
    except ImportError as error:
        raise InputError(f"{path}: HDF5 needs the h5py package; pip install 'mffm[hdf5]'") from error
    try:
        with h5py.File(path, "r") as file:
            yield from plain.chunked(path, _frames(path, file, want), start)
    except InputError:
        raise
    except Exception as error:  # damage shows as OSError, KeyError, RuntimeError, ValueError and others
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: not readable as HDF5 ({type(error).__name__}: {reason})") from error


def _frames(path: Path, file: Any, want: Wanted) -> Iterator[Plain | Unreadable]:
    spec = want.hdf5
    missing = [name for name in spec.groups or () if name not in file]
    if missing:
        raise InputError(f"{path}: no group {missing[0]!r} (hdf5.groups); groups: {known(list(file)[:20])}")
    found = False
    for frame in _walk(file, [], None, want, spec):
        found = found or not (isinstance(frame, Unreadable) and _NO_POSITIONS in frame.reason)
        yield frame
    if not found:
        raise InputError(
            f"{path}: no group has positions, by the name {spec.positions or ' or '.join(POSITIONS)}; "
            f"give hdf5.positions; the first names: {known(_names(file))}"
        )


def _names(file: Any) -> list[str]:
    names: list[str] = []
    file.visit(lambda name: names.append(name) if len(names) < 20 else True)
    return names


def _walk(group: Any, parts: list[str], numbers: Any, want: Wanted, spec: Hdf5Spec) -> Iterator[Plain | Unreadable]:
    import h5py

    names = sorted(group)
    if not parts and spec.groups is not None:
        names = spec.groups
    datasets: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for name in names:
        member = group.get(name)
        if isinstance(member, h5py.Dataset) and member.nbytes > _MOST_PACKED * group.file.id.get_filesize():
            raise InputError(f"{group.file.filename}: {member.name}: shape {list(member.shape)}; the file is damaged")
        if member is None and isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise InputError(f"{group.file.filename}: {'/'.join([*parts, name])}: not readable; the file is damaged")
        if member is None:
            yield Unreadable(f"{'/'.join([*parts, name])}: a link to something that is not in the file")
        else:
            (groups if isinstance(member, h5py.Group) else datasets)[name] = member
    numbers = next((datasets[n] for n in _either(spec.numbers, NUMBERS) if n in datasets), numbers)
    positions = next((n for n in _either(spec.positions, POSITIONS) if n in datasets), None)
    if positions is not None:
        yield from _molecule(parts, datasets, positions, numbers, want)
    elif any(spec.key in datasets for _, _, spec, _ in want.labels):
        fault = f"{'/'.join(parts) or '/'}: {_NO_POSITIONS} among {', '.join(sorted(datasets)[:12])}"
        yield from [Unreadable(fault)] * max(_n_energies(datasets, want), 1)
    for name, member in groups.items():
        yield from _walk(member, [*parts, name], numbers, want, spec)


def _either(name: str | None, usual: tuple[str, ...]) -> tuple[str, ...]:
    return usual if name is None else (name,)


def _n_energies(datasets: dict[str, Any], want: Wanted) -> int:
    """Return how many frames a group has energies of; 0 where none says."""
    keys = [spec.key for _, prop, spec, _ in want.labels if prop == ENERGY]
    return max((len(datasets[key]) for key in keys if key in datasets and datasets[key].shape), default=0)


def _molecule(
    parts: list[str], datasets: dict[str, Any], key: str, numbers: Any, want: Wanted
) -> Iterator[Plain | Unreadable]:
    """Yield the frames of one group, some read at a time."""
    place = "/".join(parts) or "/"
    positions = datasets[key]
    shape = tuple(positions.shape or ())
    single = len(shape) == 2
    n_frames = 1 if single else shape[0] if shape else 1
    n_energies = _n_energies(datasets, want)
    if len(shape) not in (2, 3) or shape[-1] != 3 or positions.dtype.kind not in "fiu":
        fault = f"{place}: {key} has shape {list(shape)} of {positions.dtype}, expected [frames, atoms, 3]"
        yield from [Unreadable(fault)] * max(n_frames, n_energies)
        return
    fault = "" if numbers is not None else "no atomic numbers here or in a group above"
    every = None
    if numbers is not None:
        try:
            every = _numbers(numbers[()])
        except ValueError as error:
            fault = str(error)
    n_atoms = shape[-2]
    if every is not None and every.shape not in ((n_atoms,), (n_frames, n_atoms)):
        fault = f"atomic numbers of shape {list(every.shape)} for positions of {list(shape)}"
    if n_energies not in (0, n_frames):
        fault = f"{n_frames} frames of positions, {n_energies} of energies"
    if every is None or fault:
        yield from [Unreadable(f"{place}: {fault}")] * max(n_frames, n_energies)
        return
    about: dict[str, Any] = {"group": place} | {f"group_{k}": part for k, part in enumerate(parts)}
    values = {name: d for name, d in datasets.items() if d is not positions and want.takes(name)}
    about |= {name: None for name in datasets if name not in values and name != key}
    if "smiles" in datasets:
        about["smiles_charge"] = _formal_charge(_text(datasets["smiles"][()]))
    for begin in range(0, n_frames, CHUNK_FRAMES):
        rows = slice(begin, min(begin + CHUNK_FRAMES, n_frames))
        some = positions[()][None] if single else positions[rows]
        parted = {n: d[rows] for n, d in values.items() if not single and d.shape and d.shape[0] == n_frames}
        same = {n: d[()] for n, d in values.items() if n not in parted}
        for i, xyz in enumerate(some):
            info: dict[str, Any] = {**about, "frame": f"{place}/{begin + i}"}
            arrays: dict[str, Any] = {}
            for name, value in (*same.items(), *((n, v[i]) for n, v in parted.items())):
                value = _value(value)
                (arrays if np.shape(value) == (n_atoms, 3) else info)[name] = value
            yield Plain(every if every.ndim == 1 else every[begin + i], xyz, None, np.zeros(3, bool), info, arrays)


def _numbers(value: Any) -> np.ndarray:
    """Return atomic numbers from numbers or symbols.

    Raises:
        ValueError: they are neither.
    """
    array = np.asarray(value)
    if array.dtype.kind in "SOU":
        symbols = [_text(s) for s in array.ravel()]
        unknown = next((s for s in symbols if s not in atomic_numbers), None)
        if unknown is not None:
            raise ValueError(f"element {unknown!r} is outside the table 1..118")
        return np.array([atomic_numbers[s] for s in symbols]).reshape(array.shape)
    if array.dtype.kind not in "iuf" or (array.dtype.kind == "f" and not np.all(array == np.rint(array))):
        raise ValueError(f"atomic numbers are {array.dtype}, not whole numbers or symbols")
    array = array.astype(np.int64)
    return array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array


def _text(value: Any) -> str:
    while isinstance(value, np.ndarray | list | tuple) and len(np.atleast_1d(value)):
        value = np.atleast_1d(value)[0]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _value(value: Any) -> Any:
    """A number or text as such where a dataset holds it as an array of one."""
    if isinstance(value, bytes) or (isinstance(value, np.ndarray) and value.dtype.kind in "SO"):
        return _text(value) if np.size(value) == 1 else [_text(v) for v in np.ravel(value)]
    return value


def _formal_charge(smiles: str) -> int:
    """Return the sum of the charges of the atoms in brackets."""
    total = 0
    for signs, count in _CHARGE.findall(smiles):
        total += (1 if signs[0] == "+" else -1) * (int(count) if count else len(signs))
    return total
