"""Where a run's metrics go: metrics.jsonl, W&B and TensorBoard as the recipe says, and the terminal. Rank 0 only.

Metric names: ``train/loss``, ``train/<fidelity>/<property>`` (share of the loss), ``val/loss``,
``val/<fidelity>/loss``,
``val/<fidelity>/<property>_mae`` and ``_rmse`` in meV/atom, meV/Å and meV/Å³, ``lr``, ``grad_norm``,
``labels/<fidelity>/<property>`` (live labels of the step), ``atoms_per_s``, ``edges_per_s``. Each row of metrics.jsonl
also has ``step``, ``time``, seconds since 1970, and ``cpu_s``, CPU seconds of the process since its row before; in the
first row of a start since the process began.
"""

import json
import netrc
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import urlparse

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mffm.config.recipe import LogSection
from mffm.errors import InputError
from mffm.release import write_text

if TYPE_CHECKING:
    from mffm.release import PotentialSpec


Value = str | int | float | None
Row = Sequence[Value]


@dataclass(frozen=True)
class Table:
    """A small table that is shown with the run."""

    columns: Sequence[str]
    rows: Sequence[Row]

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join("" if c is None else str(c) for c in line) + " |" for line in lines)


@dataclass(frozen=True)
class Facts:
    """What is known of a run before its first step: flat values beside the resolved recipe, and tables."""

    config: Mapping[str, Value] = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)


def run_facts(spec: "PotentialSpec", code: Mapping[str, str], **more: Value) -> Facts:
    """Return versions, fingerprints, element references and live labels of a run.

    Args:
        code: versions of now, which a resumed run's spec does not know.
        more: further values, e.g. ``n_parameters``, ``world_size``.
    """
    names = spec.fidelities.names
    elements: dict[str, None] = {}
    for name in names:
        elements |= dict.fromkeys(spec.references.elements(name))
    properties: dict[str, None] = {}
    for counts in spec.label_counts.values():
        properties |= dict.fromkeys(counts)
    labels: list[Row] = [[name, *(spec.label_counts.get(name, {}).get(p, 0) for p in properties)] for name in names]
    references: list[Row] = [
        [element, *(spec.references.value(name, element) for name in names)] for element in elements
    ]
    known: dict[str, Value] = {f"version/{k}": v for k, v in code.items()}
    known |= {k: str(v) for k, v in spec.provenance.items() if k in ("store_fingerprint", "plan_fingerprint")}
    return Facts(
        config={**known, **more},
        tables={
            "element_references_eV": Table(["element", *names], references),
            "live_labels": Table(["fidelity", *properties], labels),
        },
    )


