"""What a rank does when it fails: write one report, say it once, and end; the others name it instead of themselves.

failing rank ── RUN/failures/<start>-rank-<r>.txt ──▶ its sockets close ──▶ survivors: error in a collective
survivors    ── wait for that report ──▶ one line that points to it
nobody wrote ── a rank whose process is gone gets its report from the first survivor of its machine;
                where all run (a lost link, a rank that hangs), each says that it lost the others
"""

import contextlib
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import NoReturn, TypeVar

from mffm import distributed
from mffm.errors import InputError, told
from mffm.failures import LOST, START_VARIABLE, Report, first_line, is_cause, is_running, node_name, path_of, reports

EXIT_INPUT, EXIT_FAILED = 2, 1
CAUSE_SECONDS = 3.0  # in which the cause reports: it does before its sockets close, the launcher within 0.5 s
SAME_ERROR_SECONDS = 10.0  # in which the same bad input reaches all ranks: they import for seconds
LEAVE_SECONDS = 30.0  # from the report to the end, whatever hangs: trackers, native threads

# gloo, the store and NCCL tell a lost peer by their messages only.
_LOST_PEER = re.compile(
    r"connection (closed|reset|refused|timed out)|closed by peer|broken pipe|socket (closed|timeout)|"
    r"^timed out waiting|(collective|operation|wait|gloo|nccl|store).{0,80}(timed out|timeout)|"
    r"no route to host|network is unreachable|remote process|nccl.*(abort|remote|system error)|gloo/transport",
    re.IGNORECASE,
)

T = TypeVar("T")


def is_lost_peer(error: BaseException) -> bool:
    """Return whether an error only says that another rank, or the way to it, is gone."""
    from torch.distributed import DistError

    if isinstance(error, InputError):
        return False
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and bool(_LOST_PEER.search(str(error))))


