"""What the label_*.py scripts share: one structure at a time into an extxyz file, resumable, time-boxed, nothing lost.

The output file is the only state. A structure is appended in one write and synced before the next result is taken, so
a killed run loses at most the structure that was being written: a cut-off last frame is dropped at the next start. A
level that fails leaves ``error_<level>="<class>: <message>"`` in its frame, beside the labels of the levels that did
not fail. Two runs cannot write one file: it is locked.
"""

import contextlib
import fcntl
import io
import os
import re
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.io import read, write
from ase.io.extxyz import key_val_str_to_dict
from ase.stress import full_3x3_to_voigt_6_stress
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from mffm.errors import InputError
from mffm.label.level import Label, classify, import_all, versions

# OpenMP reads it when an engine is loaded, later than this. Threads that wait for each other multiply the CPU time.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

RESULT_KEYS = ("codes", "t1_diagnostic", "gfn1_repeat")
PLAIN_LINE_SECONDS = 30.0


@dataclass(frozen=True)
class Level:
    """One level of theory: the modules that it imports, and the function that computes it."""

    modules: tuple[str, ...]
    compute: Callable[[Atoms], Label]


@dataclass(frozen=True)
class Job:
    """One structure to label; ``frame.info["frame_id"]`` names it."""

    frame: Atoms
    levels: tuple[str, ...]

    @property
    def frame_id(self) -> str:
        return str(self.frame.info["frame_id"])


def compute(job: Job, levels: Mapping[str, Level]) -> Atoms:
    """Return the structure with its labels, its CPU seconds per level and the versions of the codes.

    Energies are in ``info["energy_<level>"]``, forces in ``arrays["forces_<level>"]``, stress in
    ``info["stress_<level>"]``. A level that fails or gives a non-finite number is recorded, the others go on.
    """
    out = job.frame.copy()
    out.calc = None
    codes: dict[str, str] = {}
    for name in job.levels:
        level = levels[name]
        start = time.process_time_ns()
        try:
            import_all(level.modules)
            codes |= versions(level.modules)
            start = time.process_time_ns()
            label = level.compute(job.frame)
            label.check(len(job.frame))
        except Exception as error:  # noqa: BLE001 - any engine's error is this label's failure, not the run's
            out.info[f"error_{name}"] = describe(error)
        else:
            _store(out, name, label)
        out.info[f"cpu_s_{name}"] = round((time.process_time_ns() - start) * 1e-9, 9)
    out.info["codes"] = " ".join(f"{package}-{version}" for package, version in sorted(codes.items()))
    return out


def _store(out: Atoms, name: str, label: Label) -> None:
    out.info.update(label.info)
    out.info[f"energy_{name}"] = float(label.energy)
    if label.stress is not None:
        out.info[f"stress_{name}"] = full_3x3_to_voigt_6_stress(label.stress)
    if label.forces is not None:
        out.arrays[f"forces_{name}"] = np.asarray(label.forces, dtype=float)


def describe(error: BaseException) -> str:
    """Return ``<class>: <type> <message>`` in one line without quotes, as an extxyz value needs it."""
    message = re.sub(r'[\s"\\]+', " ", f"{type(error).__name__} {error}").strip()
    return f"{classify(error)}: {message[:160]}"


def to_extxyz(frame: Atoms) -> bytes:
    """Return one frame as extxyz text."""
    buffer = io.StringIO()
    write(buffer, frame, format="extxyz")
    return buffer.getvalue().encode()


@dataclass(frozen=True)
class Scan:
    """What is in an output file: the info of every whole frame, and the length in bytes of the whole part."""

    infos: list[dict[str, Any]]
    whole: int
    size: int


def scan(path: Path) -> Scan:
    """Read an extxyz file frame by frame; a damaged last frame ends the whole part.

    Raises:
        InputError: damage before the last frame, which no killed run leaves behind.
    """
    content = path.read_bytes() if path.exists() else b""
    lines = content.split(b"\n")  # the last piece has no newline: it is empty, or it was cut off
    infos: list[dict[str, Any]] = []
    position = whole = 0
    while position < len(lines) - 1:
        n_lines = 2 + int(lines[position]) if lines[position].strip().isdigit() else 0
        frame = lines[position : position + n_lines]
        if not n_lines or position + n_lines > len(lines) - 1 or not _is_frame(frame):
            if n_lines and position + n_lines < len(lines) - 1:
                raise InputError(
                    f"{path}: line {position + 1}: the frame that starts here is damaged, and others follow; "
                    "repair the file by hand or write to another one"
                )
            break
        infos.append(key_val_str_to_dict(frame[1].decode()))
        whole += sum(len(line) + 1 for line in frame)
        position += n_lines
    if not infos and content and not lines[0].strip().isdigit():
        raise InputError(f"{path}: not an extxyz file; remove it or write to another one")
    return Scan(infos, whole, len(content))


