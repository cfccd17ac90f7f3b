"""The self-test's one table: on the terminal, as JSON and as Markdown for a bug report."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from mffm.release import write_json, write_text

COLOURS = {"passed": "green", "failed": "red", "n/a": "yellow"}


@dataclass(frozen=True)
class Result:
    """What one check found.

    Attributes:
        outcome: ``n/a``: there is nothing to test here, or what the check needs has failed.
        value: what was measured.
        reason: why it failed or is not applicable; for one that passed, the bound.
        seconds: the check's own time.
    """

    name: str
    outcome: Literal["passed", "failed", "n/a"]
    value: str = ""
    reason: str = ""
    seconds: float = 0.0


@dataclass
class Report:
    """All results, and what to expect of the machine."""

    machine: str
    results: list[Result] = field(default_factory=list)
    expect: list[str] = field(default_factory=list)
    environment: Sequence[Mapping[str, str]] = ()
    measured: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def failed(self) -> list[Result]:
        return [result for result in self.results if result.outcome == "failed"]

    def summary(self) -> str:
        """Return the counts in one line."""
        counts = {o: sum(r.outcome == o for r in self.results) for o in ("passed", "failed", "n/a")}
        said = f"{counts['passed']} passed, {counts['failed']} failed, {counts['n/a']} not applicable"
        return f"{self.machine}: {said}, {self.seconds:.0f} s"

    def table(self) -> Table:
        """Return the results for the terminal."""
        table = Table("check", "result", title=self.summary())
        for column in ("measured", "bound or reason"):
            table.add_column(column, overflow="fold")  # paths stay whole
        for r in self.results:
            table.add_row(r.name, f"[{COLOURS[r.outcome]}]{r.outcome}[/]", _plain(r.value), _plain(r.reason))
        return table

    def markdown(self) -> str:
        """Return the results, what to expect and the environment of every rank."""
        lines = [f"# mffm selftest: {self.summary()}", ""]
        lines += ["| check | result | measured | bound or reason | s |", "|---|---|---|---|---|"]
        lines += [
            f"| {r.name} | {r.outcome} | {_cell(r.value)} | {_cell(r.reason)} | {r.seconds:.0f} |" for r in self.results
        ]
        lines += ["", "What to expect:", "", *(f"- {line}" for line in self.expect or ["nothing was measured"])]
        if self.environment:
            names = list(self.environment[0])
            lines += ["", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
            lines += [f"| {' | '.join(_cell(row.get(n, '')) for n in names)} |" for row in self.environment]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write selftest.json and selftest.md and return their paths."""
        paths = folder / "selftest.json", folder / "selftest.md"
        write_json(paths[0], {"summary": self.summary(), **asdict(self)})
        write_text(paths[1], self.markdown())
        return paths


def _plain(text: str) -> str:
    return text.replace("[", "\\[")  # not markup of rich


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
