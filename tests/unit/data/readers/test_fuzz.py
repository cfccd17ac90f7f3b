"""Mutated inputs over all readers: bytes, lengths, keys, units, NaN. Either the ingest says in one error what is wrong
with a file, or every frame of it is stored, merged into a stored one or reported as rejected; a traceback never.

A mutation is a pure function of its number, so a failure is repeated with ``pytest -k fuzz`` and found by its number.
Ingests run in a child process: what kills it is a failure, not the end of the tests.
"""

import bz2
import gzip
import lzma
import os
import pickle
import re
import shutil
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from mffm.config.base import validate
from mffm.config.data import DataConfig
from mffm.data.ingest import ingest
from mffm.data.store import Store
from mffm.errors import InputError

N_FRAMES = 6
SECONDS = 120  # for one ingest of six frames on a busy machine; a reader that loops is a failure
PACKED = {".gz": gzip, ".bz2": bz2, ".xz": lzma}
NUMBER = re.compile(rb"-?\d+\.\d+(?:[eE][-+]?\d+)?")
STRANGE = [
    b"nan",
    b"NaN",
    b"inf",
    b"-Infinity",
    b"1e400",
    b"1e300",
    b"-0",
    b"",
    b"-",
    b"99999999999999999999",
    b"x",
    b"**",
]
UNITS = [
    "eV",
    "meV",
    "Hartree",
    "Hartree/bohr",
    "kcal/mol/Angstrom",
    "GPa",
    "kbar",
    "Ha",
    "",
    "eV/Å",
    "/",
    "eV//Angstrom",
]


class Outcome(NamedTuple):
    """What an ingest came to: the user's error, or a fault of mffm, or a store with every frame accounted for."""

    error: str = ""
    fault: str = ""


def _unpacked(path: Path) -> bytes:
    content = path.read_bytes()
    return PACKED[path.suffix].decompress(content) if path.suffix in PACKED else content


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(PACKED[path.suffix].compress(content) if path.suffix in PACKED else content)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.endswith((".txt.xz", "-lock")))


def _some(rng: np.random.Generator, of: list[Any]) -> Any:
    return of[int(rng.integers(len(of)))]


def flip_bytes(rng: np.random.Generator, folder: Path) -> None:
    """Change up to four bytes, of the packed or the unpacked content."""
    path = _some(rng, _files(folder))
    packed = rng.random() < 0.2
    content = bytearray(path.read_bytes() if packed else _unpacked(path))
    for _ in range(int(rng.integers(1, 5))):
        content[int(rng.integers(len(content)))] = int(rng.integers(256))
    path.write_bytes(content) if packed else _write(path, bytes(content))


def cut(rng: np.random.Generator, folder: Path) -> None:
    """Leave out what follows a place; or a few bytes there; or have them twice."""
    path = _some(rng, _files(folder))
    packed = rng.random() < 0.2
    content = path.read_bytes() if packed else _unpacked(path)
    at, n = int(rng.integers(len(content))), int(rng.integers(1, 30))
    rest = [b"", content[at + n :], content[at : at + n] + content[at:]][int(rng.integers(3))]
    path.write_bytes(content[:at] + rest) if packed else _write(path, content[:at] + rest)


def rename_keys(rng: np.random.Generator, folder: Path) -> None:
    """Give one occurrence of a word another name, or all of them."""
    path = _some(rng, _files(folder))
    content = _unpacked(path)
    words = sorted(set(re.findall(rb"[A-Za-z_]{4,}", content)))
    if not words:
        return
    word = _some(rng, words)
    other = _some(rng, [word[::-1], word.upper(), b"x" * len(word), word[:-1], b"structure", b"energy", b""])
    if path.suffix in (".h5", ".hdf5", ".db", ".aselmdb", ".npy"):
        other = other[: len(word)].ljust(len(word), b"_")  # offsets stay as they are
    places = [m.start() for m in re.finditer(re.escape(word), content)]
    if rng.random() < 0.7:
        at = _some(rng, places)
        content = content[:at] + other + content[at + len(word) :]
    else:
        content = content.replace(word, other)
    _write(path, content)


def strange_numbers(rng: np.random.Generator, folder: Path) -> None:
    """Put what is no number, or no finite one, or one of another size, where a number was."""
    path = _some(rng, _files(folder))
    if path.suffix in (".h5", ".hdf5"):
        _strange_dataset(rng, path)
    elif path.suffix == ".npy":
        _strange_array(rng, path)
    elif path.suffix in (".db", ".aselmdb"):
        _strange_row(rng, path)
    else:
        content = _unpacked(path)
        places = list(NUMBER.finditer(content))
        if places:
            match = _some(rng, places)
            _write(path, content[: match.start()] + _some(rng, STRANGE) + content[match.end() :])


