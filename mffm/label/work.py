"""The working folder of a labelling: what it is bound to, its journals, and what is left to do.

work.json      level, fidelity with its settings, their hash, the source, which structures
structures/    of files; a store has its own
journal/       records of mffm.label.journal, a file a writer
parts/         indices of each task of a cluster
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mffm.data.records import write_json
from mffm.data.store import Store
from mffm.errors import InputError
from mffm.fidelity import Fidelity
from mffm.keys import ENERGY
from mffm.label import levels, structures
from mffm.label.journal import Ledger, Limits
from mffm.label.level import Level

MOST_ATTEMPTS = 2  # where a worker died or a code failed for a reason that nobody knows


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        level: as ``mffm.label.levels.find`` takes it.
        name: of the fidelity; None: the level's.
        n: a random subset of this size; None: all. Subsets of one seed are nested.
        rows: of a store: label these alone.
    """

    source: structures.Source
    level: str
    name: str | None = None
    n: int | None = None
    seed: int = 0
    rows: tuple[int, ...] | None = None

    def subset(self) -> dict[str, Any]:
        """Return which of the structures are meant, as JSON."""
        digest = None if self.rows is None else hashlib.sha256(json.dumps(self.rows).encode()).hexdigest()[:16]
        return {"n": self.n, "seed": self.seed, "rows": digest}


class Work:
    """A labelling in its working folder."""

    def __init__(self, folder: Path):
        """Open a folder that ``begin`` has made."""
        self.folder = folder
        content = json.loads((folder / "work.json").read_text())
        self.content: dict[str, Any] = content
        source = content["source"]
        store = Path(source["store"]) if "store" in source else None
        self.source = structures.Source(store, tuple(map(Path, source.get("files", ()))))
        self.fidelity = Fidelity(**content["fidelity"])

    @property
    def settings_hash(self) -> str:
        return str(self.content["settings_hash"])

    @property
    def journals(self) -> Path:
        return self.folder / "journal"

    def level(self) -> Level:
        """Return the level.

        Raises:
            InputError: the codes here are not those that the labelling was begun with.
        """
        found = levels.find(self.content["level"], self.fidelity.name)
        _refuse_other(self.folder, self.content, {"fidelity": asdict(found.fidelity)})
        return found

    def structures(self) -> structures.Structures:
        return self.source.open(self.folder)

    def chosen(self) -> np.ndarray:
        """Return the indices that are to be labelled, ascending."""
        return np.load(self.folder / "chosen.npy")

    def ledger(self, *prefixes: str) -> Ledger:
        """Return what counts of every structure by the journals whose names start so; by all where none is given."""
        paths = [path for path in sorted(self.journals.glob("*.journal")) if path.name.startswith(prefixes or ("",))]
        return Ledger(paths, len(self.structures().n_atoms))

    def left(self, limits: Limits, ledger: Ledger, among: np.ndarray) -> list[tuple[int, int]]:
        """Return (index, attempt) of what is still to be computed."""
        found = []
        for index in among[ledger.file[among] < 0].tolist():
            record = ledger.failures.get(index)
            if record is None:
                found.append((index, 1))
            elif not record.is_final(limits, MOST_ATTEMPTS):
                found.append((index, record.attempt + 1))
        return found


def settings_hash(fidelity: Fidelity) -> str:
    """Return a hash of what decides a label: theory, code and settings, not the name."""
    text = json.dumps([fidelity.level_of_theory, fidelity.code, fidelity.settings])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def begin(folder: Path, request: Request) -> Work:
    """Make the working folder, or go on in it.

    Raises:
        InputError: the folder holds another labelling, the source cannot be read, or has the labels already.
    """
    level = levels.find(request.level, request.name)
    content = {
        "level": _absolute(request.level),
        "fidelity": asdict(level.fidelity),
        "settings_hash": settings_hash(level.fidelity),
        "source": request.source.describe(),
        **request.subset(),
    }
    note = folder / "work.json"
    if note.is_file():
        before = Work(folder)
        if before.content == content:
            return before
        if len(before.ledger().labelled):  # what has no label yet binds nobody
            _refuse_other(folder, before.content, content)
    shutil.rmtree(folder, ignore_errors=True)  # of a start that was killed before anything was computed
    folder.mkdir(parents=True)
    try:
        if request.source.store is None:
            structures.prepare(request.source.files, folder / "structures")
        found = request.source.open(folder)
        chosen = _chosen(found, request, level.fidelity)
        if not len(chosen):
            raise InputError(f"{request.source.store}: every structure has a {level.fidelity.name} label already")
        np.save(folder / "chosen.npy", chosen)
        write_json(note, content)  # last: what has no work.json binds nobody
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Work(folder)


def _absolute(level: str) -> str:
    """Return a level with an absolute folder: tasks of a cluster may start elsewhere."""
    kind, colon, place = level.partition(":")
    if kind not in ("release", "store") or not colon:
        return level
    path, _, fidelity = place.rpartition("@")
    return f"{kind}:{Path(path).resolve()}@{fidelity}"


def _chosen(found: structures.Structures, request: Request, fidelity: Fidelity) -> np.ndarray:
    free = np.ones(len(found.n_atoms), bool)
    if isinstance(found, structures.OfStore):
        refuse_other_fidelity(found.store.path, fidelity)
        if fidelity.name in found.store.fidelities:
            free &= ~found.store.has(fidelity.name, ENERGY)
    if request.rows is not None:
        wanted = np.zeros(len(free), bool)
        wanted[list(request.rows)] = True
        free &= wanted
    if request.n is not None:
        order = np.random.default_rng(request.seed).permutation(len(free))
        free[order[request.n :]] = False
    return np.flatnonzero(free)


def refuse_other_fidelity(path: Path, fidelity: Fidelity) -> None:
    """Refuse a name that is another level of theory, code or setting in a store; what the store leaves open fits.

    Raises:
        InputError: it is.
    """
    table = Store(path).fidelities
    if fidelity.name not in table:
        return
    there = table[fidelity.name]
    for name in ("level_of_theory", "code", "settings"):
        old, new = getattr(there, name), getattr(fidelity, name)
        if old and old != new:
            raise InputError(
                f"fidelity {fidelity.name!r} is {old!r} in {path} ({name}) and {new!r} here; energies may not be "
                "mixed: give the new one another name with --fidelity"
            )


def _refuse_other(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for key, value in now.items():
        if before.get(key) != value:
            raise InputError(
                f"{folder}: begun with {key} {before.get(key)!r}, now {value!r}; give the same command, or remove the "
                "folder to begin again"
            )
