"""What a study judges beside the errors on its store's splits: structures of a file, and energies of a potential."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from ase import Atoms
from ase.io import iread
from ase.io.formats import UnknownFileTypeError

from mffm.config.recipe import Recipe
from mffm.config.study import CellsConfig
from mffm.data.checks import same_structures
from mffm.data.loader import pack
from mffm.data.records import Geometry
from mffm.data.store import Store
from mffm.errors import InputError, known
from mffm.release import Loaded

Energies = Callable[[Sequence[Geometry]], np.ndarray]  # structures → energies [n] without element references, eV
Results = Mapping[str, Mapping[int, Mapping[int, Any]]]  # method → labels → seed → what a judge found
BATCH = 16  # structures at a time


class Judge(Protocol):
    """Judges the potential of each finished cell; results are kept, and are taken again when ``digest`` changes."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str:
        """Of what decides a result besides the weights."""

    def judge(self, energies: Energies) -> dict[str, Any]:
        """Return what is kept of one cell, as JSON."""

    def summarise(self, results: Results) -> dict[str, Any]:
        """Return what the report says, as JSON."""


def energies_of(loaded: Loaded, asked: str) -> Energies:
    """Return the energies of a potential at a fidelity.

    Element references are left out: they need labels of every element, and cancel in all that is asked here.
    """
    index, cutoff = loaded.fidelities.index(asked), loaded.spec.model.backbone.cutoff

    def energies(structures: Sequence[Geometry]) -> np.ndarray:
        found = []
        for start in range(0, len(structures), BATCH):
            part = structures[start : start + BATCH]
            found.append(loaded.potential(pack(part, [index] * len(part), cutoff), forces=False).energy.double())
        return np.concatenate([e.numpy() for e in found])

    return energies


def geometry(atoms: Atoms, scale: float = 1.0) -> Geometry:
    """Return a structure as potentials take it, all lengths times ``scale``."""
    positions, cell = atoms.get_positions() * scale, np.asarray(atoms.cell.array) * scale
    return atoms.numbers.astype(np.uint8), positions, cell, np.asarray(atoms.pbc, bool)


def read_groups(config: CellsConfig, base: Path, place: str) -> tuple[Path, dict[str, list[Atoms]]]:
    """Return the path and the structures of a file by group, in its order.

    Args:
        base: folder that ``config.file`` starts from.
        place: key of the study YAML, for messages.

    Raises:
        InputError: no such file, not one that ASE reads, no structure left, a key that none has, unknown groups.
    """
    path = base / config.file
    if not path.is_file():
        raise InputError(f"{place}.file: {path}: no such file")
    try:
        frames = list(iread(path, ":"))
    except (UnknownFileTypeError, ValueError, KeyError) as error:
        raise InputError(f"{place}.file: {path}: ASE cannot read it ({error})") from error
    if config.where is not None:
        frames = [f for f in frames if value(f, config.where, path, f"{place}.where")]
    groups: dict[str, list[Atoms]] = {}
    for frame in frames:
        groups.setdefault(str(value(frame, config.group, path, f"{place}.group")), []).append(frame)
    if not groups:
        raise InputError(f"{place}: {path} has no structure where {config.where} is true")
    unknown = next((g for g in config.uncovered if g not in groups), None)
    if unknown is not None:
        raise InputError(f"{place}.uncovered: no group {unknown!r} in {path}; groups: {known(groups)}")
    return path, groups


def value(frame: Atoms, key: str, path: Path, place: str) -> Any:
    """Return an info value of a structure.

    Raises:
        InputError: it has none.
    """
    if key not in frame.info:
        raise InputError(
            f"{place}: a structure of {path} ({frame.get_chemical_formula()}) has no info key {key!r}; keys: "
            f"{known(frame.info)}"
        )
    return frame.info[key]


def require_untrained(frames: Iterable[Atoms], store: Store, recipes: Iterable[Recipe], place: str) -> None:
    """Refuse structures that a training or its validation reads, at any fidelity.

    Raises:
        InputError: one of the frames is in such a split.
    """
    listed = list(frames)
    splits = {p.split for r in recipes for p in r.data.plan.pools} | {r.data.validation_split for r in recipes}
    rows = np.flatnonzero(np.isin(store.split, [store.split_index(s) for s in splits]))
    same = same_structures(map(geometry, listed), (store.geometry(int(row)) for row in rows))
    if same:
        frame, row = listed[same[0][0]], int(rows[same[0][1]])
        raise InputError(
            f"{place}: {len(same)} of the structures to be judged are in a split that trainings read, first "
            f"{frame.info.get('frame_id', frame.get_chemical_formula())} in {store.split_names[store.split[row]]!r}; "
            "hold them out in the data YAML"
        )
