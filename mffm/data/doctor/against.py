"""Structures that a benchmark set holds too: by geometry, and for crystals by composition and prototype."""

from collections import defaultdict
from pathlib import Path

import numpy as np

from mffm.data.checks import Finding
from mffm.data.doctor.duplicates import EXAMPLES, matches_between
from mffm.data.doctor.fingerprint import SAME
from mffm.data.doctor.inputs import Frames, open_inputs
from mffm.data.doctor.scan import Columns, scan
from mffm.data.readers.convert import formula
from mffm.errors import InputError
from mffm.frame import Frame

SYMPREC = 0.1  # Å, as Matbench Discovery's prototypes are looked for with 0.1


def check_against(
    frames: Frames, columns: Columns, path: Path, workers: int = 1, progress: bool = False
) -> list[Finding]:
    """Return which structures are also in the set at ``path``, a store, a data YAML or a file.

    Raises:
        InputError: the set cannot be read, or is empty.
    """
    with open_inputs([path]) as other:
        theirs = scan(other, workers, progress, path.name)
        if not theirs.n:
            raise InputError(f"--against {path}: no structure in it can be read")
        isolated = columns.isolated
        found = [m for m in matches_between(frames, columns, other, theirs) if not isolated[m.a]]
        same, near = [m for m in found if m.difference <= SAME], [m for m in found if m.difference > SAME]
        exact = {m.b for m in same}
        near = [m for m in near if m.b not in exact]
        findings = []
        for chosen, check, what in ((same, "benchmark", "in"), (near, "benchmark_near", "nearly in")):
            if chosen:
                evidence = tuple(
                    (frames.place(m.a), f"{m.difference:.4f} Å from {other.place(m.b)}") for m in chosen[:EXAMPLES]
                )
                findings.append(
                    Finding(
                        check, "",
                        f"{len({m.b for m in chosen})} of {theirs.n} structures of {path} are {what} the data",
                        "error" if check == "benchmark" else "warning", evidence,
                        "take them out before a training whose errors on that set are to be told",
                    )
                )  # fmt: skip
        return findings + _prototypes(frames, columns, other, theirs, path)


def _prototypes(frames: Frames, columns: Columns, other: Frames, theirs: Columns, path: Path) -> list[Finding]:
    mine: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
    wanted = {_reduced(theirs, row) for row in np.flatnonzero(theirs.volume > 0).tolist()}
    for row in np.flatnonzero(columns.volume > 0).tolist():
        kind = _reduced(columns, row)
        if kind in wanted:
            mine[kind].append(row)
    if not mine:
        return []
    how = prototype_name()
    known: dict[tuple[tuple[tuple[int, int], ...], int], int] = {}
    for kind, rows in mine.items():
        for row in rows:
            known.setdefault((kind, prototype(frames.frame(row))), row)
    hits, n_formula = [], 0
    for row in np.flatnonzero(theirs.volume > 0).tolist():
        kind = _reduced(theirs, row)
        if kind not in mine:
            continue
        n_formula += 1
        found = known.get((kind, prototype(other.frame(row))))
        if found is not None:
            hits.append((found, row))
    if not hits:
        return []
    evidence = tuple(
        (frames.place(a), f"{formula(other.frame(b).atomic_numbers)}, as {other.place(b)}") for a, b in hits[:EXAMPLES]
    )
    return [
        Finding(
            "benchmark_prototype", "",
            f"{len(hits)} crystals of {path} have composition and {how} of one in the data "
            f"({n_formula} its composition)",
            "warning", evidence, "the same compound, perhaps relaxed otherwise: leave its group out of the training",
        )
    ]  # fmt: skip


def _reduced(columns: Columns, row: int) -> tuple[tuple[int, int], ...]:
    part = slice(columns.element_start[row], columns.element_start[row + 1])
    counts = columns.element_count[part]
    divisor = int(np.gcd.reduce(counts))
    return tuple((int(z), int(n) // divisor) for z, n in zip(columns.element[part], counts, strict=True))


def prototype_name() -> str:
    """Return what stands for a prototype here: it depends on whether spglib is installed."""
    try:
        import spglib  # noqa: F401
    except ImportError:
        return "number of atoms a cell"
    return "space group"


def prototype(frame: Frame) -> int:
    """Return the number of a crystal's space group (spglib, 0.1 Å), or its atoms a cell, negative, without spglib or
    where it finds none.
    """
    try:
        import spglib
    except ImportError:
        return -frame.n_atoms
    fractional = frame.positions @ np.linalg.inv(frame.cell)
    crystal = (frame.cell.tolist(), fractional.tolist(), frame.atomic_numbers.tolist())
    found = spglib.get_spacegroup(crystal, symprec=SYMPREC)
    return int(found.split("(")[1].rstrip(")")) if found else -frame.n_atoms