def _spoiled(rng: np.random.Generator, array: np.ndarray) -> np.ndarray:
    """Return an array with a strange value, shape or type."""
    change = int(rng.integers(6))
    if change < 2 and array.dtype.kind == "f" and array.size:
        array = array.copy()
        array.flat[int(rng.integers(array.size))] = _some(rng, [np.nan, np.inf, -np.inf, 1e300, 1e30])
        return array
    shapes = [array[:-1] if array.ndim else array, np.concatenate([array, array]) if array.ndim else array]
    others = [array.ravel(), array[None], np.zeros_like(array), array.astype("f4"), np.array(b"text"), np.float64(1),
              np.zeros((0, *array.shape[1:]))]  # fmt: skip
    return np.asarray(_some(rng, [*shapes, *others]))


def _strange_dataset(rng: np.random.Generator, path: Path) -> None:
    import h5py

    names: list[str] = []
    with h5py.File(path, "a") as file:
        file.visititems(lambda name, member: names.append(name) if isinstance(member, h5py.Dataset) else None)
        name = _some(rng, names)
        value = file[name][()]
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
            del file[name]
            file[name] = _spoiled(rng, value)


def _strange_array(rng: np.random.Generator, path: Path) -> None:
    np.save(path, _spoiled(rng, np.load(path)))


def _strange_row(rng: np.random.Generator, path: Path) -> None:
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.db import connect

    kind = {"type": "aselmdb", "use_lock_file": False} if path.suffix == ".aselmdb" else {}
    with connect(str(path), **kind) as database:
        rows = list(database.select())
    path.unlink()
    spoiled = int(rng.integers(len(rows)))
    with connect(str(path), **kind) as database:
        for k, row in enumerate(rows):
            atoms = row.toatoms()
            results = dict(atoms.calc.results)
            data = dict(row.data)
            if k == spoiled:
                name = _some(rng, ["energy", "forces", "positions", "cell", "charge", "spin"])
                if name in ("charge", "spin"):
                    data[name] = _some(rng, ["x", None, 1e9, [1, 2], 0.5, float("nan"), -3])
                elif name in ("positions", "cell"):
                    values = np.array(getattr(atoms, name))
                    values.flat[0] = _some(rng, [np.nan, np.inf, 1e300, 0.0])
                    (atoms.set_positions if name == "positions" else atoms.set_cell)(values)
                else:
                    results[name] = np.array(results[name]) * _some(rng, [np.nan, np.inf, 1e300])
            atoms.calc = SinglePointCalculator(atoms, **results)
            database.write(atoms, data=data)


FILES: list[Callable[[np.random.Generator, Path], None]] = [flip_bytes, cut, rename_keys, strange_numbers]


def spoil_source(rng: np.random.Generator, source: dict[str, Any], label: dict[str, Any]) -> None:
    """Change units, signs and keys of a source."""
    for _ in range(int(rng.integers(1, 4))):
        prop = _some(rng, ["energy", "forces", "stress"])
        change = int(rng.integers(6))
        if change < 2:
            label.setdefault(prop, {})["unit"] = _some(rng, UNITS)
        elif change == 2:
            label.setdefault(prop, {})["negate"] = bool(rng.integers(2))
        elif change == 3:
            label.setdefault(prop, {})["virial"] = True
        elif change == 4:
            label.setdefault(prop, {})["key"] = _some(
                rng, ["energy", "forces", "stress", "id_0", "magmom", "mp_id", "E"]
            )
        else:
            key = _some(rng, ["length_unit", "frame_key", "group_key", "charge_key", "magnetic_moments_key", "reader"])
            values = (
                ["bohr", "nm"] if key == "length_unit" else ["energy", "forces", "group", "frame", "formula", "id_0"]
            )
            source[key] = _some(
                rng, values if key != "reader" else ["extxyz", "json", "hdf5", "vasp", "ase_db", "deepmd"]
            )


