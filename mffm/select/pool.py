"""Structures to choose from, and those that are labelled already: from stores and from files that ASE reads."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from ase import Atoms
from ase.symbols import Symbols

from mffm.data.identity import lookup_keys, same_geometry
from mffm.data.records import Geometry
from mffm.data.store import NO_CHARGE, Store
from mffm.deploy.at_fidelity import charge_and_spin, geometry
from mffm.deploy.predict import read_frames
from mffm.errors import InputError, known
from mffm.release import sha256

PLACE = "place"  # key of a chosen structure that says where it came from

Progress = Callable[[int], None]


class Structure(NamedTuple):
    """Geometry, charge in e and spin multiplicity, 0 where it is not given."""

    geometry: Geometry
    charge: int
    spin: int

    @property
    def formula(self) -> str:
        """In Hill's order."""
        return _formula(np.sort(self.geometry[0]).tobytes())

    def atoms(self) -> Atoms:
        numbers, positions, cell, pbc = self.geometry
        info = {"charge": self.charge, "spin_multiplicity": self.spin}
        return Atoms(numbers, positions, cell=cell, pbc=pbc, info={k: v for k, v in info.items() if v})


@lru_cache(maxsize=1 << 16)
def _formula(numbers: bytes) -> str:
    return Symbols(np.frombuffer(numbers, np.uint8).astype(int)).get_chemical_formula(mode="hill")


class Origin(Protocol):
    """Where structures come from; they have an order."""

    def __iter__(self) -> Iterator[Structure]: ...

    def place(self, index: int) -> str:
        """Return where a structure is, for people."""
        ...

    def take(self, indices: Sequence[int]) -> list[Atoms]:
        """Return structures with all that the origin says of them, in the order asked for."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what says that it is the same again, as JSON."""
        ...


class File:
    """A file that ASE reads."""

    def __init__(self, path: Path):
        self.path = path

    def __iter__(self) -> Iterator[Structure]:
        for index, atoms in enumerate(read_frames(self.path)):
            if len(atoms) == 0:
                raise InputError(f"{self.place(index)}: the structure has no atoms; remove it from the file")
            try:
                charge, spin = charge_and_spin(atoms)
            except InputError as error:
                raise InputError(f"{self.place(index)}: {error}") from error
            numbers, positions, cell, pbc = geometry(atoms)
            yield Structure((numbers.astype(np.uint8), positions, cell, pbc), charge, spin)

    def place(self, index: int) -> str:
        return f"{self.path}: frame {index}"

    def take(self, indices: Sequence[int]) -> list[Atoms]:
        wanted, last = set(indices), max(indices)
        found = {}
        for index, atoms in enumerate(read_frames(self.path)):
            if index in wanted:
                found[index] = atoms
            if index == last:
                break
        return [found[index] for index in indices]

    def describe(self) -> dict[str, Any]:
        return {"path": str(self.path), "sha256": sha256(self.path)}


class Rows:
    """Rows of a store."""

    def __init__(self, store: Store, rows: np.ndarray):
        self.store, self.rows = store, rows

    def __iter__(self) -> Iterator[Structure]:
        for row in self.rows.tolist():
            charge = int(self.store.charge[row])
            yield Structure(
                self.store.geometry(row), 0 if charge == NO_CHARGE else charge, int(self.store.spin_multiplicity[row])
            )

    def place(self, index: int) -> str:
        row = int(self.rows[index])
        return f"{self.store.path}: row {row} ({self.store.frame_id(row)})"

    def take(self, indices: Sequence[int]) -> list[Atoms]:
        found = []
        for row in self.rows[list(indices)].tolist():
            frame = self.store.frame(row)
            given = {"charge": frame.charge, "spin_multiplicity": frame.spin_multiplicity, "group": frame.group or None}
            info = {"frame_id": frame.frame_id, **{k: v for k, v in given.items() if v is not None}}
            found.append(Atoms(frame.atomic_numbers, frame.positions, cell=frame.cell, pbc=frame.pbc, info=info))
        return found

    def describe(self) -> dict[str, Any]:
        return {"path": str(self.store.path), "fingerprint": self.store.fingerprint, "rows": self.rows.tolist()}


