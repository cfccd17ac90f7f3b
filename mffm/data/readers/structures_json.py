"""JSON of pymatgen structures with their labels: MPtrj, MatPES, Alexandria, what ``monty`` and ``MPRester`` write.

A record is a mapping with a ``structure`` (or ``molecule``) in pymatgen's form; its other values are the frame's,
those of nested mappings with a dot (``data.energy_total``), those of the sites as arrays (``forces``, ``magmom``).
Records may be nested in any way: keys and indices on the way to one are ``id_0``, ``id_1``, … Files of any size are
streamed: only one member of the outermost list or mapping is in memory.
"""

import codecs
import json
from collections.abc import Iterator, Mapping
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

STRUCTURES = ("structure", "molecule")
_BLOCK = 1 << 20
_SMALL = 1 << 24  # characters; a smaller file is decoded at once
_LONGEST = 1 << 29  # characters of one member; more is damage
_SAME = 1e-2  # Å, between the two ways in which pymatgen writes a site's position
_DEEPEST = 12  # levels of lists and mappings above a record


def chunks(path: Path, want: Wanted, start: int = 0, first: int = 0) -> Iterator[Chunk]:
    """Yield the frames of a file some at a time, in its order; the first ``start`` are read again and passed over."""
    del first
    try:
        yield from plain.chunked(path, _frames(path, want), start)
    except (*plain.DAMAGED, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())[:120]}); fetch it again") from error


def _frames(path: Path, want: Wanted) -> Iterator[Plain | Unreadable]:
    n = 0
    for keys, member in _members(path):
        if isinstance(member, Mapping) and "sites" in member and not any(name in member for name in STRUCTURES):
            member = {STRUCTURES[0]: member}  # a structure by itself
        found = list(_records(keys, member, {}))
        if not found and isinstance(member, Mapping | list):
            yield Unreadable(f"{'/'.join(keys) or 'the file'}: no structure in it{_shown(member)}")
        for names, record, inherited in found:
            n += 1
            if isinstance(record, Unreadable):
                yield record
                continue
            try:
                yield _plain(names, record, inherited, want)
            except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
                yield Unreadable(f"{'/'.join(names)}: no pymatgen structure ({type(error).__name__}: {error})")
    if n == 0:
        raise InputError(
            f"{path}: no record with a structure in pymatgen's form (keys {' and '.join(STRUCTURES)}); "
            "name another `reader`"
        )


def _shown(member: Any) -> str:
    return f"; keys {', '.join(map(str, list(member)[:8]))}" if isinstance(member, Mapping) and member else ""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A key given twice would lose what the first one held."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} is given twice in one mapping")
    return found


_decoder = json.JSONDecoder(object_pairs_hook=_once)


class _Text:
    """The text of a file from ``at`` on, read as far as a value needs."""

    def __init__(self, path: Path):
        self.path = path
        self.file = plain.open_binary(path)
        self.decode = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.passed = "", 0, 0
        self.ended = False

    def more(self) -> bool:
        """Read as much again as is held, so that a long value is tried a few times only; False at the end."""
        if self.ended:
            return False
        block = self.file.read(max(_BLOCK, len(self.text) - self.at))
        self.passed += self.at
        self.text = self.text[self.at :] + self.decode.decode(block, final=not block)
        self.at = 0
        self.ended = not block
        return not self.ended

    def peek(self) -> str:
        """Return the next character that is no space; empty at the end."""
        while True:
            while self.at < len(self.text):
                if not self.text[self.at].isspace():
                    return self.text[self.at]
                self.at += 1
            if not self.more():
                return ""

    def take(self, expected: str) -> None:
        found = self.peek()
        if found not in expected or not found:
            raise self.fault(f"expected {' or '.join(expected)}, found {found or 'the end of the file'}")
        self.at += 1

    def value(self) -> Any:
        """Return the value that begins here and pass it."""
        self.peek()
        while True:
            try:
                found, end = _decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.pos > len(self.text) - _BLOCK // 2 or "Unterminated" in error.msg
                if not cut or len(self.text) - self.at > _LONGEST or not self.more():
                    raise self.fault(error.msg, error.pos) from error
                continue
            except (ValueError, RecursionError) as error:
                raise self.fault(str(error)) from error
            if end == len(self.text) and not isinstance(found, dict | list) and self.more():
                continue  # a number may go on
            self.at = end
            return found

    def fault(self, what: str, at: int | None = None) -> InputError:
        place = self.passed + (self.at if at is None else at)
        return InputError(f"{self.path}: not valid JSON at character {place}: {what}; the file is damaged or cut short")