def attempt(content: dict[str, Any], folder: Path) -> Outcome:
    """Ingest, and look at the store as a training would."""
    try:
        report = ingest(validate(DataConfig, content, "fuzz"), folder, progress=False)
        store = Store(report.store)
        store.verify()
        for row in range(store.n_frames):
            frame = store.frame(row)
            values = [frame.positions, frame.cell, *frame.labels.values()]
            if not all(np.isfinite(v).all() for v in values):
                return Outcome(fault=f"row {row} of the store is not finite")
        total, expected = report.n_frames + report.n_merged + report.n_rejected, int((folder / "expected").read_text())
        return Outcome(fault=f"{total} of {expected} frames are accounted for" if total < expected else "")
    except InputError as error:
        return Outcome(error=str(error) or "an error without a message")
    except BaseException:  # noqa: BLE001 (what a user would see as a traceback is the finding)
        return Outcome(fault=traceback.format_exc())


def in_children(cases: list[Callable[[], tuple[dict[str, Any], Path]]], log: Path) -> list[Outcome]:
    """Return what ``attempt`` says of each case, from processes that may die of one; the next one goes on after it."""
    outcomes: list[Outcome] = []
    while len(outcomes) < len(cases):
        log.unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest-timeout's would print and go on
            with log.open("ab") as file:
                for case in cases[len(outcomes) :]:
                    signal.alarm(SECONDS)
                    pickle.dump(attempt(*case()), file)
                    file.flush()
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        with log.open("rb") as file:
            while file.peek(1):
                outcomes.append(pickle.load(file))
        if status:
            ended = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {status}"
            outcomes.append(Outcome(fault=f"the process ended by {ended}"))
    return outcomes


def frames_begun(name: str, folder: Path) -> int:
    """Return how many frames a file that was cut still has the beginning of; of formats that cannot tell, all."""
    begin = {"extxyz": rb"^\d+[ \t\r]*\n", "oc20": rb"^\d+[ \t\r]*\n", "vasp": rb"<calculation>"}.get(name)
    if begin is None:
        return N_FRAMES
    (path,) = _files(folder)
    try:
        return min(N_FRAMES, len(re.findall(begin, _unpacked(path), re.MULTILINE)))
    except lzma.LZMAError:
        return N_FRAMES


class Case:
    """One mutation of one layout."""

    def __init__(self, number: int, layouts: Any, data_yaml: Any, pristine: Path, folder: Path):
        names = sorted(layouts)
        self.number, self.data_yaml, self.pristine, self.folder = number, data_yaml, pristine, folder
        self.name = names[number % len(names)]
        self.fidelity = layouts[self.name].fidelity
        kind = number // len(names) % (len(FILES) + 1)
        self.mutate = FILES[kind] if kind < len(FILES) else None
        self.what = self.mutate.__name__ if self.mutate else "spoil_source"

    def __call__(self) -> tuple[dict[str, Any], Path]:
        """Write the mutated set and return its data YAML and its folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.pristine / self.name, self.folder / "set")
        rng = np.random.default_rng(self.number)
        content = self.data_yaml(self.name, self.folder)
        if self.mutate is not None:
            self.mutate(rng, self.folder / "set")
        else:
            label: dict[str, Any] = {}
            spoil_source(rng, content["sources"][0], label)
            content["sources"][0]["labels"] = {self.fidelity: label} if label else {}
        expected = N_FRAMES
        if self.mutate is cut or self.name == "vasp":
            expected = frames_begun(self.name, self.folder / "set")
        (self.folder / "expected").write_text(str(expected))
        return content, self.folder


def run(numbers: range, layouts: Any, data_yaml: Any, tmp_path: Path) -> None:
    pristine = tmp_path / "pristine"
    for name, layout in layouts.items():
        (pristine / name).mkdir(parents=True)
        layout.write(pristine / name, layout.make(N_FRAMES))
    cases = [Case(number, layouts, data_yaml, pristine, tmp_path / "case") for number in numbers]
    outcomes = in_children(cases, tmp_path / "outcomes")
    faults = [f"{c.number} ({c.name}, {c.what}): {o.fault}" for c, o in zip(cases, outcomes, strict=True) if o.fault]
    assert not faults, f"{len(faults)} of {len(numbers)}\n" + "\n".join(faults)
    refused = sum(bool(outcome.error) for outcome in outcomes) / len(outcomes)
    assert 0.1 < refused < 0.9, "the mutations do not reach the files, or only destroy them"


@pytest.mark.timeout(1200)
def test_fuzz(layouts: Any, data_yaml: Any, tmp_path: Path) -> None:
    run(range(100), layouts, data_yaml, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fuzz_of_two_thousand(layouts: Any, data_yaml: Any, tmp_path: Path) -> None:
    run(range(100, 2100), layouts, data_yaml, tmp_path)
