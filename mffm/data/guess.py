"""Which keys of a file hold energy, forces and stress: a guess from names and shapes, for a data YAML to start from."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mffm.config.data import LabelSpec, SourceSpec
from mffm.data.readers import READERS, reader_name, wanted
from mffm.data.readers.convert import BadFrameError
from mffm.data.readers.extxyz import columns, parse_comment
from mffm.data.readers.plain import Unreadable
from mffm.errors import InputError, known
from mffm.keys import ENERGY, FORCES, STRESS, Property

LOOKED_AT = 512  # frames; labels that begin later are not found, and have to be named
# What an energy key's name has, and what makes it another quantity.
ENERGY_NAME = re.compile(r"energy|toten|^e_?tot|^e$|^e[_-]|[_-]e$", re.IGNORECASE)
NO_TOTAL_ENERGY = re.compile(
    r"per_?atom|/atom|isolated|kinetic|formation|atomi[sz]ation|cohesive|hull|interaction|binding|error|weight|std|sigma|var"
    r"|correction|zpe|gap|homo|lumo|disp",
    re.IGNORECASE,
)
FORCES_NAME = re.compile(r"force|grad|^f$|^f[_-]|[_-]f$", re.IGNORECASE)
STRESS_NAME = re.compile(r"stress|virial", re.IGNORECASE)
# What says the quantity in a key's name; the rest says the level. Forces that ASE writes go with free energies too.
QUANTITY = re.compile(
    r"(free|tot(al)?)?[_-]?energy|toten|e_?tot|forces?|gradients?|grad|stress|virial|^[ef](?=[_-]|$)|(?<=[_-])[ef]$",
    re.IGNORECASE,
)
CHARGE_KEYS = ("charge", "total_charge")
SPIN_KEYS = ("spin_multiplicity", "multiplicity")


@dataclass(frozen=True)
class Keys:
    """What the first frames of a file have.

    Attributes:
        numbers: keys of one number a frame. matrices: of 6 or 9. vectors: of three numbers an atom.
        is_periodic: whether any frame is.
        names: every key of a frame, texts included.
    """

    path: Path
    numbers: frozenset[str]
    matrices: frozenset[str]
    vectors: frozenset[str]
    is_periodic: bool
    names: frozenset[str] = frozenset()

    @property
    def all(self) -> list[str]:
        return sorted(self.numbers | self.matrices | self.vectors)


@dataclass(frozen=True)
class Guess:
    """Where the labels of a file are; ``notes`` say what a user may want to look at."""

    labels: Mapping[Property, LabelSpec]
    charge_key: str | None
    spin_multiplicity_key: str | None
    notes: tuple[str, ...]


def read_keys(path: Path) -> Keys:
    """Return the keys of a file's first frames by the shape of their values.

    Raises:
        InputError: no such file, not one that can be read, or none of its frames can.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    numbers: set[str] = set()
    matrices: set[str] = set()
    vectors: set[str] = set()
    names: set[str] = set()
    periodic, n = False, 0
    for info, widths, is_periodic in islice(_frames(path), LOOKED_AT):
        n += 1
        periodic = periodic or is_periodic
        names.update(info)
        for key, value in info.items():
            size = _size(value)
            if size == 1:
                numbers.add(key)
            elif size in (6, 9):
                matrices.add(key)
        vectors |= {key for key, width in widths.items() if width == 3}
    if n == 0:
        raise InputError(f"{path}: has no frame that can be read")
    atoms = frozenset(vectors - {"pos", "positions"})
    return Keys(path, frozenset(numbers), frozenset(matrices), atoms, periodic, frozenset(names))


def _frames(path: Path) -> Iterable[tuple[dict[str, Any], dict[str, int], bool]]:
    """Yield (info, name → columns of what atoms have, whether it is periodic) of each frame."""
    name = reader_name(path)
    # A label of any key: nothing is converted here, the reader is only asked for the text or the plain values.
    spec = SourceSpec(name="guess", path=str(path), licence="unknown", labels={"any": {"energy": "energy"}})
    for chunk in READERS[name].chunks(path, replace(wanted(spec), everything=True), 0, 0):
        for item in chunk.payload:
            if name == "extxyz":
                info: dict[str, Any] = parse_comment(item[1].decode("utf-8", "replace"))
                try:
                    places = columns(info.pop("Properties", "") or info.pop("properties", "") or "species:S:1:pos:R:3")
                except BadFrameError:
                    continue
                lattice = info.pop("Lattice", info.pop("lattice", None))
                is_periodic = lattice is not None and any(c in info.get("pbc", "T") for c in "Tt1")
                yield info, {key: width for key, (_, width) in places.items() if key}, is_periodic
            elif not isinstance(item, Unreadable):
                _, _, cell, pbc, info, arrays = item
                widths = {key: np.shape(value)[1] for key, value in arrays.items() if np.ndim(value) == 2}
                yield info, widths, bool(np.any(cell) and np.any(pbc))


