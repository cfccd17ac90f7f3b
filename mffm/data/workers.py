"""What an ingest runs on: worker processes with a bounded number of chunks under way, and a progress bar."""

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from typing import Any

from mffm.data.readers.chunk import Chunk
from mffm.errors import InputError

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
Call = tuple[Any, Callable[..., Any], tuple[Any, ...]]


def end_with_parent() -> None:
    """Let a worker end when its parent was killed; it would wait for ever. Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()

    def watch() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Workers:
    """Calls in this process, or in ``workers`` others with a bounded number under way."""

    def __init__(self, workers: int):
        self.workers = workers
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        if self.workers > 1:
            # spawn: a forked child would inherit the open LMDB file, and threads of a caller that uses torch.
            self._executor = ProcessPoolExecutor(
                self.workers, mp_context=get_context("spawn"), initializer=end_with_parent
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: Any) -> None:
        """End the workers.

        Raises:
            InputError: one of them was killed.
        """
        if self._executor is None:
            return
        if kind is not None:  # nobody waits for what is under way, which may be minutes of reading
            for process in list((self._executor._processes or {}).values()):
                process.terminate()
        self._executor.shutdown(wait=True, cancel_futures=True)
        if kind is BrokenProcessPool:
            raise InputError(
                f"one of {self.workers} worker processes ended unexpectedly (out of memory?); what was read is kept: "
                "run the same command again, with fewer workers"
            ) from exception[0]

    def submit(self, function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Start a call; in this process it is done, or has raised, on return."""
        if self._executor is not None:
            return self._executor.submit(function, *arguments)
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future

    def in_order(self, calls: Iterable[Call]) -> Iterator[tuple[Any, Any]]:
        """Yield (tag, result) of calls (tag, function, arguments), in their order."""
        pending: deque[tuple[Any, Future[Any]]] = deque()
        for tag, function, arguments in calls:
            pending.append((tag, self.submit(function, *arguments)))
            if self._executor is None or len(pending) > 3 * self.workers:
                done, future = pending.popleft()
                yield done, future.result()
        while pending:
            done, future = pending.popleft()
            yield done, future.result()

    def over_chunks(
        self, process: Callable[[Chunk, Any], Any], chunks: Iterable[Chunk], settings: Any
    ) -> Iterator[tuple[Chunk, Any]]:
        """Yield (chunk without its payload, what ``process`` made of it), in order."""
        return self.in_order((chunk._replace(payload=None), process, (chunk, settings)) for chunk in chunks)


class Meter:
    """A progress bar, of an ingest by bytes of the sources; plain lines where the output is not a terminal."""

    def __init__(self, total: int, show: bool, name: str = "ingest"):
        self.total = max(total, 1)
        self.name = name
        self.show = show
        self._bar: Any = None
        self._next_line = time.monotonic() + 10

    def __enter__(self) -> "Meter":
        if self.show:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            console = Console(stderr=True)
            if console.is_terminal:
                columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
                self._bar = Progress(*columns, TimeRemainingColumn(), console=console)
                self._task = self._bar.add_task(self.name, total=self.total)
                self._bar.start()
        return self

    def update(self, done: int, state: dict[str, Any]) -> None:
        text = f"{state['n_rows']} frames" + (f", {state['n_rejected']} rejected" if "n_rejected" in state else "")
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text)
        elif self.show and time.monotonic() > self._next_line:
            print(f"{self.name}: {100 * done // self.total} %, {text}", file=sys.stderr, flush=True)
            self._next_line = time.monotonic() + 10

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Give processes that start inside one thread each for their numerics: many that wait for each other cost more."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
