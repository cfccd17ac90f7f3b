"""What an ingest runs on: worker processes with a bounded number of chunks under way, and a progress bar."""

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from typing import Any

from mffm.data.readers.chunk import Chunk


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
    """Run ``process`` over chunks, in order: in this process, or in ``workers`` others with a bounded number under
    way.
    """

    def __init__(self, workers: int, process: Callable[[Chunk, Any], Any]):
        self.workers = workers
        self.process = process
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Any:
        if self.workers > 1:
            # spawn: a forked child would inherit the open LMDB file, and threads of a caller that uses torch.
            self._executor = ProcessPoolExecutor(
                self.workers, mp_context=get_context("spawn"), initializer=end_with_parent
            )
        return self._run

    def __exit__(self, *exception: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def _run(self, chunks: Iterator[Chunk], settings: Any) -> Iterator[tuple[Chunk, Any]]:
        if self._executor is None:
            for chunk in chunks:
                yield chunk._replace(payload=None), self.process(chunk, settings)
            return
        pending: deque[tuple[Chunk, Future[Any]]] = deque()
        for chunk in chunks:
            pending.append((chunk._replace(payload=None), self._executor.submit(self.process, chunk, settings)))
            if len(pending) > 3 * self.workers:
                done, future = pending.popleft()
                yield done, future.result()
        for done, future in pending:
            yield done, future.result()


class Meter:
    """A progress bar by bytes of the sources; plain lines where the output is not a terminal."""

    def __init__(self, total: int, show: bool):
        self.total = max(total, 1)
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
                self._task = self._bar.add_task("ingest", total=self.total)
                self._bar.start()
        return self

    def update(self, done: int, state: dict[str, Any]) -> None:
        text = f"{state['n_rows']} frames, {state['n_rejected']} rejected"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text)
        elif self.show and time.monotonic() > self._next_line:
            print(f"ingest: {100 * done // self.total} % of the sources, {text}", file=sys.stderr, flush=True)
            self._next_line = time.monotonic() + 10

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
