"""Workers and who watches them: a limit that is passed, or a death, costs one structure and is recorded as its failure.

Workers write their own journals; the supervisor only hands out chunks, looks at clock and memory, and replaces workers.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from mffm.data.workers import one_thread_each
from mffm.errors import InputError
from mffm.failures import ending
from mffm.label.journal import Journal, Limits, Record, read
from mffm.label.level import ErrorClass
from mffm.label.work import MOST_ATTEMPTS, Work
from mffm.label.worker import (
    ATTEMPT,
    CURRENT,
    FAILURES,
    IDLE,
    LABELS,
    N_SHARED,
    STARTED_NS,
    resident_bytes,
    run,
)

LARGEST_CHUNK = 100  # structures; of milliseconds each, so that handing over costs nothing
WATCH_SECONDS = 0.1
GROWN_BYTES = 1 << 30  # a worker that has grown so much leaks: it is replaced
MOST_STILLBORN = 3  # workers in a row that die before their first structure


@dataclass
class _Worker:
    process: SpawnProcess
    connection: Connection
    shared: Any
    name: str
    chunk: list[tuple[int, int]] = field(default_factory=list)
    first_bytes: int = 0


class Pool:
    """Labels structures with processes of this machine.

    Args:
        prefix: of the names of the journals.
        progress: called with the numbers of labels and of failures of this run, several times a second.
    """

    def __init__(
        self, work: Work, workers: int, limits: Limits, prefix: str, progress: Callable[[int, int], None]
    ) -> None:
        if limits.gigabytes is not None and not resident_bytes(os.getpid()):
            raise InputError("--memory-limit needs /proc, which this system does not have; leave it out")
        self.work, self.n_workers, self.limits, self.prefix, self.progress = work, workers, limits, prefix, progress
        self._todo: deque[tuple[int, int]] = deque()
        self._workers: list[_Worker] = []
        self._journal: Journal | None = None
        self._counts = [0, 0]
        self._n_started = self._n_stillborn = 0

    def run(self, todo: Sequence[tuple[int, int]]) -> None:
        """Label (index, attempt) pairs; every one has a record at the end.

        What an exception (an interrupt, a full disk) leaves undone, a later call can do.

        Raises:
            InputError: a code cannot be started, or nothing more can be written.
        """
        self._todo.extend(todo)
        try:
            for _ in range(min(self.n_workers, len(self._todo))):
                self._start()
            while self._todo or any(worker.chunk for worker in self._workers):
                self._step()
                self._report()
            for worker in self._workers:
                self._end(worker)
        finally:
            for worker in self._workers:
                worker.process.kill()  # a journal survives it
                worker.process.join()
            if self._journal is not None:
                self._journal.close()
        self._report()

    def _step(self) -> None:
        for worker in list(self._workers):
            if not worker.chunk and self._todo:
                self._hand_out(worker)
        busy = {worker.connection: worker for worker in self._workers if worker.chunk}
        for connection in wait(list(busy), timeout=WATCH_SECONDS):
            self._hear(busy[connection])  # type: ignore[index]
        for worker in [worker for worker in self._workers if worker.chunk]:
            self._watch(worker)

    def _start(self) -> None:
        context = get_context("spawn")
        shared = context.RawArray("q", N_SHARED)
        shared[CURRENT] = IDLE
        ours, theirs = context.Pipe()
        self._n_started += 1
        name = f"{self.prefix}-{time.time_ns():x}-{os.getpid()}-{self._n_started}"
        process = context.Process(target=run, args=(str(self.work.folder), name, shared, theirs), daemon=True)
        with one_thread_each():
            process.start()
        theirs.close()  # else nobody would see the end of the process here
        self._workers.append(_Worker(process, ours, shared, name))

    def _hand_out(self, worker: _Worker) -> None:
        size = max(1, min(LARGEST_CHUNK, len(self._todo) // (4 * self.n_workers)))
        worker.chunk = [self._todo.popleft() for _ in range(min(size, len(self._todo)))]
        try:
            worker.connection.send(worker.chunk)
        except OSError:
            self._died(worker)

    def _hear(self, worker: _Worker) -> None:
        try:
            what, message = worker.connection.recv()
        except (EOFError, OSError):
            self._died(worker)
            return
        if what == "stop":
            raise InputError(message)
        worker.chunk = []
        self._n_stillborn = 0
        used = resident_bytes(worker.process.pid or 0)
        worker.first_bytes = worker.first_bytes or used
        allowed = GROWN_BYTES if self.limits.gigabytes is None else min(GROWN_BYTES, self.limits.gigabytes * 2.5e8)
        if used - worker.first_bytes > allowed:
            self._end(worker)
            self._start()

    def _watch(self, worker: _Worker) -> None:
        """End a worker whose structure has passed a limit."""
        index, started = worker.shared[CURRENT], worker.shared[STARTED_NS]
        if index == IDLE:
            return
        seconds = (time.monotonic_ns() - started) * 1e-9
        used = resident_bytes(worker.process.pid or 0) * 1e-9
        if self.limits.gigabytes is not None and used > self.limits.gigabytes:
            reason = f"used {used:.2f} GB of memory, more than {self.limits.gigabytes:g} GB (--memory-limit)"
            limit = {"gigabytes": self.limits.gigabytes}
        elif self.limits.seconds is not None and seconds > self.limits.seconds:
            reason = f"not done after {self.limits.seconds:g} s (--time-limit)"
            limit = {"seconds": self.limits.seconds}
        else:
            return
        worker.process.kill()
        worker.process.join()
        if worker.shared[CURRENT] == index:  # else it was done in the same moment
            self._died(worker, "resource", reason, limit)
        else:
            self._died(worker)

    def _died(
        self,
        worker: _Worker,
        error_class: ErrorClass = "lost",
        reason: str = "",
        limit: dict[str, float] | None = None,
    ) -> None:
        """Record the structure that a worker died of, put back the others of its chunk, start another worker."""
        worker.process.join()
        code = worker.process.exitcode or 0
        path = self.work.journals / f"{worker.name}.journal"
        recorded = {(record.index, record.attempt) for record, _, _ in read(path)} if path.is_file() else set()
        done = {index for index, _ in recorded}
        index, attempt = worker.shared[CURRENT], worker.shared[ATTEMPT]
        left = [pair for pair in worker.chunk if pair[0] not in done and pair[0] != index]
        if (index, attempt) in recorded:  # it died between the record and the next structure
            self._n_stillborn = 0
        elif index == IDLE:
            self._n_stillborn += 1
            if self._n_stillborn == MOST_STILLBORN:
                raise InputError(
                    f"{self.work.folder}: {MOST_STILLBORN} worker processes in a row ended before their first "
                    f"structure, the last with {ending(code)}; what they printed is above"
                )
        else:
            how = reason or f"the worker process ended: {ending(code)}" + (
                ", as the kernel does when memory runs out" if code == -9 else ""
            )
            record = Record(
                index=index, frame_id=self.work.structures().get(index).frame_id, attempt=attempt, status="failed",
                error_class=error_class, error=how, wall_ns=time.monotonic_ns() - worker.shared[STARTED_NS],
                limit=limit or {},
            )  # fmt: skip
            self._record(record)
            if not record.is_final(self.limits, MOST_ATTEMPTS):
                left.insert(0, (index, attempt + 1))
            else:
                self._counts[1] += 1
        self._todo.extendleft(reversed(left))
        worker.chunk = []
        self._forget(worker)
        self._start()

    def _record(self, record: Record) -> None:
        if self._journal is None:
            self._journal = Journal(self.work.journals, f"{self.prefix}-{time.time_ns():x}-{os.getpid()}-deaths")
        self._journal.append(record, None)

    def _end(self, worker: _Worker) -> None:
        """Let a worker close its journal and end."""
        try:
            worker.connection.send(None)
            if worker.connection.poll(None):  # its end, or why it could not
                raise InputError(worker.connection.recv()[1])
        except (EOFError, OSError):
            pass
        worker.process.join()
        self._forget(worker)

    def _forget(self, worker: _Worker) -> None:
        if worker in self._workers:
            self._workers = [other for other in self._workers if other is not worker]
            self._counts[0] += worker.shared[LABELS]
            self._counts[1] += worker.shared[FAILURES]
        worker.connection.close()

    def _report(self) -> None:
        labels = self._counts[0] + sum(worker.shared[LABELS] for worker in self._workers)
        failures = self._counts[1] + sum(worker.shared[FAILURES] for worker in self._workers)
        self.progress(labels, failures)
