"""Another code's results on a study's cells: read from the study's folder, checked, and drawn beside its methods.

A tool outside of mffm trains on the very frames of the cells, in its own environment, and writes
``external/<name>.json`` (`tools/study_sevennet.py` does). The report shows it marked ‡, and with the errors of frames
that lie beside it compares the study's candidate with it; no advice names it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mffm.config.base import validate
from mffm.config.external import ExternalResults
from mffm.errors import InputError
from mffm.evaluate.parity import FrameErrors
from mffm.release import read_json
from mffm.study import judges
from mffm.study.grid import Grid, pins_of
from mffm.study.run import read_frames

FOLDER = "external"
AGAIN = "run the tool that made it again, or remove the file"


@dataclass(frozen=True)
class External:
    """Another code's results.

    Attributes:
        frames: (labels, seed) → (kind of split, property) → errors of every frame, of ``external/<name>/n12-s0.npz``;
            cells without such a file are not there.
    """

    results: ExternalResults
    frames: Mapping[tuple[int, int], Mapping[tuple[str, str], FrameErrors]]

    @property
    def name(self) -> str:
        return self.results.name

    def errors(self, panel: tuple[str, str]) -> dict[int, dict[int, float]]:
        """Return labels → seed → MAE in a panel (kind of split, property); empty where it has none."""
        kind, prop = panel
        found: dict[int, dict[int, float]] = {}
        for cell in self.results.cells:
            for row in cell.errors.get(kind, []):
                if row["property"] == prop:
                    found.setdefault(cell.n_high, {})[cell.seed] = row["mae"]
        return found

    def judged(self) -> Iterator[tuple[str, int, int, dict[str, Any]]]:
        """Yield (name, labels, seed, what the judges found) of every cell."""
        for cell in self.results.cells:
            yield self.name, cell.n_high, cell.seed, cell.found

    def method(self) -> dict[str, Any]:
        """Return what the report keeps, in the form of a method."""
        return {
            "title": self.results.title,
            "external": self.results.code,
            "changes": self.results.settings,
            "notes": self.results.notes,
            "made": f"{self.results.date} on {self.results.machine}",
            "start_from": None,
            "refit": None,
            "plus": None,
            "stages": {},
            "needs_lf_at_inference": False,
            "steps": sorted({cell.steps for cell in self.results.cells}),
        }

    def cpu_minutes(self) -> dict[str, float | None]:
        """Return the mean CPU minutes of a cell; it has no stage of ours."""
        seconds = [cell.cpu_seconds for cell in self.results.cells]
        return {"own": sum(seconds) / len(seconds) / 60 if seconds else None, "stage": 0.0}


def read(grid: Grid, folder: Path) -> list[External]:
    """Return the results in a study's folder, in the order of their names.

    Raises:
        InputError: a file that does not hold, the name of a method of the study, or results on other frames, labels,
            splits or judges than the study's.
    """
    return [_with_frames(_checked(grid, path), path) for path in sorted((folder / FOLDER).glob("*.json"))]


def frames_path(folder: Path, name: str, n_high: int, seed: int) -> Path:
    """Return the place of the errors of a cell's frames."""
    return folder / FOLDER / name / f"n{n_high}-s{seed}.npz"


def _with_frames(results: ExternalResults, path: Path) -> External:
    found = {}
    for cell in results.cells:
        panels = [(kind, row["property"]) for kind, rows in cell.errors.items() for row in rows]
        place = frames_path(path.parents[1], results.name, cell.n_high, cell.seed)
        if place.is_file():
            found[cell.n_high, cell.seed] = read_frames(place, panels)
    return External(results, found)


def fingerprint(grid: Grid) -> str:
    """Return that of the store with the labels that a study judges by."""
    return pins_of(grid.store, [grid.config.high])[1]


def _checked(grid: Grid, path: Path) -> ExternalResults:
    results = validate(ExternalResults, read_json(path), str(path))
    if results.name != path.stem or results.name in grid.config.methods:
        raise InputError(
            f"{path}: has the name {results.name!r}; it must be the file's, and none of the study's methods: rename it"
        )
    own: dict[str, tuple[Any, Any]] = {
        "labels": (results.fingerprint, fingerprint(grid)),
        "splits": (results.splits, grid.config.splits),
        "judges": (results.judges, judges.digests(grid.judges)),
    }
    for what, (theirs, ours) in own.items():
        if theirs != ours:
            raise InputError(f"{path}: was made with other {what} ({theirs}) than this study's ({ours}); {AGAIN}")
    draws = {(cell.n_high, cell.seed): cell.draw for cell in grid.cells if cell.fidelity == grid.config.high}
    for cell in results.cells:
        here = draws.get((cell.n_high, cell.seed))
        if here != cell.draw:
            had = "the study has no such cell" if here is None else "the study's cells have others"
            raise InputError(
                f"{path}: the {cell.n_high} high-fidelity frames of seed {cell.seed} ({cell.draw}): {had}; {AGAIN}"
            )
    return results