class Structures:
    """Several origins, one behind the other, read once into memory: about 0.7 kB and 25 bytes an atom a structure.

    Geometries of a store stay in its files.
    """

    def __init__(self, origins: Sequence[Origin], progress: Progress = lambda n: None):
        self.origins = list(origins)
        self.all: list[Structure] = []
        self.ends: list[int] = []
        for origin in self.origins:
            for structure in origin:
                self.all.append(structure)
                progress(len(self.all))
            self.ends.append(len(self.all))

    def _find(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self.ends, index, "right"))
        return part, index - (self.ends[part - 1] if part else 0)

    def place(self, index: int) -> str:
        part, local = self._find(index)
        return self.origins[part].place(local)

    def take(self, indices: Sequence[int]) -> list[Atoms]:
        """Return structures as their origin has them, with their place."""
        found: dict[int, Atoms] = {}
        for part, origin in enumerate(self.origins):
            own = [(i, local) for i in indices for where, local in [self._find(i)] if where == part]
            if own:
                found |= zip((i for i, _ in own), origin.take([local for _, local in own]), strict=True)
        for index, atoms in found.items():
            atoms.info[PLACE] = self.place(index)
        return [found[index] for index in indices]

    def describe(self) -> list[dict[str, Any]]:
        return [origin.describe() for origin in self.origins]


def pool_origin(path: Path, split: str, level: str | None, without: Sequence[int] = ()) -> Origin:
    """Return what may be chosen: a file, or the rows of a store's split ("all": of any).

    Args:
        level: rows with a label of it are no candidates; None: every row is one.
        without: rows that are no candidates either.

    Raises:
        InputError: nothing there, an unknown split or level, or no rows.
    """
    if not path.is_dir():
        return _file(path)
    store = Store(path)
    rows = store.rows(split=None if split == "all" else split)
    rows = np.setdiff1d(rows, np.asarray(without, np.int64))
    if level is not None:
        rows = np.setdiff1d(rows, store.rows(fidelity=level))
    if not len(rows):
        left = "" if level is None else f" without a label of {level!r}"
        raise InputError(f"{path}: no structures{left} in split {split!r}; splits: {known(store.split_names)}, all")
    return Rows(store, rows)


def labelled_origin(path: Path, level: str | None) -> Origin:
    """Return what is labelled already: a file, or the rows of a store with a label of ``level``, of any where None."""
    if not path.is_dir():
        return _file(path)
    store = Store(path)
    return Rows(store, store.rows() if level is None else store.rows(fidelity=level))


def _file(path: Path) -> File:
    if not path.is_file():
        raise InputError(f"{path}: no such file or store")
    return File(path)


def first_of_each(pool: Sequence[Structure], labelled: Sequence[Structure]) -> np.ndarray:
    """Return for each structure of the pool which is the same before it. [n] int64

    -1 none; -2 a labelled one; otherwise the index of the first of the pool. The same: within 1e-3 Å
    (``mffm.data.identity``), with the same charge and spin.
    """
    filed: dict[tuple[bytes, int, int], list[tuple[int, Geometry]]] = {}
    for one in labelled:
        filed.setdefault((lookup_keys(*one.geometry)[0], one.charge, one.spin), []).append((-2, one.geometry))
    same = np.full(len(pool), -1, np.int64)
    for i, one in enumerate(pool):
        keys = lookup_keys(*one.geometry)
        for key in keys:
            others = filed.get((key, one.charge, one.spin), ())
            found = next((which for which, other in others if same_geometry(other, one.geometry)), None)
            if found is not None:
                same[i] = found
                break
        else:
            filed.setdefault((keys[0], one.charge, one.spin), []).append((i, one.geometry))
    return same