def _members(path: Path) -> Iterator[tuple[list[str], Any]]:
    """Yield the members of the outermost container, and of lists right inside it, with the keys that lead there."""
    text = _Text(path)
    with text.file:
        while text.more() and len(text.text) < _SMALL:
            pass
        n = 0
        while text.peek():  # several values: JSON lines
            if text.ended and text.peek() in "{[":
                yield from _inside([], text.value(), n)
            else:
                yield from _streamed(text, [])
            n += 1


def _inside(keys: list[str], value: Any, n: int) -> Iterator[tuple[list[str], Any]]:
    if isinstance(value, Mapping) and any(name in value for name in STRUCTURES):
        yield [str(n)], value
    elif isinstance(value, Mapping):
        yield from (([*keys, str(key)], member) for key, member in value.items())
    elif isinstance(value, list):
        yield from (([*keys, str(k)], member) for k, member in enumerate(value))
    else:
        yield keys, value


def _streamed(text: _Text, keys: list[str]) -> Iterator[tuple[list[str], Any]]:
    """Yield the members of the list or mapping that begins here; of a list in a mapping its members."""
    opening = text.peek()
    if opening not in ("{", "["):
        yield keys, text.value()
        return
    text.take(opening)
    closing = "}" if opening == "{" else "]"
    seen: set[int] = set()
    k = 0
    if text.peek() == closing:
        text.take(closing)
        return
    while True:
        name = str(k)
        if opening == "{":
            if text.peek() != '"':
                raise text.fault(f"expected a key, found {text.peek() or 'the end of the file'}")
            name = text.value()
            if hash(name) in seen:
                raise text.fault(f"key {name!r} is given twice")
            seen.add(hash(name))
            text.take(":")
        if opening == "{" and not keys and text.peek() == "[":
            yield from _streamed(text, [*keys, name])
        else:
            yield [*keys, name], text.value()
        text.take("," + closing)
        if text.text[text.at - 1] == closing:
            return
        k += 1


Found = tuple[list[str], Any, dict[str, Any]]


def _records(keys: list[str], value: Any, inherited: dict[str, Any]) -> Iterator[Found]:
    """Yield (keys, record or why it is none, values of the mappings above) of every record in a value.

    A member of a list is one, or holds some, where another member does; so is a mapping in a mapping where most others
    are: what has lost its structure is reported.
    """
    if len(keys) > _DEEPEST:
        yield keys, Unreadable(f"{'/'.join(keys)}: nested deeper than {_DEEPEST} levels"), {}
        return
    if isinstance(value, Mapping):
        if any(name in value for name in STRUCTURES):
            yield keys, value, inherited
            return
        own = {k: v for k, v in value.items() if not isinstance(v, Mapping | list)}
        members = [(str(k), v) for k, v in value.items() if isinstance(v, Mapping | list)]
        found = [(k, v, list(_records([*keys, k], v, {**inherited, **own}))) for k, v in members]
        alike = [bool(f) for _, v, f in found if isinstance(v, Mapping)]
        expected = 2 * sum(alike) >= len(alike) > 1
    elif isinstance(value, list):
        found = [(str(k), v, list(_records([*keys, str(k)], v, inherited))) for k, v in enumerate(value)]
        expected = any(f for _, _, f in found)
    else:
        return
    for k, v, inside in found:
        if not inside and expected and (isinstance(v, Mapping) or isinstance(value, list)):
            yield [*keys, k], Unreadable(f"{'/'.join([*keys, k])}: no structure in it{_shown(v)}"), {}
        yield from inside


