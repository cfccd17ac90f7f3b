"""What a benchmark task is: its files, its structures, what is computed of each, and the suite's score."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from ase.calculators.calculator import BaseCalculator

from mffm.plots import Panel

Presence = Literal["present", "absent", "wrong checksum"]
MATBENCH_DISCOVERY, LAMBENCH = "matbench-discovery", "lambench"
SUITES = (MATBENCH_DISCOVERY, LAMBENCH)


@dataclass(frozen=True)
class DataFile:
    """A file that a task reads.

    Attributes:
        path: below the data folder; a folder where it ends with a slash.
        published: where it can be had.
        layout: what is expected in it.
        checksum: SHA-256 (64 digits) or MD5 (32), None where the publisher gives none.
    """

    path: str
    published: str
    layout: str
    checksum: str | None = None

    def check(self, data: Path) -> Presence:
        """Return whether the file is there and whole."""
        path = data / self.path
        if self.path.endswith("/"):
            return "present" if path.is_dir() and any(path.iterdir()) else "absent"
        if not path.is_file():
            return "absent"
        if self.checksum is None:
            return "present"
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "md5" if len(self.checksum) == 32 else "sha256").hexdigest()
        return "present" if found == self.checksum else "wrong checksum"


@dataclass(frozen=True)
class Options:
    """Settings that a task's protocol leaves to the potential; part of a run's identity.

    Attributes:
        corrected_energies: the potential was trained on MP2020-corrected energies, as CHGNet was.
        kappa_displacement: Å. The protocol's default is 0.01, most published rows used 0.03: float32 forces need it.
    """

    corrected_energies: bool = False
    kappa_displacement: float = 0.03


@dataclass(frozen=True)
class Score:
    """What a task says of a potential.

    Attributes:
        metrics: in the suite's names and units.
        unit: of the metrics, for the table.
        n, n_failed: structures asked for; those without a result.
        compare: metric → key of the published row that it may be compared with; empty where the set is another.
        remark: what a reader must know of the set or the comparison.
        panels: parity plots.
        submission: part of the submission's YAML, for suites that have one.
    """

    metrics: Mapping[str, float | None]
    unit: str
    n: int
    n_failed: int
    compare: Mapping[str, str] = field(default_factory=dict)
    remark: str = ""
    panels: Sequence[Panel] = ()
    submission: Mapping[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """One task of a suite. Structures are independent and named; what is computed of one is JSON."""

    @property
    def name(self) -> str: ...

    @property
    def suite(self) -> str: ...

    @property
    def title(self) -> str: ...

    @property
    def files(self) -> Sequence[DataFile]: ...

    def load(self, data: Path) -> Mapping[str, Any]:
        """Return id → whatever `run` and `score` need of the structure."""
        ...

    def run(self, item: Any, calculator: BaseCalculator, options: Options) -> dict[str, Any]:
        """Compute what the suite asks of one structure; raise where it cannot be computed."""
        ...

    def doubt(self, item: Any, result: Mapping[str, Any]) -> str | None:
        """Return why a result is absurd, None where it is not. The suite's rule says whether it counts."""
        ...

    def score(self, items: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> Score:
        """Return the suite's metrics over all items; one without result failed."""
        ...

    def write(self, items: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
        """Write what a submission to the suite has of this task; nothing where it has nothing."""
        ...


def name_of(task: Task) -> str:
    """Return the task's name with its suite's: ``lambench/elastic``."""
    return f"{task.suite}/{task.name}"


def checked(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result if all of its numbers are finite.

    Raises:
        FloatingPointError: names the first value that is not.
    """
    _check(result, "")
    return dict(result)


def _check(value: Any, place: str) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            _check(inner, place)
    elif isinstance(value, float) and not math.isfinite(value):
        raise FloatingPointError(f"{place} is {value}")


def mean_absolute(errors: Sequence[float]) -> float | None:
    """Return the mean of absolute values, None of none."""
    return sum(map(abs, errors)) / len(errors) if errors else None


def root_mean_square(errors: Sequence[float]) -> float | None:
    """Return the root of the mean square, None of none."""
    return math.sqrt(sum(e * e for e in errors) / len(errors)) if errors else None
