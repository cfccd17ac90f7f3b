"""Where a run's metrics go: metrics.jsonl always, wandb as the recipe says, and the terminal. Rank 0 only.

Metric names: ``train/loss``, ``train/<fidelity>/<property>`` (share of the loss), ``val/loss``,
``val/<fidelity>/loss``,
``val/<fidelity>/<property>_mae`` and ``_rmse`` in meV/atom, meV/Å and meV/Å³, ``lr``, ``grad_norm``,
``labels/<fidelity>/<property>`` (live labels of the step), ``atoms_per_s``, ``edges_per_s``.
"""

import json
import netrc
import os
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlparse

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mffm.config.recipe import LogSection


class RunLog:
    """Writes metrics and shows progress; does nothing on ranks other than 0."""

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
    ):
        self.active = active
        self.total = total_steps
        self.wandb_id = wandb_id
        self._wandb: Any = None
        if not active:
            return
        self.console = Console(stderr=True)
        self._path = run / "metrics.jsonl"
        _truncate(self._path, start_step)
        self._file = self._path.open("a")
        self._started, self._start_step = time.monotonic(), start_step
        self._progress: Progress | None = None
        if sys.stderr.isatty():
            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(), TimeRemainingColumn(), console=self.console,
            )  # fmt: skip
            self._progress.start()
            self._task = self._progress.add_task(name, total=total_steps, completed=start_step, rate="")
        self._start_wandb(run, config, name, resolved)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.active:
            return
        if self._progress is not None:
            self._progress.stop()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def _start_wandb(self, run: Path, config: LogSection, name: str, resolved: Mapping[str, Any]) -> None:
        mode = config.wandb if config.wandb != "auto" else wandb_mode()
        if mode == "disabled":
            return
        import wandb

        os.environ.setdefault("WANDB_SILENT", "true")
        self.wandb_id = self.wandb_id or secrets.token_hex(4)
        self._wandb = wandb.init(
            project=config.project,
            name=name,
            group=config.group,
            id=self.wandb_id,
            resume="allow",
            mode=mode,
            dir=str(run),
            config=dict(resolved),
        )

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write one row."""
        if not self.active:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

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


def wandb_mode() -> Literal["online", "offline"]:
    """Return what ``auto`` means here: WANDB_MODE where it is set; online with a key or a netrc entry; else offline."""
    if os.environ.get("WANDB_MODE") in ("online", "offline"):
        return "online" if os.environ["WANDB_MODE"] == "online" else "offline"
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return "offline"
    return "online" if found else "offline"


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
    path.write_text("".join(line + "\n" for line in kept))