def _plain(
    keys: list[str], record: Mapping[str, Any], inherited: Mapping[str, Any], want: Wanted
) -> Plain | Unreadable:
    structure = record[next(name for name in STRUCTURES if name in record)]
    sites = structure["sites"]
    n = len(sites)
    numbers = np.empty(n, np.int64)
    for k, site in enumerate(sites):
        (species,) = site["species"] if len(site["species"]) == 1 else (None,)
        if species is None or abs(float(species.get("occu", 1)) - 1) > 1e-8:
            return Unreadable(f"{'/'.join(keys)}: site {k} is not occupied by one element alone: {site['species']}")
        if species["element"] not in atomic_numbers:
            return Unreadable(f"{'/'.join(keys)}: site {k}: element {species['element']!r} is outside the table 1..118")
        numbers[k] = atomic_numbers[species["element"]]
    cell, pbc = None, np.zeros(3, bool)
    if "lattice" in structure:
        cell = np.array(structure["lattice"]["matrix"], np.float64)
        pbc = np.array(structure["lattice"].get("pbc", (True, True, True)), bool)
        if cell.shape != (3, 3) or pbc.shape != (3,):
            return Unreadable(f"{'/'.join(keys)}: lattice of shape {list(cell.shape)}, pbc of {list(pbc.shape)}")
    positions = _positions(sites, cell)
    info: dict[str, Any] = {f"id_{k}": key for k, key in enumerate(keys)}
    info |= {name: value for name, value in inherited.items() if name not in info}
    arrays: dict[str, Any] = {}
    for name in sites[0].get("properties") or () if n else ():
        arrays[name] = [site["properties"][name] for site in sites] if want.takes(name) else None
    for name in ("charge", "spin_multiplicity"):
        if structure.get(name) is not None:
            info[f"structure.{name}"] = structure[name]
    for name, value in _flat("", record):
        if not want.takes(name):
            info[name] = None
        elif np.shape(value) == (n, 3) and name not in want.frame_keys:
            arrays[name] = np.asarray(value, np.float64)
        else:
            info[name] = value
    taken = {name: np.asarray(value, object if _has_none(value) else np.float64) for name, value in arrays.items()
             if value is not None}  # fmt: skip
    info |= {name: None for name, value in arrays.items() if value is None and name not in info}
    return Plain(numbers, positions, cell, pbc, info, taken)


def _has_none(value: Any) -> bool:
    return isinstance(value, list) and any(v is None for v in value)


def _positions(sites: list[Any], cell: np.ndarray | None) -> np.ndarray:
    """Return Cartesian positions [n, 3] in Å, from both ways in which pymatgen writes them where it does.

    Raises:
        ValueError: the two disagree.
    """
    cartesian = np.array([site["xyz"] for site in sites], np.float64) if sites and "xyz" in sites[0] else None
    if cell is None or (sites and "abc" not in sites[0]):
        if cartesian is None:
            raise ValueError("sites have no xyz")
        return cartesian.reshape(-1, 3)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is rejected with its value
        fractional = np.array([site["abc"] for site in sites], np.float64).reshape(-1, 3) @ cell
    if cartesian is not None and not np.allclose(cartesian, fractional, rtol=0, atol=_SAME, equal_nan=True):
        raise ValueError(f"xyz and abc of its sites differ by {np.abs(cartesian - fractional).max():.3g} Å")
    return fractional


def _flat(prefix: str, record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the values of a record, those of nested mappings with a dot; structures apart."""
    for name, value in record.items():
        if isinstance(value, Mapping) and value.get("@class") == "array" and "data" in value:  # of numpy, by monty
            yield f"{prefix}{name}", value["data"]
        elif isinstance(value, Mapping):
            if "sites" not in value and not (not prefix and name in STRUCTURES):
                yield from _flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", value