class Tracker(Protocol):
    """One place that a run's record goes to."""

    def tables(self, tables: Mapping[str, Table], step: int) -> None:
        """Show tables."""
        ...

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write one row. Steps never go down; one step may come in several rows."""
        ...

    def image(self, step: int, name: str, path: Path) -> None:
        """Show a PNG file."""
        ...

    def close(self, state: str) -> None:
        """End the record; ``state`` says how the run ended, ``failed`` after an exception."""
        ...


class JsonLines:
    """metrics.jsonl, one row a line, complete up to the last step whatever happens to the process."""

    def __init__(self, path: Path, start_step: int):
        _truncate(path, start_step)
        self._file = path.open("a")
        self._cpu_s = 0.0

    def tables(self, tables: Mapping[str, Table], step: int) -> None:
        pass  # the run's folder has them as references.md and potential/

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        before, self._cpu_s = self._cpu_s, time.process_time()
        clock = {"time": round(time.time(), 3), "cpu_s": round(self._cpu_s - before, 3)}
        self._file.write(json.dumps({"step": step, **clock, **values}) + "\n")
        self._file.flush()

    def image(self, step: int, name: str, path: Path) -> None:
        pass

    def close(self, state: str) -> None:
        self._file.close()


class WandB:
    """A W&B run. Offline, ``resume`` does nothing: the fixed id and explicit steps are what a sync merges by."""

    def __init__(
        self,
        folder: Path,
        mode: Literal["online", "offline"],
        project: str,
        group: str,
        name: str,
        id: str,
        config: Mapping[str, Any],
        tags: Sequence[str] = (),
    ):
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise _missing("log.wandb", "wandb", "disabled") from error

        os.environ.setdefault("WANDB_SILENT", "true")
        self._wandb = wandb
        self._run = wandb.init(
            project=project,
            group=group,
            name=name,
            id=id,
            tags=list(tags),
            resume="allow",
            mode=mode,
            dir=str(folder),
            config=dict(config),
        )
        # Offline, a killed run reads as finished with exit code 0: this says what it was doing.
        self._run.summary["state"] = "running"

    def tables(self, tables: Mapping[str, Table], step: int) -> None:
        shown = {n: self._wandb.Table(list(t.columns), [list(r) for r in t.rows]) for n, t in tables.items()}
        self._run.log(shown, step=step)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._wandb.Image(str(path))}, step=step)

    def close(self, state: str) -> None:
        self._run.summary["state"] = state
        self._run.finish(exit_code=1 if state == "failed" else 0)


class TensorBoard:
    """Event files in the run's folder; a resumed run hides what the interrupted one wrote after its checkpoint."""

    def __init__(self, folder: Path, start_step: int, config: Mapping[str, Any]):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise _missing("log.tensorboard", "tensorboard", "false") from error

        # Rows after the checkpoint are purged; those of the checkpoint's own step stay.
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)
        self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2, ensure_ascii=False)}\n```", start_step)

    def tables(self, tables: Mapping[str, Table], step: int) -> None:
        for name, table in tables.items():
            self._writer.add_text(name, table.markdown(), step)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def image(self, step: int, name: str, path: Path) -> None:
        from matplotlib.image import imread

        self._writer.add_image(name, imread(path)[..., :3], step, dataformats="HWC")

    def close(self, state: str) -> None:
        self._writer.add_text("state", state)
        self._writer.close()


class RunLog:
    """Hands a run's record to its trackers and shows progress; does nothing on ranks other than 0.

    Args:
        name: of the recipe; W&B groups runs by it where the recipe names no group, so that seeds are together.
        wandb_id: of the run before a resume, empty for a new one.
        active: whether this is rank 0.
        facts: shown at the start.
    """

    def __init__(
        self,
        run: Path,
        config: LogSection,
        total_steps: int,
        start_step: int,
        name: str,
        resolved: Mapping[str, Any],
        wandb_id: str,
        active: bool,
        facts: Facts | None = None,
    ):
        self.active = active
        self.total = total_steps
        self.wandb_id = wandb_id
        self._trackers: list[Tracker] = []
        self._state = "ended"
        if not active:
            return
        self.console = Console(stderr=True)
        self._step = start_step
        facts = facts or Facts()
        mode = config.wandb if config.wandb != "auto" else wandb_mode()
        # What can fail comes first: a bar that nobody stops would spoil the message.
        self._trackers.append(JsonLines(run / "metrics.jsonl", start_step))
        if mode != "disabled":
            # A sweep's agent or controller gives the id of the run that it waits for.
            self.wandb_id = wandb_id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
            everything = {**resolved, "facts": dict(facts.config)}
            tags = [f"seed={resolved['seed']}"] if "seed" in resolved else []
            self._trackers.append(
                WandB(run, mode, config.project, config.group or name, run.name, self.wandb_id, everything, tags)
            )
        if config.tensorboard:
            self._trackers.append(
                TensorBoard(run / "tensorboard", start_step, {**resolved, "facts": dict(facts.config)})
            )
        if facts.tables:
            for tracker in self._trackers:
                tracker.tables(facts.tables, start_step)
        self._started, self._start_step = time.monotonic(), start_step
        self._progress: Progress | None = None
        if sys.stderr.isatty():
            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(), TimeRemainingColumn(), console=self.console,
            )  # fmt: skip
            self._progress.start()
            self._task = self._progress.add_task(name, total=total_steps, completed=start_step, rate="")

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.active:
            return
        if self._progress is not None:
            self._progress.stop()
        for tracker in self._trackers:
            tracker.close(self._state if kind is None else "failed")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write one row."""
        if not self.active:
            return
        self._step = step
        for tracker in self._trackers:
            tracker.metrics(step, values)

    def image(self, name: str, path: Path) -> None:
        """Show a PNG file at the last step that has metrics."""
        for tracker in self._trackers:
            tracker.image(self._step, name, path)

    def ended(self, state: str) -> None:
        """Say how the run ended, for the trackers: finished, stopped_early, interrupted."""
        self._state = state

    def progress(self, step: int, text: str) -> None:
        """Show how far the run is: a bar on a terminal, else a line."""
        if not self.active:
            return
        rate = (step - self._start_step) / max(time.monotonic() - self._started, 1e-9)
        if self._progress is not None:
            self._progress.update(self._task, completed=step, rate=f"{rate:.1f} steps/s  {text}")
            return
        left = (self.total - step) / max(rate, 1e-9)
        self.say(f"step {step}/{self.total}  {text}  {rate:.1f} steps/s, {int(left) // 60}:{int(left) % 60:02d} left")

    def say(self, text: str) -> None:
        """Print one line."""
        if self.active:
            self.console.print(text, highlight=False, soft_wrap=True)


def wandb_mode() -> Literal["online", "offline", "disabled"]:
    """Return what ``auto`` means here: WANDB_MODE where it is set; online with a key or a netrc entry; else offline."""
    for mode in ("online", "offline", "disabled"):
        if os.environ.get("WANDB_MODE") == mode:
            return mode
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return "offline"
    return "online" if found else "offline"


def _missing(key: str, package: str, off: str) -> InputError:
    return InputError(
        f"{key}: the package {package} is not installed; pip install 'mffm[train]', or set {key} to {off}"
    )


def _truncate(path: Path, step: int) -> None:
    """Drop the rows after a step: a resumed run writes them again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # the line that a kill cut off
        if row["step"] <= step:
            kept.append(line)
    write_text(path, "".join(line + "\n" for line in kept))