class Faults:
    """Context of a run on one rank; the innermost use of it reports, before trackers and threads are closed.

    Attributes:
        step: the last finished step, once there is one.
        said: what is to be printed about the error that was reported; empty: another rank says it.
    """

    def __init__(self, run: Path, ranks: distributed.Ranks):
        self.run, self.ranks = run, ranks
        self.step: Callable[[], int] | None = None
        self.start = os.environ.get(START_VARIABLE) or time.strftime("%Y%m%d-%H%M%S")
        self.said = ""
        self._reported: BaseException | None = None

    def joined(self) -> None:
        """Agree on the name of this start; call it once the ranks have met."""
        self.start = distributed.named_by_main(self.ranks, "mffm/start", self.start)

    def __enter__(self) -> "Faults":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or error is self._reported:
            return
        global _last
        self._reported = error
        _last = self
        if _ends_process:
            _ignore_signals()
            threading.Thread(target=_end_late, name="mffm-end", daemon=True).start()
        try:
            self.said = self._report(error)
        except OSError as unwritable:  # the disk may be what failed
            shown = told(error) or "".join(traceback.format_exception(error))
            self.said = f"rank {self.ranks.rank} of {self.ranks.world_size} on {node_name()} died: {shown}\n"
            self.said += f"({told(unwritable)}: no report was written)\n"

    def _report(self, error: Exception) -> str:
        """Write what there is to write, and return what there is to say."""
        several, launched = self.ranks.world_size > 1, START_VARIABLE in os.environ
        if several and is_lost_peer(error):
            return self._survived(error)
        message = told(error)
        if several and isinstance(error, InputError):
            if self.ranks.is_main:
                tell_others(self.ranks, str(error))
            elif is_told_by_main(self.ranks, str(error), CAUSE_SECONDS):
                return ""
        # Before the run has a folder, or in a process whose user looks at it, the message is all there is to know.
        if isinstance(error, InputError) and not (self.run.is_dir() and (several or launched)):
            return f"error: {message}\n"
        title = f"{type(error).__name__}: {str(error).strip() or 'no message'}" if message is None else message
        lines = [] if isinstance(error, InputError) else "".join(traceback.format_exception(error)).splitlines()
        first, *rest = title.splitlines()
        report = replace(self._blank(), what=f"died: {first}", hint="\n".join(rest), tail=lines)
        path, text = report.write(self.run)
        if message is not None:  # without the traceback, which is in the report
            return f"rank {self.ranks.rank} on {report.host}, report: {path}\nerror: {message}\n"
        return f"report: {path}\n{text}"

    def _blank(self) -> Report:
        step = None if self.step is None else self.step()
        saved = (self.run / "checkpoints" / "latest").exists()
        if START_VARIABLE in os.environ:
            go_on = f"python -m launch.submit {self.run} --cluster <the same YAML>"
        elif saved:
            go_on = f"mffm resume {self.run}" + (", started as before" if self.ranks.world_size > 1 else "")
        else:
            go_on = "the same command; there is no checkpoint yet"
        return Report(
            self.start, self.ranks.rank, self.ranks.world_size, node_name(), "",
            f"last finished step {step}" if step else "no step finished in this start", go_on, tail_title="traceback:",
        )  # fmt: skip

    def _survived(self, error: Exception) -> str:
        """Point to the rank that is the cause; report for it where it cannot itself."""
        mine, processes = node_name(), distributed.processes()
        self._mark(self.ranks.rank).parent.mkdir(parents=True, exist_ok=True)
        self._mark(self.ranks.rank).touch()
        # Soon: a process that is killed closes its connections a moment before it is gone; survivors, which end too,
        # wait for a cause as this one does.
        gone = self._gone()
        started = time.monotonic()
        while not (cause := self._cause()) and time.monotonic() < started + CAUSE_SECONDS:
            if not gone and time.monotonic() < started + CAUSE_SECONDS / 2:
                gone = self._gone()
            time.sleep(0.1)
        if cause is None and gone:
            other = gone[0]
            report = replace(
                self._blank(), rank=other, host=processes[other].host,
                what=f"died: its process {processes[other].pid} is gone and left no report",
                hint="It was killed (kill -9, or the kernel when memory ran out: see dmesg), or crashed in native code "
                f"(see its output).\nReported by rank {self.ranks.rank}.",
            )  # fmt: skip
            cause = report.write(self.run)[0]
        unaware = [r for r in range(self.ranks.world_size) if not self._has_noticed(r)]
        self._mark(self.ranks.rank).unlink()
        if cause is not None:
            self._let_go_first(cause)
            return (
                f"rank {self.ranks.rank} of {self.ranks.world_size} on {mine} ends because of another: "
                f"{first_line(cause)}; report: {cause}\n"
            )
        told_by = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if unaware:
            names = ", ".join(f"{r} on {processes[r].host}" if processes else str(r) for r in unaware[:8])
            hint = f"Rank(s) {names} noticed nothing so far: they hang, or are slow, or their machine went down."
        else:
            hint = "All ranks noticed the same: the network between them failed."
        report = replace(
            self._blank(), what=f"{LOST}: {told_by}",
            hint=f"{hint}\n(train.collective_timeout_seconds is how long a rank waits for the others.)",
            tail="".join(traceback.format_exception(error)).splitlines(),
        )  # fmt: skip
        path, text = report.write(self.run)
        return f"report: {path}\n{text}"

    def _gone(self) -> list[int]:
        """Return the ranks of this machine that have ended without a report; those of another cannot be seen."""
        mine = node_name()
        return [
            r
            for r, p in enumerate(distributed.processes())
            if p.host == mine and not is_running(p.pid) and not self._has_noticed(r)
        ]

    def _mark(self, rank: int) -> Path:
        path = path_of(self.run, self.start, rank)
        return path.with_name(f".{path.stem}.lost")

    def _has_noticed(self, rank: int) -> bool:
        return self._mark(rank).exists() or path_of(self.run, self.start, rank).exists()

    def _let_go_first(self, cause: Path) -> None:
        """Wait until the rank of a report has ended: torchrun and srun call the first to end the root cause."""
        rank, processes = int(cause.stem.rpartition("-")[2]), distributed.processes()
        if rank < len(processes) and processes[rank].host == node_name():
            deadline = time.monotonic() + CAUSE_SECONDS
            while is_running(processes[rank].pid) and time.monotonic() < deadline:
                time.sleep(0.1)
            time.sleep(0.5)  # torchrun looks every 0.1 s

    def _cause(self) -> Path | None:
        found = reports(self.run, self.start)
        others = [p for p in found if is_cause(p) and p != path_of(self.run, self.start, self.ranks.rank)]
        return others[0] if others else None