def _is_frame(frame: list[bytes]) -> bool:
    """Tell whether every atom line has the columns that the frame's ``Properties`` declare."""
    properties = re.search(rb"Properties=(\S+)", frame[1])
    if properties is None:
        return False
    n_columns = sum(int(n) for n in properties.group(1).split(b":")[2::3])
    return all(len(line.split()) == n_columns for line in frame[2:])


class Output:
    """An extxyz file that is appended to, one whole frame at a time, by one process."""

    def __init__(self, path: Path, levels: Sequence[str]) -> None:
        """Open, lock and repair the file.

        Raises:
            InputError: another run writes it; frames without frame_id; frames that lack some of the levels.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"{path}: another run is writing this file; wait for it or write to another one"
            ) from error
        found = scan(path)
        self.dropped = found.size - found.whole
        if self.dropped:
            os.ftruncate(self._fd, found.whole)
        self.done = {self._name(info, levels) for info in found.infos}

    def _name(self, info: dict[str, Any], levels: Sequence[str]) -> str:
        if "frame_id" not in info:
            raise InputError(
                f"{self.path}: a frame has no frame_id, so this file cannot be resumed; write to another one"
            )
        missing = [level for level in levels if f"energy_{level}" not in info and f"error_{level}" not in info]
        if missing:
            raise InputError(
                f"{self.path}: frame {info['frame_id']} has no label and no error of {', '.join(missing)}; ask for the "
                "levels that the file has, or write to another one (mffm ingest puts several files together)"
            )
        return str(info["frame_id"])

    def append(self, frame: Atoms) -> None:
        """Write one frame and wait until it is on the disk."""
        text = to_extxyz(frame)
        while text:
            text = text[os.write(self._fd, text) :]
        os.fsync(self._fd)
        self.done.add(str(frame.info["frame_id"]))

    def close(self) -> None:
        os.close(self._fd)


def read_frames(paths: Iterable[Path]) -> list[Atoms]:
    """Return the frames of some files without their labels, each with a ``frame_id`` (its own, or ``<file>-<index>``).

    Labels that a file has already stay there: another level of the same structures is a label layer of its own.

    Raises:
        InputError: no such file, not readable, or a frame_id that occurs twice.
    """
    frames: list[Atoms] = []
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        try:
            found = read(path, ":")
        except Exception as error:  # ASE raises whatever its readers raise
            raise InputError(f"{path}: ASE cannot read it: {describe(error)}") from error
        for index, frame in enumerate(found):
            frame.info = {key: value for key, value in frame.info.items() if not _is_result(key)}
            frame.info.setdefault("frame_id", f"{path.stem}-{index:05d}")
            bare = Atoms(frame.numbers, frame.positions, cell=frame.cell, pbc=frame.pbc, info=frame.info)
            frames.append(bare)
    names = Counter(str(frame.info["frame_id"]) for frame in frames)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise InputError(f"frame_id {twice[0]} occurs {names[twice[0]]} times; a frame_id must be unique")
    return frames


def _is_result(key: str) -> bool:
    """Tell whether an info key was written by a labelling script or is ASE's name of a label."""
    return key.startswith(("energy", "stress", "error_", "cpu_s_", "free_energy")) or key in RESULT_KEYS


def report_left_out(frames: Sequence[Atoms], reason: Callable[[Atoms], str | None]) -> list[Atoms]:
    """Return the frames that have no reason to be left out; print how many have which reason, with an example."""
    left_out: dict[str, list[str]] = defaultdict(list)
    kept = []
    for frame in frames:
        why = reason(frame)
        if why is None:
            kept.append(frame)
        else:
            left_out[why].append(str(frame.info["frame_id"]))
    for why, names in left_out.items():
        print(f"left out, {why}: {len(names)} (first: {names[0]})")
    return kept


def plan(frames: Sequence[Atoms], levels: tuple[str, ...], n: int, seed: int) -> list[Job]:
    """Return the jobs in a random order, so that what a time budget leaves is a fair sample; only ``n`` unless 0."""
    order = np.random.default_rng(seed).permutation(len(frames))
    return [Job(frames[i], levels) for i in (order[:n] if n else order)]


