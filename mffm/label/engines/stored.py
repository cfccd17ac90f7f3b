"""Labels that another store has for the same structures: computed elsewhere, or held back to test a choice."""

from dataclasses import replace
from functools import cache
from pathlib import Path

from mffm.data.identity import digest16, same_geometry
from mffm.data.store import Store
from mffm.errors import InputError
from mffm.fidelity import Fidelity
from mffm.frame import Frame
from mffm.keys import ENERGY, FORCES, STRESS
from mffm.label.level import Label


@cache  # opened once a process
def _opened(path: str) -> tuple[Store, dict[bytes, int]]:
    """Return a store and its rows by the digest of the frame_id, which the index has."""
    store = Store(path)
    return store, {digest.tobytes(): row for row, digest in enumerate(store.frame_hash)}


def fidelity_of(path: str, fidelity: str, name: str | None) -> Fidelity:
    """Return the fidelity of the labels, by another name where one is given.

    Raises:
        InputError: no store there, or no such fidelity.
    """
    found = Store(Path(path)).fidelities[fidelity]
    return replace(found, name=name or found.name)


def refuse(frame: Frame, path: str, fidelity: str) -> str:
    """Return why there is no label of a structure, or ""."""
    store, rows = _opened(path)
    row = rows.get(digest16(frame.frame_id))
    if row is None:
        return f"{path} has no frame_id {frame.frame_id!r}"
    own = (frame.atomic_numbers, frame.positions, frame.cell, frame.pbc)
    if not same_geometry(store.geometry(row), own):
        return f"frame_id {frame.frame_id!r} is another structure in {path}"
    return "" if ENERGY in store.labels(row, fidelity) else f"{path} has no {fidelity} energy of {frame.frame_id!r}"


def label(frame: Frame, path: str, fidelity: str) -> Label:
    """Return the labels of a structure; without an energy there is none."""
    fault = refuse(frame, path, fidelity)
    if fault:
        raise InputError(fault)
    store, rows = _opened(path)
    found = store.labels(rows[digest16(frame.frame_id)], fidelity)
    return Label(float(found[ENERGY]), found.get(FORCES), found.get(STRESS))
