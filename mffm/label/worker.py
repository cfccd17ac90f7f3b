"""One worker process: structures one at a time, each recorded in the worker's own journal before the next is begun."""

import os
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lmdb

from mffm.data.checks import frame_fault
from mffm.data.records import disk_error
from mffm.data.workers import end_with_parent
from mffm.errors import InputError
from mffm.frame import Frame
from mffm.label.journal import SYNC_SECONDS, Journal, Record
from mffm.label.level import Label, Level, classify, import_all
from mffm.label.work import MOST_ATTEMPTS, Work

MIN_DISTANCE = 0.3  # Å; what an ingest rejects as overlapping atoms
MESSAGE_LENGTH = 400

# What a worker shares with its supervisor: 64-bit numbers.
CURRENT, ATTEMPT, STARTED_NS, LABELS, FAILURES = range(5)
N_SHARED = 5
IDLE = -1


def run(folder: str, name: str, shared: Any, connection: Connection) -> None:
    """Label the chunks of (index, attempt) that come through the connection, until None comes.

    Answers each chunk with ``("done", "")``; ``("stop", message)`` where no worker could go on.
    """
    end_with_parent()
    try:
        work = Work(Path(folder))
        level, structures = work.level(), work.structures()
        import_all(level.modules)
        journal = Journal(work.journals, name)
        synced = time.monotonic()
        while (chunk := connection.recv()) is not None:
            _label_chunk(chunk, level, structures, journal, shared)
            if time.monotonic() - synced > SYNC_SECONDS:
                journal.sync()
                synced = time.monotonic()
            connection.send(("done", ""))
        journal.close()
    except (InputError, OSError, lmdb.Error) as error:
        explained = disk_error(error, Path(folder))
        connection.send(("stop", str(explained or error)))


def _label_chunk(
    chunk: Sequence[tuple[int, int]], level: Level, structures: Any, journal: Journal, shared: Any
) -> None:
    for index, first in chunk:
        frame = structures.get(index)
        for attempt in range(first, MOST_ATTEMPTS + 1):
            shared[ATTEMPT], shared[STARTED_NS] = attempt, time.monotonic_ns()
            shared[CURRENT] = index
            record, label = attempted(level, frame, index, attempt)
            journal.append(record, label)
            if record.is_label or record.error_class != "unknown":
                break
        shared[LABELS if record.is_label else FAILURES] += 1
        shared[CURRENT] = IDLE


def attempted(level: Level, frame: Frame, index: int, attempt: int) -> tuple[Record, Label | None]:
    """Return the record of one attempt, and the label where there is one."""
    wall, cpu = time.perf_counter_ns(), time.process_time_ns()
    label: Label | None = None
    error_class = message = ""
    try:
        fault = frame_fault(frame, MIN_DISTANCE) or level.fault(frame)
        if fault:
            raise InputError(fault)
        label = level.compute(frame)
        label.check(frame.n_atoms)
    except Exception as error:  # noqa: BLE001 - any engine's error is this label's failure, not the run's
        label, error_class = None, classify(error)
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        message = (kind + " ".join(str(error).split()))[:MESSAGE_LENGTH]
    return Record(
        index=index,
        frame_id=frame.frame_id,
        attempt=attempt,
        status="failed" if label is None else "ok",
        error_class=error_class,
        error=message,
        cpu_ns=time.process_time_ns() - cpu,
        wall_ns=time.perf_counter_ns() - wall,
        converged=True if label is not None else False if error_class == "convergence" else None,
        info={} if label is None else label.info,
    ), label


def resident_bytes(pid: int) -> int:
    """Return the memory of a process; 0 where it has gone or there is no /proc."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0
