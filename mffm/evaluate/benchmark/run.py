"""Runs tasks in a folder: records are appended structure by structure, so that a run goes on after any end.

``FOLDER/<suite>/<task>/`` has ``structures.jsonl`` (a record a structure), ``identity.json`` (what they belong to),
``workers.log`` (what calculators print), ``score.json``, a parity plot and what a submission to the suite needs.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mffm import plots
from mffm.errors import InputError, known
from mffm.evaluate.benchmark import suites
from mffm.evaluate.benchmark.pool import Record, Work, compute
from mffm.evaluate.benchmark.source import Source
from mffm.evaluate.benchmark.task import DataFile, Options, Presence, Score, Task, name_of
from mffm.evaluate.matbench_discovery.phonondb import Kappa103, transport
from mffm.executor import locked, machine
from mffm.release import sha256, write_json

FORMAT = 1
Progress = Callable[[str, int, int], None]  # task, structures done, structures in all


@dataclass(frozen=True)
class Settings:
    """How a run is carried out; none of this changes a result but ``options``.

    Attributes:
        data: folder with the suites' files.
        workers: processes, one thread each.
        time_limit: seconds a structure.
        limit: only so many structures of each task, chosen by a hash of their ids: a larger number contains a smaller.
        structures: only these, of the tasks that have them; before ``limit``.
        retry_failed: compute again what failed before.
    """

    data: Path
    workers: int = 1
    time_limit: float = 3600.0
    limit: int | None = None
    structures: Sequence[str] = ()
    retry_failed: bool = False
    options: Options = field(default_factory=Options)


@dataclass(frozen=True)
class Finished:
    """A task that was run."""

    task: Task
    fidelity: str | None
    score: Score
    records: Sequence[Record]
    n_of_set: int  # structures in the whole set
    folder: Path
    machine: str

    @property
    def is_whole(self) -> bool:
        """Whether every structure of the set was asked for."""
        return self.score.n == self.n_of_set


@dataclass(frozen=True)
class NotRun:
    """A task whose data are not there."""

    task: Task
    missing: Sequence[tuple[DataFile, Presence]]


Outcome = Finished | NotRun


def run_task(source: Source, name: str, settings: Settings, folder: Path, progress: Progress) -> Outcome:
    """Run a task, or go on with it, and score it.

    Args:
        folder: of the run; the task gets its own below.

    Raises:
        InputError: the folder has records of another potential, fidelity or setting; the calculator cannot be had.
    """
    task = suites.task(name)
    missing = [(f, state) for f in task.files if (state := f.check(settings.data)) != "present"]
    if missing:
        return NotRun(task, missing)
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    items = task.load(settings.data)
    chosen = subset(_named(items, settings.structures, name), settings.limit)
    with locked(place / "lock"):
        _agree(place / "identity.json", _identity(source, task, settings))
        records = _read(place / "structures.jsonl", settings.retry_failed)
        done = sum(i in records for i in chosen)
        progress(name, done, len(chosen))
        todo = [i for i in chosen if i not in records]
        work = Work(source, (suites.__name__, "task", name), settings.data, settings.options, place / "workers.log")
        with _appending(place / "structures.jsonl") as append:
            for record in compute(work, todo, settings.workers, settings.time_limit) if todo else ():
                append(record)
                records[record.id] = record
                done += 1
                progress(name, done, len(chosen))
        wanted = {i: items[i] for i in chosen}
        results = {i: r.result for i in chosen if (r := records[i]).result is not None}
        score = task.score(wanted, results)
        task.write(wanted, results, place)
        finished = Finished(task, source.fidelity, score, [records[i] for i in chosen], len(items), place, machine())
        _write_score(finished)
    return finished


def subset(ids: Sequence[str], limit: int | None) -> list[str]:
    """Return all ids, or the first ``limit`` by a hash of the id, in the set's order."""
    if limit is None or limit >= len(ids):
        return list(ids)
    chosen = set(sorted(ids, key=lambda i: hashlib.sha256(i.encode()).digest())[:limit])
    return [i for i in ids if i in chosen]


