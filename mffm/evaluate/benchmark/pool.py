"""Worker processes that compute one structure at a time, and survive whatever a calculator does.

Each has a calculator and one thread. One that hangs is killed, one that died is replaced; the structure that it was at
is reported as failed. Workers end with the process that started them, also when that is killed.
"""

import importlib
import multiprocessing
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

from mffm.data.workers import end_with_parent, one_thread_each
from mffm.errors import InputError, told
from mffm.evaluate.benchmark.source import Source
from mffm.evaluate.benchmark.task import Options, Task, checked
from mffm.failures import ending

Reason = Literal["raised", "not finite", "time limit", "died"]
START_LIMIT = 600.0  # s, to import packages, build the calculator and read the data
POLL = 0.5  # s


@dataclass(frozen=True)
class Work:
    """What every worker needs to know.

    Attributes:
        source: of the calculator.
        task: module and name of a function that returns the task, and its argument: a task itself need not be pickled.
        data: folder with the task's files.
        log: file for what calculators print.
    """

    source: Source
    task: tuple[str, str, str]
    data: Path
    options: Options
    log: Path


@dataclass(frozen=True)
class Record:
    """The end of one structure: a result, or the reason why there is none.

    Attributes:
        seconds: wall time of this structure.
        doubt: why a result is absurd, None where it is not.
    """

    id: str
    seconds: float
    result: dict[str, Any] | None = None
    doubt: str | None = None
    reason: Reason | None = None
    message: str = ""


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    since: float
    is_ready: bool = False
    at: str | None = None  # id of the structure it works on


def compute(work: Work, ids: Sequence[str], workers: int, limit: float) -> Iterator[Record]:
    """Compute structures and yield their records as they end, in no fixed order.

    Args:
        workers: processes; no more than there are structures are started.
        limit: seconds a structure.

    Raises:
        InputError: no worker could start: the calculator or the data cannot be had.
    """
    waiting = deque(ids)
    team: list[_Worker] = []
    try:
        while waiting or any(w.at is not None for w in team):
            while len(team) < min(workers, len(waiting) + sum(w.at is not None for w in team)):
                team.append(_start(work))
            for worker in team:
                if worker.is_ready and worker.at is None and waiting:
                    worker.at, worker.since = waiting.popleft(), time.monotonic()
                    with suppress(OSError):  # it has died meanwhile, which `_news` finds
                        worker.connection.send(worker.at)
            wait([w.connection for w in team], POLL)
            for worker in list(team):
                record = _news(worker, limit)
                if record is not None:
                    yield record
                if worker.process.exitcode is not None:
                    team.remove(worker)
    finally:
        for worker in team:
            worker.process.kill()
            worker.process.join()


def _start(work: Work) -> _Worker:
    context = multiprocessing.get_context("spawn")  # forks of a process with threads of torch hang
    here, there = context.Pipe()
    process = context.Process(target=_main, args=(there, work), daemon=True)
    with one_thread_each():
        process.start()
    there.close()
    return _Worker(process, here, time.monotonic())


def _news(worker: _Worker, limit: float) -> Record | None:
    """Return the record of a structure that ended, one way or another; stop a worker that hangs."""
    elapsed = time.monotonic() - worker.since
    if worker.connection.poll():
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):  # ended, perhaps within a message
            return _dead(worker, elapsed)
        if message[0] == "ready":
            worker.is_ready = True
            return None
        if message[0] == "cannot start":
            raise InputError(message[1])
        worker.at = None
        return message[1]
    if worker.process.exitcode is not None:
        return _dead(worker, elapsed)
    if elapsed > (limit if worker.is_ready else START_LIMIT) and (worker.at is not None or not worker.is_ready):
        worker.process.kill()
        worker.process.join()
        if not worker.is_ready:
            raise InputError(f"no calculator after {START_LIMIT:g} s; try to build it in a Python session")
        record = Record(str(worker.at), elapsed, reason="time limit", message=f"more than {limit:g} s")
        worker.at = None
        return record
    return None


def _dead(worker: _Worker, elapsed: float) -> Record | None:
    worker.process.join()
    how = ending(worker.process.exitcode or 0)
    if worker.at is None:
        if not worker.is_ready:
            raise InputError(f"the calculator's process ended when it started: {how}; see the log of the workers")
        return None
    record = Record(worker.at, elapsed, reason="died", message=f"the process ended: {how}")
    worker.at = None
    return record


def _main(connection: Connection, work: Work) -> None:
    """Body of a worker."""
    end_with_parent()
    log = os.open(work.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):  # calculators print, also from C
        os.dup2(log, stream)
    try:
        calculator = work.source.build()
        _one_thread()
        module, function, argument = work.task
        task: Task = getattr(importlib.import_module(module), function)(argument)
        items = task.load(work.data)
    except Exception as error:  # noqa: BLE001 - told to the user by the process that started this one
        traceback.print_exc()
        connection.send(("cannot start", told(error) or f"{type(error).__name__}: {error}; see {work.log}"))
        return
    connection.send(("ready", None))
    while True:
        try:
            name = connection.recv()
        except EOFError:
            return
        started = time.monotonic()
        try:
            result = checked(task.run(items[name], calculator, work.options))
            record = Record(name, time.monotonic() - started, result, task.doubt(items[name], result))
        except FloatingPointError as error:
            record = Record(name, time.monotonic() - started, reason="not finite", message=str(error))
        except ImportError as error:  # true of every structure, and mended by an installation: nobody's failure
            traceback.print_exc()
            message = f"{name}: {error}; install it, e.g. pip install 'mffm[properties,d3]'"
            connection.send(("cannot start", message))
            return
        except Exception as error:  # noqa: BLE001 - whatever a calculator raises is this structure's failure
            print(f"{name}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            message = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            record = Record(name, time.monotonic() - started, reason="raised", message=message)
        if record.result is None and hasattr(calculator, "reset"):
            calculator.reset()  # no half-made results of the structure that failed
        connection.send(("record", record))


def _one_thread() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