_last: Faults | None = None  # whose error is on its way out
_ends_process = False  # whether this process is ours to end


def process(call: Callable[[], T]) -> T:
    """Run a command as the only thing that this process does; an error is said once, and ends it with all its threads.

    Exit code 2 for bad input, 1 for any other error.
    """
    global _ends_process, _last
    _ends_process, _last = True, None
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - said and turned into an exit code
        _ignore_signals()
        message, ranks = told(error), distributed.ranks_from_environment()
        known = _last is not None and _last._reported is error
        text = _last.said if _last is not None and known else _unreported(error, ranks)
        print(text, end="", file=sys.stderr, flush=True)
        if ranks.world_size > 1 and ranks.is_main and message is not None:
            if not known:
                tell_others(ranks, message)
            _wait_until_heard(ranks)
        leave(EXIT_FAILED if message is None else EXIT_INPUT)


def _ignore_signals() -> None:
    """Others may end the ranks now; this one has to speak first. It ends within ``LEAVE_SECONDS`` anyway."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)


def _unreported(error: Exception, ranks: distributed.Ranks) -> str:
    """Return what to say of an error that came before the run had a place for it."""
    message = told(error)
    if message is None:
        return "".join(traceback.format_exception(error))
    if ranks.is_main:
        return f"error: {message}\n"
    return "" if is_told_by_main(ranks, message, SAME_ERROR_SECONDS) else f"error: rank {ranks.rank}: {message}\n"


def tell_others(ranks: distributed.Ranks, message: str) -> None:
    """Let the other ranks know what rank 0 says."""
    with contextlib.suppress(RuntimeError, InputError):  # they are gone, or have other worries
        distributed.meet(ranks, SAME_ERROR_SECONDS).set("mffm/error", message)


def _wait_until_heard(ranks: distributed.Ranks) -> None:
    """Wait a little: rank 0 may be the host of the store that the others look into."""
    with contextlib.suppress(RuntimeError, InputError):
        keys = [f"mffm/heard/{r}" for r in range(1, ranks.world_size)]
        distributed.meet(ranks, SAME_ERROR_SECONDS).wait(keys, timedelta(seconds=CAUSE_SECONDS))


def is_told_by_main(ranks: distributed.Ranks, message: str, seconds: float) -> bool:
    """Return whether rank 0 says the same."""
    try:
        store = distributed.meet(ranks, seconds)
        store.wait(["mffm/error"], timedelta(seconds=seconds))
        same = store.get("mffm/error").decode() == message
        store.set(f"mffm/heard/{ranks.rank}", "")
    except (RuntimeError, InputError):
        return False
    return same


def leave(code: int) -> NoReturn:
    """End the process at once; what it prints is out."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no destructor of a process group, no thread and no exit hook may keep the rank


def _end_late() -> None:
    """End the process although something on the way out hangs: a tracker on the network, a native thread."""
    time.sleep(LEAVE_SECONDS)
    if _last is not None:
        print(_last.said, end="", file=sys.stderr, flush=True)
    leave(EXIT_FAILED)
