"""From what a file says to a ``Frame`` in mffm's units. The only place that converts units.

Factors are CODATA 2018 through ASE's unit table (1 Hartree = 27.211386 eV, 1 bohr = 0.529177211 Å).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from ase.units import Bohr, GPa, Hartree, Rydberg, kcal, kJ, mol

from mffm.config.data import Hdf5Spec, LabelSpec, SourceSpec
from mffm.errors import InputError, known
from mffm.frame import Frame
from mffm.keys import ENERGY, FORCES, N_ELEMENTS, PROPERTIES, STRESS, Property

ENERGY_UNITS = {
    "eV": 1.0,
    "meV": 1e-3,
    "Hartree": Hartree,
    "Rydberg": Rydberg,
    "kcal/mol": kcal / mol,
    "kJ/mol": kJ / mol,
}
LENGTH_UNITS = {"Angstrom": 1.0, "bohr": Bohr, "nm": 10.0}
STRESS_UNITS = {"eV/Angstrom^3": 1.0, "GPa": GPa, "kbar": 0.1 * GPa, "Hartree/bohr^3": Hartree / Bohr**3}
DEFAULT_UNITS: dict[Property, str] = {ENERGY: "eV", FORCES: "eV/Angstrom", STRESS: "eV/Angstrom^3"}

# Largest asymmetry of a stress, relative to its largest component, that rounding and k-point noise explain.
STRESS_ASYMMETRY = 1e-2
FARTHEST = 1e6  # Å from the origin, and the longest cell vector
# eV, eV/Å, eV/Å³: all electrons of 1e5 heavy atoms have 1e11 eV. What is beyond is damage, and overflows in float32.
LARGEST = 1e12


@dataclass(slots=True)
class RejectedFrame:
    """A frame that was left out: where it was and why; ``reason`` holds the value."""

    file: str
    index: int
    reason: str
    source: str = ""

    @property
    def origin(self) -> str:
        return f"{self.file}:{self.index}"


class BadFrameError(Exception):
    """The frame at hand cannot be used; the message is the reason."""


def factor(prop: Property, spec: LabelSpec) -> float:
    """Return the factor from a label's unit in the file to eV, eV/Å or eV/Å³, the sign included.

    Raises:
        InputError: unknown unit; the message lists the known ones.
    """
    unit = spec.unit or (DEFAULT_UNITS[ENERGY] if spec.virial else DEFAULT_UNITS[prop])
    sign = -1.0 if spec.negate else 1.0
    if prop == ENERGY or spec.virial:
        if prop == FORCES:
            raise InputError(f"label {spec.key!r}: virial is an option of stress, not of forces")
        if unit not in ENERGY_UNITS:
            raise InputError(f"label {spec.key!r}: unknown energy unit {unit!r}; known units: {known(ENERGY_UNITS)}")
        return sign * ENERGY_UNITS[unit]
    if prop == FORCES:
        # "kcal/mol/Angstrom": the length is what follows the last slash.
        energy, _, length = unit.rpartition("/")
        if energy not in ENERGY_UNITS or length not in LENGTH_UNITS:
            raise InputError(
                f"label {spec.key!r}: unknown forces unit {unit!r}; expected <energy>/<length> "
                f"with an energy of {known(ENERGY_UNITS)} and a length of {known(LENGTH_UNITS)}"
            )
        return sign * ENERGY_UNITS[energy] / LENGTH_UNITS[length]
    if unit not in STRESS_UNITS:
        raise InputError(f"label {spec.key!r}: unknown stress unit {unit!r}; known units: {known(STRESS_UNITS)}")
    return sign * STRESS_UNITS[unit]


@dataclass(frozen=True)
class Wanted:
    """What is to be taken from the files of one source; made once a source, not once a frame."""

    source: str
    labels: tuple[tuple[str, Property, LabelSpec, float], ...]
    length: float
    frame_key: str | None
    group_key: str | None
    charge_key: str | None
    spin_key: str | None
    split_key: str | None
    weight_key: str | None
    moments_key: str | None = None
    nan_is_absent: bool = False
    hdf5: Hdf5Spec = field(default_factory=Hdf5Spec)
    everything: bool = False  # values of every key, not of those alone that are asked for

    @cached_property
    def array_keys(self) -> frozenset[str]:
        """Keys of values per atom: forces and magnetic moments."""
        keys = {spec.key for _, p, spec, _ in self.labels if p == FORCES}
        return frozenset(keys if self.moments_key is None else keys | {self.moments_key})

    @cached_property
    def frame_keys(self) -> frozenset[str]:
        """Keys of values per frame: energies, stress, names, charge and spin."""
        keys = {spec.key for _, p, spec, _ in self.labels if p != FORCES}
        named = (self.frame_key, self.group_key, self.charge_key, self.spin_key, self.split_key, self.weight_key)
        return frozenset(keys.union(key for key in named if key is not None))

    def takes(self, key: str) -> bool:
        """Return whether the value of a key is needed: readers of large sets leave the others unread."""
        return self.everything or key in self.array_keys or key in self.frame_keys


def wanted(source: SourceSpec, split_key: str | None = None) -> Wanted:
    labels = []
    for fidelity, properties in source.labels.items():
        for prop in PROPERTIES:
            if prop in properties:
                spec = source.label(fidelity, prop)
                labels.append((fidelity, prop, spec, factor(prop, spec)))
    return Wanted(
        source.name,
        tuple(labels),
        LENGTH_UNITS[source.length_unit],
        source.frame_key,
        source.group_key,
        source.charge_key,
        source.spin_multiplicity_key,
        split_key,
        source.weight_key,
        source.magnetic_moments_key,
        source.nan == "absent",
        source.hdf5,
    )


def build(
    numbers: np.ndarray,
    positions: np.ndarray,
    cell: np.ndarray | None,
    pbc: np.ndarray,
    info: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    want: Wanted,
    file: str,
    index: int,
) -> Frame | RejectedFrame:
    """Return the frame in mffm's units, or why it cannot be one.

    Args:
        numbers: [n] int. positions: [n, 3]. cell: [3, 3] rows or None. pbc: [3]; lengths in the source's unit.
        info: values of the frame; text or typed. arrays: values per atom.
        want: what to take.
        file, index: where it stands.
    """
    origin = f"{file}:{index}"
    try:
        frame = Frame(
            atomic_numbers=_elements(numbers),
            positions=_near(_finite(np.asarray(positions, np.float64) * want.length, "positions")),
            cell=np.zeros((3, 3)) if cell is None else _cell(np.asarray(cell, np.float64) * want.length),
            pbc=np.asarray(pbc, bool),
            origin=origin,
        )
        if frame.n_atoms == 0:
            raise BadFrameError("no atoms")
        for fidelity, prop, spec, scale in want.labels:
            value = info.get(spec.key)
            if value is None or (
                isinstance(value, str) and value.strip().lower() in ("", "none", "null", "_json null")
            ):
                value = arrays.get(spec.key)
                if value is None:
                    continue
            if want.nan_is_absent and _all_nan(value):
                continue
            frame.labels[fidelity, prop] = _label(value, prop, spec, scale, frame)
        if want.frame_key is not None:
            name = info.get(want.frame_key)
            if name is None or str(name) == "":
                raise BadFrameError(f"no frame_key {want.frame_key!r}; give every frame one, or pair by geometry")
            frame.frame_id = str(name)
        if want.group_key is not None:
            group = info.get(want.group_key)
            frame.group = (
                formula(frame.atomic_numbers) if want.group_key == "formula" and group is None else _text(group)
            )
        if want.split_key is not None:
            frame.split = _text(info.get(want.split_key))
        frame.charge = _integer(info, want.charge_key, "charge")
        frame.spin_multiplicity = _integer(info, want.spin_key, "spin multiplicity")
        if frame.spin_multiplicity is not None and frame.spin_multiplicity < 1:
            raise BadFrameError(f"spin multiplicity {frame.spin_multiplicity}; it is 2S+1, so at least 1")
        frame.weight = _weight(info, want.weight_key)
        frame.magnetic_moments = _moments(info, arrays, want.moments_key, frame.n_atoms)
    except BadFrameError as error:
        return RejectedFrame(file, index, str(error), want.source)
    return frame


def _weight(info: Mapping[str, Any], key: str | None) -> float:
    value = None if key is None else info.get(key)
    if value is None or value == "":
        return 1.0
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise BadFrameError(f"weight {value!r} under {key!r}; it is a finite number, 0 or more")
    return weight


def _all_nan(value: Any) -> bool:
    array = np.asarray(value)
    return array.dtype.kind == "f" and array.size > 0 and bool(np.isnan(array).all())


def _moments(info: Mapping[str, Any], arrays: Mapping[str, Any], key: str | None, n: int) -> np.ndarray | None:
    """Return the collinear magnetic moments [n] in µB, or None where the frame has none."""
    value = None if key is None else arrays.get(key, info.get(key))
    if value is None:
        return None
    moments = numeric(value, f"magnetic moments ({key})")
    if moments.size != n:
        raise BadFrameError(
            f"magnetic moments ({key}): expected one number an atom, [{n}], found {list(moments.shape)}"
        )
    return _finite(moments.reshape(n), f"magnetic moments ({key})")


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _integer(info: Mapping[str, Any], key: str | None, what: str) -> int | None:
    value = None if key is None else info.get(key)
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise BadFrameError(f"{what} {key}={value!r} is not a number") from error
    if number != round(number) or abs(number) > 30000:
        raise BadFrameError(f"{what} {key}={value!r} is not a whole number")
    return int(number)


def _elements(numbers: np.ndarray) -> np.ndarray:
    numbers = np.asarray(numbers)
    bad = (numbers < 1) | (numbers > N_ELEMENTS)
    if bad.any():
        raise BadFrameError(
            f"atomic number {int(numbers[bad][0])} of atom {int(bad.argmax())} is outside 1..{N_ELEMENTS}"
        )
    return numbers.astype(np.uint8)


def _finite(values: np.ndarray, what: str) -> np.ndarray:
    if not np.isfinite(values).all():
        bad = np.argwhere(~np.isfinite(values))[0]
        place = f" at {bad.tolist()}" if len(bad) else ""
        raise BadFrameError(f"{what}: {values[tuple(bad)]}{place}")
    return values


def _cell(cell: np.ndarray) -> np.ndarray:
    if _finite(cell, "the cell").size != 9 or np.abs(cell).max() > FARTHEST:
        raise BadFrameError(f"the cell: {cell.tolist()}, expected 3×3 numbers up to {FARTHEST:g} Å")
    return cell


def _near(positions: np.ndarray) -> np.ndarray:
    """Positions beyond ``FARTHEST`` are damage or a wrong column: differences between them lose their digits."""
    if len(positions) and np.abs(positions).max() > FARTHEST:
        atom, axis = np.unravel_index(int(np.abs(positions).argmax()), positions.shape)
        raise BadFrameError(
            f"positions: {positions[atom, axis]:.4g} Å at [{atom}, {axis}], farther than {FARTHEST:g} Å from the origin"
        )
    return positions


def numeric(value: Any, what: str) -> np.ndarray:
    """Return a value (number, sequence, text such as ``"1 2 3"``, ``_JSON [1, 2]`` or ``[[1, 2], [3, 4]]``) as
    float64.
    """
    if isinstance(value, str):
        text = value.strip().removeprefix("_JSON").replace("[", " ").replace("]", " ").replace(",", " ")
        value = text.split()
        if len(value) == 1:
            value = value[0]
    try:
        return np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        shown = repr(value)
        raise BadFrameError(f"{what}: {shown[:60]} is not numeric") from error


def _label(value: Any, prop: Property, spec: LabelSpec, scale: float, frame: Frame) -> np.ndarray:
    what = f"{prop} ({spec.key})"
    array = numeric(value, what)
    largest = np.abs(array).max(initial=0)
    if np.isfinite(largest) and abs(scale) * largest > LARGEST:
        raise BadFrameError(
            f"{what}: {largest:.3g}, beyond {LARGEST:g} {DEFAULT_UNITS[prop]}: damage, or another quantity"
        )
    if prop == ENERGY:
        if array.size != 1:
            raise BadFrameError(f"{what}: expected one number, found shape {list(array.shape)}")
        return _finite(np.float64(scale) * array.reshape(()), what)
    if prop == FORCES:
        if array.size != 3 * frame.n_atoms or (array.ndim == 2 and array.shape[1] != 3):
            raise BadFrameError(f"{what}: expected shape [{frame.n_atoms}, 3], found {list(array.shape)}")
        return _finite(scale * array.reshape(-1, 3), what)
    if array.size == 6:
        xx, yy, zz, yz, xz, xy = array.reshape(6)
        array = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    elif array.size == 9:
        array = array.reshape(3, 3)
    else:
        raise BadFrameError(f"{what}: expected 6 (xx yy zz yz xz xy), 9 or 3×3 numbers, found {array.size}")
    array = _finite(scale * array, what)
    if frame.volume < 1e-9:
        remedy = "give it a cell" if frame.pbc.any() else "leave the stress out of such a frame"
        raise BadFrameError(f"{what}: the frame has no cell volume, pbc {frame.pbc.tolist()}; {remedy}")
    if spec.virial:
        array = -array / frame.volume
    asymmetry = float(np.abs(array - array.T).max())
    if asymmetry > STRESS_ASYMMETRY * float(np.abs(array).max()) + 1e-6:
        raise BadFrameError(f"{what}: not symmetric, by up to {asymmetry:.3g} eV/Å³")
    return 0.5 * (array + array.T)


_SYMBOLS: list[str] = []


def formula(numbers: np.ndarray) -> str:
    """Return the composition in Hill order, e.g. ``C2H6O``."""
    if not _SYMBOLS:
        from ase.data import chemical_symbols

        _SYMBOLS.extend(chemical_symbols)
    counts = np.bincount(numbers)
    symbols = {_SYMBOLS[z]: int(counts[z]) for z in np.flatnonzero(counts)}
    order: list[str] = [s for s in ("C", "H") if s in symbols] if "C" in symbols else []
    order += sorted(s for s in symbols if s not in order)
    return "".join(s + (str(symbols[s]) if symbols[s] > 1 else "") for s in order)
