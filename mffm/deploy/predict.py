"""Labels for the structures of a file, many at a time: any file that ASE reads → extxyz.

    frames ──check──▶ neighbor lists ──edge budget──▶ one forward a batch ──▶ frames appended to OUT.partial ──▶ OUT

Frames keep their order, so that a killed run goes on behind the last whole frame of ``OUT.partial``.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.io import iread
from ase.io.extxyz import per_atom_properties, per_config_properties, write_extxyz
from ase.stress import voigt_6_to_full_3x3_stress

from mffm.data.neighbors import NeighborList, neighbor_list
from mffm.deploy.at_fidelity import AtFidelity, Results, geometry
from mffm.errors import InputError
from mffm.release import sha256, write_json

EDGE_BUDGET = 20_000  # of a batch; more bring nothing on a CPU and bound the memory on a GPU
STANDARD = ("energy", "free_energy", "energies", "forces", "stress")
ERROR = "mffm_error"
HAS_ERROR = re.compile(rf"(^|\s){ERROR}=".encode())

Labelled = tuple[Atoms, Results | InputError]


@dataclass(frozen=True)
class Summary:
    """What was written: frames in all, those that an earlier run had written, and those without a prediction."""

    path: Path
    n_frames: int
    n_before: int
    n_failed: int


def predict(at: AtFidelity, frames: Iterable[Atoms], edge_budget: int = EDGE_BUDGET) -> Iterator[Labelled]:
    """Yield each structure with ASE's results, or with the reason why there are none, in the given order.

    Args:
        edge_budget: about so many edges in a batch; a larger structure is a batch of its own.
    """
    waiting: list[tuple[Atoms, NeighborList | InputError]] = []
    n_edges = 0
    for atoms in frames:
        found: NeighborList | InputError
        try:
            at.check(atoms)
            _, positions, cell, pbc = geometry(atoms)
            found = neighbor_list(positions, cell, pbc, at.cutoff)
            size = len(found[0]) + len(atoms)  # atoms without neighbors cost something too
        except InputError as error:
            found, size = error, len(atoms) + 1  # a file of failures is written as it goes too
        if n_edges and n_edges + size > edge_budget:
            yield from _labelled(at, waiting)
            waiting, n_edges = [], 0
        waiting.append((atoms, found))
        n_edges += size
    yield from _labelled(at, waiting)


def _labelled(at: AtFidelity, waiting: list[tuple[Atoms, NeighborList | InputError]]) -> Iterator[Labelled]:
    good = [(atoms, found) for atoms, found in waiting if not isinstance(found, InputError)]
    results = iter(at.predict([a for a, _ in good], [found for _, found in good]) if good else [])
    for atoms, found in waiting:
        yield atoms, found if isinstance(found, InputError) else next(results)


def predict_file(
    at: AtFidelity,
    source: Path,
    output: Path,
    edge_budget: int = EDGE_BUDGET,
    skip_failures: bool = False,
    progress: Callable[[int], None] = lambda n: None,
) -> Summary:
    """Write the structures of a file with their predictions; the same call goes on after a kill.

    Predictions have ASE's keys (``read(...).get_potential_energy()``); labels that the source has under these are kept
    as ``energy_source``, ``forces_source`` and so on, its other labels (dipole, magmoms, ...) under their own keys.

    Args:
        skip_failures: write a structure that cannot be calculated without labels and with the reason under
            ``mffm_error``; otherwise it is an error.
        progress: called with the number of frames that are written.

    Raises:
        InputError: the output exists; what is there was begun with another source or potential; ASE cannot read the
            source; a structure cannot be calculated.
    """
    if output.exists():
        raise InputError(f"{output}: exists; give another name or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial, note = (output.with_name(f"{output.name}.{end}") for end in ("partial", "partial.json"))
    n_before = _begin(partial, note, {"source": str(source.resolve()), "sha256": sha256(source), **at.describe()})
    n_frames = n_before
    progress(n_frames)
    n_failed = sum(bool(HAS_ERROR.search(comment)) for comment, _ in _whole_frames(partial))
    with partial.open("a") as file:
        for atoms, found in predict(at, read_frames(source, n_before), edge_budget):
            if isinstance(found, InputError):
                if not skip_failures:
                    raise InputError(
                        f"{source}: frame {n_frames} ({atoms.get_chemical_formula()}): {found}; or give --skip-failures"
                    ) from found
                n_failed += 1
            write_extxyz(file, [_frame(atoms, found, at.fidelity)], write_results=False)
            n_frames += 1
            progress(n_frames)
    if n_frames == 0:
        partial.unlink()
        note.unlink()
        raise InputError(f"{source}: no structures in it")
    partial.replace(output)
    note.unlink()
    return Summary(output, n_frames, n_before, n_failed)


def count_frames(path: Path) -> tuple[int, int]:
    """Return the number of whole frames of an extxyz file and the bytes that they take."""
    n_frames = size = 0
    for _, n_bytes in _whole_frames(path):
        n_frames += 1
        size += n_bytes
    return n_frames, size


def _whole_frames(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yield the comment line and the number of bytes of each whole frame of an extxyz file."""
    with path.open("rb") as file:
        while head := file.readline():
            lines = [head]
            try:
                lines += [file.readline() for _ in range(int(head) + 1)]
            except ValueError:
                break
            if not lines[-1].endswith(b"\n"):
                break
            yield lines[1], sum(len(line) for line in lines)