def _size(value: Any) -> int:
    """Return how many numbers a value is; 0 where it is none."""
    if isinstance(value, str):
        words = value.removeprefix("_JSON").replace("[", " ").replace("]", " ").replace(",", " ").split()
    else:
        words = np.ravel(value).tolist()
    try:
        return len([float(word) for word in words])
    except (TypeError, ValueError):
        return 0


def guess(keys: Keys, given: Mapping[Property, str], option: str) -> Guess:
    """Return where the labels of a file are.

    Args:
        given: property → key that the user names.
        option: start of the options that name a key, for messages: ``--low`` of ``--low-energy``.

    Raises:
        InputError: no key that looks like a total energy, or several of which none is the obvious one; a given key
            that the file does not have.
    """
    for prop, key in given.items():
        if key not in keys.all:
            raise InputError(f"{option}-{prop} {key}: no frame of {keys.path} has it; keys: {known(keys.all)}")
    notes: list[str] = []
    energies = [k for k in keys.numbers if ENERGY_NAME.search(k) and not NO_TOTAL_ENERGY.search(k)]
    if len(energies) > 1:
        energies = [k for k in energies if "free" not in k.lower()] or energies
    energy = given.get(ENERGY) or _one(energies, ENERGY, "", keys, option, notes)
    if energy is None:
        raise InputError(
            f"{keys.path}: no key looks like the total energy of a structure; name it with {option}-energy KEY; keys: "
            f"{known(keys.all)}"
        )
    labels: dict[Property, LabelSpec] = {ENERGY: LabelSpec(key=energy)}
    vectors = [k for k in keys.vectors if FORCES_NAME.search(k)]
    forces = given.get(FORCES) or _one_of_level(vectors, FORCES, energy, keys, option, notes)
    if forces is not None:
        negate = bool(re.search("grad", forces, re.IGNORECASE))
        labels[FORCES] = LabelSpec(key=forces, negate=negate)
        if negate:
            notes.append(f"{forces} is read as a gradient: forces are minus it")
    matrices = [k for k in keys.matrices if STRESS_NAME.search(k)] if keys.is_periodic else []
    stress = given.get(STRESS) or _one_of_level(matrices, STRESS, energy, keys, option, notes)
    if stress is not None:
        virial = bool(re.search("virial", stress, re.IGNORECASE))
        labels[STRESS] = LabelSpec(key=stress, virial=virial)
        if virial:
            notes.append(f"{stress} is read as a virial in eV: stress is minus it, by the volume")
    charge, spin = (next((k for k in names if k in keys.numbers), None) for names in (CHARGE_KEYS, SPIN_KEYS))
    return Guess(labels, charge, spin, tuple(notes))


def level(key: str) -> str:
    """Return what a key's name says of the level of theory: ``pbe`` of ``energy_pbe``, empty of ``forces``."""
    return QUANTITY.sub("", key).strip("_-. ").lower()


def _one_of_level(
    found: list[str], prop: Property, energy: str, keys: Keys, option: str, notes: list[str]
) -> str | None:  # fmt: skip
    """Return the one of several keys that goes with an energy, as `_one`; those of another energy's level are left out.

    Raises:
        InputError: there are several, and none is the obvious one.
    """
    affix = level(energy)
    other = {level(k): k for k in sorted(keys.numbers) if ENERGY_NAME.search(k) and level(k) != affix}
    notes += [
        f"{k} is left out: it goes with {other[level(k)]} ({option}-{prop} {k} takes it)"
        for k in sorted(found) if level(k) in other
    ]  # fmt: skip
    return _one(sorted(k for k in found if level(k) not in other), prop, affix, keys, option, notes)


def _one(
    found: list[str], prop: Property, affix: str, keys: Keys, option: str, notes: list[str]
) -> str | None:  # fmt: skip
    """Return the one of several keys: that of the energy's level, the property's own name, the only one; or None.

    Raises:
        InputError: there are several, and none of these.
    """
    if not found:
        return None
    if len(found) == 1:
        return found[0]
    own = [k for k in found if affix and level(k) == affix]
    plain = [k for k in found if k.lower() in (prop, prop.removesuffix("s"))]
    chosen = next(iter([*own, *plain]), None)
    if chosen is None:
        raise InputError(
            f"{keys.path}: several keys look like {prop}: {', '.join(sorted(found))}; choose with {option}-{prop} KEY"
        )
    others = ", ".join(sorted(k for k in found if k != chosen))
    notes.append(f"{prop} is taken from {chosen}; there are also {others} ({option}-{prop} chooses)")
    return chosen
