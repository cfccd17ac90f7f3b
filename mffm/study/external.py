"""Another code's results on a study's cells: read from the study's folder, checked, and drawn beside its methods.

A tool outside of mffm trains on the very frames of the cells, in its own environment, and writes
``external/<name>.json`` (`tools/study_sevennet.py` does). The report shows it marked ‡; it is no method of the study:
no advice names it and nothing trains it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mffm.config.base import validate
from mffm.config.external import ExternalResults
from mffm.errors import InputError
from mffm.release import read_json
from mffm.study import judges
from mffm.study.grid import Grid, pins_of

FOLDER = "external"
AGAIN = "run the tool that made it again, or remove the file"


def read(grid: Grid, folder: Path) -> list[ExternalResults]:
    """Return the results in a study's folder, in the order of their names.

    Raises:
        InputError: a file that does not hold, the name of a method of the study, or results on other frames, labels,
            splits or judges than the study's.
    """
    return [_checked(grid, path) for path in sorted((folder / FOLDER).glob("*.json"))]


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


def errors(results: ExternalResults, panel: tuple[str, str]) -> dict[int, dict[int, float]]:
    """Return labels → seed → MAE in a panel (kind of split, property); empty where it has none."""
    kind, prop = panel
    found: dict[int, dict[int, float]] = {}
    for cell in results.cells:
        for row in cell.errors.get(kind, []):
            if row["property"] == prop:
                found.setdefault(cell.n_high, {})[cell.seed] = row["mae"]
    return found


def judged(all_results: Sequence[ExternalResults]) -> Iterator[tuple[str, int, int, dict[str, Any]]]:
    """Yield (name, labels, seed, what the judges found) of every cell."""
    for results in all_results:
        for cell in results.cells:
            yield results.name, cell.n_high, cell.seed, cell.found


def method(results: ExternalResults) -> dict[str, Any]:
    """Return what the report keeps of the results, in the form of a method."""
    return {
        "title": results.title,
        "external": results.code,
        "changes": results.settings,
        "notes": results.notes,
        "made": f"{results.date} on {results.machine}",
        "start_from": None,
        "refit": None,
        "plus": None,
        "stages": {},
        "needs_lf_at_inference": False,
        "steps": sorted({cell.steps for cell in results.cells}),
    }


def cpu_minutes(results: ExternalResults) -> dict[str, float | None]:
    """Return the mean CPU minutes of a cell; it has no stage of ours."""
    seconds = [cell.cpu_seconds for cell in results.cells]
    return {"own": sum(seconds) / len(seconds) / 60 if seconds else None, "stage": 0.0}