def choose_levels(text: str, known: Iterable[str]) -> tuple[str, ...]:
    """Return the levels in a comma-separated list.

    Raises:
        InputError: an unknown level, or none.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise InputError(f"--levels {text!r}: expected some of {', '.join(known)}")
    return names


def run(
    jobs: Sequence[Job],
    path: Path,
    label: Callable[[Job], Atoms],
    minutes: float,
    workers: int,
    restart_after: int = 200,
) -> Counter[str]:
    """Label the jobs that ``path`` does not have yet; return how many labels each level has and how many failed.

    Nothing is started after ``minutes``; what is running then is finished. Workers are spawned, with one thread each,
    and replaced after ``restart_after`` structures each (electronic-structure codes leak). A structure whose worker
    dies is tried once more alone, then recorded as lost.
    """
    output = Output(path, jobs[0].levels if jobs else ())
    todo = deque(job for job in jobs if job.frame_id not in output.done)
    report = Report(len(jobs), len(todo), minutes)
    if output.dropped:
        report.say(f"{path}: the last frame was cut off; its {output.dropped} bytes are dropped, it is computed again")
    report.say(f"{len(jobs)} structures chosen, {len(jobs) - len(todo)} already done, {len(todo)} to do")
    try:
        with report:
            for frame in _results(todo, label, report, workers, restart_after):
                output.append(frame)
                report.add(frame)
    finally:
        output.close()
    report.finish()
    return report.counts


def _results(
    todo: deque[Job], label: Callable[[Job], Atoms], report: "Report", workers: int, restart_after: int
) -> Iterator[Atoms]:
    """Yield labelled frames as they are finished, one pool of workers after the other."""
    suspects: deque[Job] = deque()
    while (todo or suspects) and not report.is_over():
        if suspects:  # alone, so that it is known who kills the worker
            queue, n_workers, limit = deque([suspects.popleft()]), 1, 1
        else:
            queue, n_workers, limit = todo, workers, restart_after * workers
        running: dict[Future[Atoms], Job] = {}
        with ProcessPoolExecutor(n_workers, get_context("spawn"), _end_with_parent) as pool:
            try:
                while running or (queue and limit > 0 and not report.is_over()):
                    while queue and limit > 0 and len(running) < n_workers and not report.is_over():
                        running[pool.submit(label, queue[0])] = queue[0]
                        queue.popleft()
                        limit -= 1
                    finished, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                    for future in finished:
                        yield future.result()
                        del running[future]
                    report.tick()
            except BrokenProcessPool as error:
                if queue is todo:
                    suspects.extend(running.values())
                else:
                    yield _lost(next(iter(running.values())), error)


def _lost(job: Job, error: BaseException) -> Atoms:
    frame = job.frame.copy()
    frame.info.update({f"error_{level}": describe(error) for level in job.levels})
    return frame


def _end_with_parent() -> None:
    """Let a worker end when its parent is killed; it would wait for work for ever."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(2.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Report:
    """Progress with rate and remaining time: a bar on a terminal, a line every half minute elsewhere."""

    def __init__(self, n_chosen: int, n_todo: int, minutes: float) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.total, self.written, self.minutes = n_todo, 0, minutes
        self.counts: Counter[str] = Counter()
        self._cpu: dict[str, list[float]] = defaultdict(list)
        self._start = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Report":
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            self._bar = self._stack.enter_context(Progress(*columns, console=self.console))
            self._task = self._bar.add_task(self.line(), total=self.total)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def is_over(self) -> bool:
        return self.seconds > self.minutes * 60

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def add(self, frame: Atoms) -> None:
        """Count one written frame."""
        self.written += 1
        for key, value in frame.info.items():
            kind, _, level = key.partition("_")
            if kind == "energy":
                self.counts[level] += 1
            elif kind == "error":
                self.counts[f"failed {level}"] += 1
                self.say(f"{frame.info['frame_id']}: {level}: {value}")
            elif key.startswith("cpu_s_"):
                self._cpu[key.removeprefix("cpu_s_")].append(value)
        self.tick()

    def line(self) -> str:
        failed = sum(count for name, count in self.counts.items() if name.startswith("failed"))
        if not self.written:
            return f"0/{self.total}"
        left = (self.total - self.written) * self.seconds / self.written
        left = min(left, max(self.minutes * 60 - self.seconds, 0))
        rate = 60 * self.written / self.seconds
        return (
            f"{self.written}/{self.total}, {rate:.3g} structures/min, {left / 60:.1f} min left, {failed} labels failed"
        )

    def tick(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self.written, description=self.line())
        elif time.monotonic() - self._last_line > PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            self.say(self.line())

    def finish(self) -> None:
        n_left = self.total - self.written
        if n_left:
            self.say(f"time is up: {n_left} structures are left; the same command goes on with them")
        cost = ", ".join(f"{level} {np.mean(values):.3g}" for level, values in self._cpu.items())
        self.say(f"{self.written} structures written in {self.seconds:.0f} s; mean CPU seconds: {cost or 'none'}")
        for name, count in sorted(self.counts.items()):
            self.say(f"  {name}: {count}")


def main(app: Callable[..., Any]) -> None:
    """Run a typer command line; a user's mistake is one line and exit code 2."""
    try:
        app()
    except InputError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {error}", style="red", markup=False)
        raise SystemExit(2) from None
