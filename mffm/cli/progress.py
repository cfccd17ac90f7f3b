"""Progress of long commands: bars on a terminal, elsewhere plain lines."""

import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PLAIN_LINE_SECONDS = 30.0


def bar() -> Progress:
    """Return a progress bar on a terminal's stderr; elsewhere it shows nothing."""
    stderr = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, TimeRemainingColumn(), console=stderr, disable=not stderr.is_terminal)


class Stages:
    """A bar for each stage on a terminal; elsewhere a line every half minute, with the rate and the time left."""

    def __init__(self) -> None:
        self._bar = bar()
        self._tasks: dict[str, TaskID] = {}
        self._stage = ""
        self._first = self._done = 0
        self._started = self._told = time.monotonic()

    def __enter__(self) -> "Stages":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    @property
    def done_now(self) -> int:
        """Of this stage, without what was done before it was first told."""
        return self._done - self._first

    @property
    def rate(self) -> float:
        """A second, in this stage."""
        return self.done_now / max(time.monotonic() - self._started, 1e-9)

    def __call__(self, stage: str, done: int, total: int | None, note: str = "") -> None:
        """Show how much of a stage is done; ``note`` is one more thing to know."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._first, self._started, self._told = stage, done, now, now
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage, total=total)
        self._done = done
        told = f"{stage}, {note}" if note else stage
        self._bar.update(self._tasks[stage], completed=done, total=total, description=told)
        if not self._bar.disable or now - self._told < PLAIN_LINE_SECONDS:
            return
        self._told = now
        rate = self.rate
        left = f", {rate:.3g} a second" if rate else ""
        left += f", {(total - done) / rate / 60:.1f} min left" if rate and total else ""
        print(f"{told}: {done}{f' of {total}' if total else ''}{left}", file=sys.stderr, flush=True)
