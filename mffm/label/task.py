"""One task of a cluster: ``python -m mffm.label.task FOLDER PART WORKERS [--seconds S] [--gigabytes G]``."""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from mffm.errors import InputError
from mffm.label.journal import Limits
from mffm.label.pool import Pool
from mffm.label.work import Work

LINE_SECONDS = 60.0
LOCAL = "local"  # beginning of the names of the journals of runs without a cluster


def part_path(folder: Path, part: int) -> Path:
    """Return where the indices of a task are."""
    return folder / "parts" / f"{part:05d}.npy"


def prefix(part: int) -> str:
    """Return the beginning of the names of a task's journals."""
    return f"part-{part:05d}"


def run(folder: Path, part: int, workers: int, limits: Limits) -> None:
    """Label what a part has left, going by its own journals and those of this machine's runs.

    Raises:
        InputError: see ``Pool.run``.
    """
    work = Work(folder)
    ledger = work.ledger(prefix(part), LOCAL)
    todo = work.left(limits, ledger, np.load(part_path(folder, part)))
    print(f"part {part}: {len(todo)} structures to label with {workers} workers", flush=True)
    next_line = time.monotonic() + LINE_SECONDS

    def progress(labels: int, failures: int) -> None:
        nonlocal next_line
        if time.monotonic() > next_line:
            print(f"{labels + failures} of {len(todo)} structures, {failures} failed", flush=True)
            next_line = time.monotonic() + LINE_SECONDS

    Pool(work, workers, limits, prefix(part), progress).run(todo)


def main() -> int:
    """Run the command line; a user's mistake, or a full disk, is one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="mffm.label.task")
    parser.add_argument("folder", type=Path)
    parser.add_argument("part", type=int)
    parser.add_argument("workers", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--gigabytes", type=float)
    given = parser.parse_args()
    try:
        run(given.folder, given.part, given.workers, Limits(given.seconds, given.gigabytes))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