def _named(items: Mapping[str, Any], wanted: Sequence[str], task: str) -> list[str]:
    unknown = [i for i in wanted if i not in items]
    if unknown:
        raise InputError(
            f"{task} has no structure {unknown[0]!r}; its {len(items)} begin with {known(list(items)[:5])}"
        )
    return list(wanted or items)


def _identity(source: Source, task: Task, settings: Settings) -> dict[str, Any]:
    found = {
        "format": FORMAT,
        "task": name_of(task),
        "fidelity": source.fidelity,
        **source.identity(),
        "options": asdict(settings.options),
    }
    # Files with a checksum were checked against it.
    data = {f.path: _digest(settings.data / f.path) for f in task.files if f.checksum is None}
    if data:
        found["data_sha256"] = data
    if isinstance(task, Kappa103):  # phono3py decides the formulation, and their values differ
        try:
            found["transport"] = transport()
        except ImportError as error:
            raise InputError(f"{found['task']}: {error}; install it, e.g. pip install 'mffm[properties]'") from error
    return found


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of the names and digests of all files of a folder."""
    if not path.is_dir():
        return sha256(path)
    lines = (f"{p.relative_to(path).as_posix()} {sha256(p)}\n" for p in sorted(path.rglob("*")) if p.is_file())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _agree(path: Path, identity: Mapping[str, Any]) -> None:
    """Write the identity of a folder's records, or check that they are of the same."""
    identity = json.loads(json.dumps(identity))
    if not path.is_file():
        write_json(path, identity)
        return
    found = json.loads(path.read_text())
    differing = [k for k in {**found, **identity} if found.get(k) != identity.get(k)]
    if differing:
        key = differing[0]
        raise InputError(
            f"{path.parent}: has results of {key} {found.get(key)!r}, this run is of {identity.get(key)!r}; "
            "give another --output, or remove the folder"
        )


def _read(path: Path, retry_failed: bool) -> dict[str, Record]:
    """Return the records of earlier starts; cut off a line that was being written at the end."""
    if not path.is_file():
        return {}
    whole, records = [], {}
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = Record(**json.loads(line))
        except (ValueError, TypeError):
            if line.endswith(b"\n"):
                raise InputError(f"{path}: damaged record {line[:60]!r}; remove the line") from None
            continue
        if not (retry_failed and record.result is None):
            records[record.id] = record
            whole.append(line if line.endswith(b"\n") else line + b"\n")
    aside = path.with_suffix(".partial")
    aside.write_bytes(b"".join(whole))
    os.replace(aside, path)
    return records


@contextmanager
def _appending(path: Path) -> Iterator[Callable[[Record], None]]:
    """Append records so that each is on disk when the call returns."""
    with path.open("ab") as file:

        def append(record: Record) -> None:
            file.write(json.dumps(asdict(record), allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

        yield append


def _write_score(finished: Finished) -> None:
    score, records = finished.score, finished.records
    write_json(
        finished.folder / "score.json",
        {
            "task": name_of(finished.task),
            "fidelity": finished.fidelity,
            "metrics": {k: None if v is None or math.isnan(v) else v for k, v in score.metrics.items()},
            "unit": score.unit,
            "n": score.n,
            "n_failed": score.n_failed,
            "n_of_set": finished.n_of_set,
            "remark": score.remark,
            "failed": {r.id: [r.reason, r.message] for r in records if r.result is None},
            "doubtful": {r.id: r.doubt for r in records if r.doubt is not None},
            "seconds": sum(r.seconds for r in records),
            "machine": finished.machine,
        },
    )
    if score.panels:
        try:
            plots.parity(finished.folder / "parity.png", score.panels)
        except ImportError:
            return  # matplotlib comes with mffm[train]; the report says that there is no plot
