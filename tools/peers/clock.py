"""The CPU time of a training, and copies of its model at given times. Runs in the environments of all peers.

A trainer starts the clock when its first step begins: imports, reading, statistics and neighbor lists that are made
once are not counted; everything later is (validation, the trainer's own checkpoints), in this process and its threads.
Copies of the model at the marks are not.
"""

import ctypes
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def prepare() -> None:
    """Take one thread, keep freed memory as mffm does (mffm.distributed.tune_allocator), end with the parent."""
    torch.set_num_threads(1)
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        pr_set_pdeathsig = 1
        libc.prctl(pr_set_pdeathsig, signal.SIGTERM)


def read_job() -> dict[str, Any]:
    """Return what tools/bench_training.py asks for; the JSON is the only argument."""
    prepare()
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.manual_seed(job["seed"])
    return job


class Clock:
    """Counts steps and their CPU seconds over several sittings, copies the model at marks, ends the process.

    Args:
        job: ``folder``; ``marks``, CPU minutes, the last is the end; ``slack``, by which factor a schedule may outlast
            it to come to its own end; ``probe``, or None: a pair of steps between which the mean time of a step is
            measured, for the file probe.json; the process ends at the second.
        copy: called with (path without suffix) to write the model as it would be released.
    """

    def __init__(self, job: dict[str, Any], copy: Callable[[Path], None]):
        self.folder = Path(job["folder"])
        self.marks = [60.0 * m for m in job["marks"]]
        self.marks[-1] *= job["slack"]
        self.names = [f"{m:g}" for m in job["marks"]]
        self.probe: list[int] | None = job.get("probe")
        self.copy = copy
        self.facts: dict[str, Any] = {}
        self.step, self.before, self.sittings = 0, 0.0, 1
        self.zero: float | None = None

    def start(self, resumed: bool = False, **facts: Any) -> None:
        """Begin to count; ``resumed``: from what the trainer's last checkpoint had."""
        if resumed:
            saved = json.loads((self.folder / "saved.json").read_text())
            self.step, self.before, self.sittings = saved["step"], saved["cpu_s"], saved["sittings"] + 1
        self.facts = facts
        self.zero = time.process_time()

    @property
    def cpu_s(self) -> float:
        assert self.zero is not None, "the clock was not started"
        return self.before + time.process_time() - self.zero

    def saved(self) -> None:
        """The trainer has written a checkpoint that a later sitting would go on from."""
        self._write("saved.json", {})

    def tick(self) -> None:
        """A step is done."""
        self.step += 1
        if self.probe is not None:
            first, last = self.probe
            if self.step == first:
                self.at_first = self.cpu_s
            if self.step == last:
                self._write("probe.json", {"per_step_s": (self.cpu_s - self.at_first) / (last - first)})
                self._leave()
            return
        due = [name for name, mark in zip(self.names, self.marks, strict=True) if self.cpu_s >= mark]
        if due and not self._point(due[-1]).exists():
            self._copy(due[-1])
            if due[-1] == self.names[-1]:
                self._leave()

    def finish(self) -> None:
        """The trainer's schedule is over: what it has now is the last point."""
        if not self._point(self.names[-1]).exists():
            self._copy(self.names[-1])
        self._leave()

    def _point(self, name: str) -> Path:
        return self.folder / f"at-{name}.json"

    def _copy(self, name: str) -> None:
        cpu_s = self.cpu_s
        self.copy(self.folder / f"at-{name}")
        assert self.zero is not None
        self.zero += self.cpu_s - cpu_s
        self._write(f"at-{name}.json", {"cpu_s": cpu_s})

    def _write(self, name: str, more: dict[str, Any]) -> None:
        content = {"step": self.step, "cpu_s": self.cpu_s, "sittings": self.sittings, **self.facts, **more}
        aside = self.folder / f"{name}.partial"
        aside.write_text(json.dumps(content))
        aside.replace(self.folder / name)

    def _leave(self) -> None:
        """Neither the trainer's own end (tables, plots) nor the interpreter's is wanted."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