def _begin(partial: Path, note: Path, made_of: dict[str, Any]) -> int:
    """Return how many frames are written already, after cutting off one that a kill left unfinished."""
    n_frames, size = count_frames(partial) if note.is_file() and partial.is_file() else (0, 0)
    if n_frames == 0:  # what stopped before its first frame binds nobody
        write_json(note, made_of)
        partial.write_bytes(b"")
        return 0
    before = json.loads(note.read_text())
    differing = [key for key in made_of if before.get(key) != made_of[key]]
    if differing:
        key = differing[0]
        raise InputError(
            f"{partial}: begun with {key} {before.get(key)!r}, now {made_of[key]!r}; remove it, or give another output"
        )
    with partial.open("r+b") as file:
        file.truncate(size)
    return n_frames


def read_frames(source: Path, start: int = 0) -> Iterator[Atoms]:
    """Yield the structures of a file from one on.

    Raises:
        InputError: ASE cannot read it; the message names the frame.
    """
    index = start
    try:
        for atoms in iread(str(source), f"{start}:"):
            yield atoms
            index += 1
    except InputError:
        raise
    except Exception as error:  # ASE's formats raise anything
        raise InputError(
            f"{source}: ASE cannot read frame {index} ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from error


def _frame(atoms: Atoms, found: Results | InputError, fidelity: str) -> Atoms:
    """Return a structure as it is written."""
    written = atoms.copy()
    written.info.pop(ERROR, None)  # of a source that was an output before
    given = dict(getattr(atoms.calc, "results", None) or {})
    for key in STANDARD:
        for place in (written.info, written.arrays):
            if key in place:
                given[key] = place.pop(key)
    for key, value in given.items():  # ASE's reader takes all of its own names out of info and arrays
        place = written.arrays if key in per_atom_properties else written.info
        if key in STANDARD:
            place[f"{key}_source"] = value
        elif key in per_atom_properties or key in per_config_properties:
            place.setdefault(key, value)
    if isinstance(found, InputError):
        written.info[ERROR] = str(found)
    else:
        written.info["fidelity"] = fidelity
        for key in STANDARD:  # as ASE writes a calculator's results, without the copies that it makes
            if key in found:
                value = voigt_6_to_full_3x3_stress(found[key]) if key == "stress" else found[key]
                (written.arrays if key in ("energies", "forces") else written.info)[key] = value
    return written
