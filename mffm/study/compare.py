"""Is one method not worse than the others? Error ratios with a bootstrap bound, paired over seeds and test frames.

    errors of two methods, frame by frame ──same seeds, same frames──▶ [n_seeds, n_units] sums each
      ──resample seeds and units alike in both──▶ ratios of MAEs, geometric mean over seeds ──90 % quantile──▶ bound

A unit is a group of the store (all frames of a molecule) where the split has eight or more, else a frame. Of n seeds
and of n units n − 1 are drawn, with replacement: n draws of so few as three seeds would spread too little, by a factor
(n − 1) / n in the variance.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from mffm.evaluate.parity import FrameErrors
from mffm.study.curves import LEAST_ERROR
from mffm.study.external import External
from mffm.study.grid import Grid
from mffm.study.run import Judged

LEVEL = 0.9  # one-sided
LIMITS = (1.05, 1.15)
DRAWS = 2000
LEAST_UNITS = 8  # fewer groups are too few to resample, fewer frames too few to compare

Panel = tuple[str, str]
Frames = Mapping[Panel, FrameErrors]
Cells = Mapping[tuple[str, int], Mapping[int, Frames]]  # method, labels → seed → errors of every frame


def not_worse(grid: Grid, judged: Sequence[Judged], others: Sequence[External] = ()) -> dict[str, Any] | None:
    """Return the comparison of the study's candidate with each other method, as JSON; None without a candidate.

    Compared are methods without a low-fidelity calculation at inference, and other codes, at the numbers of labels that
    both have.
    """
    config = grid.config
    if config.candidate is None:
        return None
    cells: dict[tuple[str, int], dict[int, Frames]] = {}
    for one in judged:
        cells.setdefault((one.cell.method, one.cell.n_high), {})[one.cell.seed] = one.frames
    planned = {name: {cell.n_high for cell in grid.cells if cell.method == name} for name in config.methods}
    titles = {name: config.title(name) for name in config.methods} | {o.name: o.results.title for o in others}
    for other in others:
        planned[other.name] = {n for n, _ in other.frames}
        for (n, seed), frames in other.frames.items():
            cells.setdefault((other.name, n), {})[seed] = frames
    rivals = [*config.rivals, *(o.name for o in others)]
    numbers = {name: sorted(planned[name] & planned[config.candidate]) for name in rivals}
    panels: dict[str, Any] = {}
    missing: dict[str, None] = {}
    for kind in config.splits:
        for prop in config.properties:
            methods: dict[str, list[dict[str, Any]]] = {name: [] for name, labels in numbers.items() if labels}
            for name, points in methods.items():
                for n in numbers[name]:
                    found = _point(grid, cells, (kind, prop), config.candidate, name, n)
                    if found is not None:
                        points.append(found)
                    if found is None or len(found["seeds"]) < len(config.seeds):
                        missing[f"{titles[name]} at {n} frames"] = None
            panels[f"{kind}/{prop}"] = methods
    result = {
        "candidate": config.candidate, "level": LEVEL, "draws": DRAWS, "limits": LIMITS, "panels": panels,
        "missing": list(missing), "without_common_number": [name for name, labels in numbers.items() if not labels],
    }  # fmt: skip
    return {**result, "verdict": _verdict(titles, result)}


def _point(
    grid: Grid, cells: Cells, panel: Panel, candidate: str, other: str, n: int
) -> dict[str, Any] | None:  # fmt: skip
    """Return the ratio of two methods and its bound at one number of labels; None without a seed or enough frames."""
    ours, theirs = cells.get((candidate, n), {}), cells.get((other, n), {})
    seeds = [s for s in grid.config.seeds if s in ours and s in theirs]
    seeds = [s for s in seeds if panel in ours[s] and panel in theirs[s]]
    if not seeds:
        return None
    sums, rows = paired([ours[s][panel] for s in seeds] + [theirs[s][panel] for s in seeds])
    units, unit = units_of(grid.store.group[rows], grid.store.group_names)
    n_units = len(np.unique(units))
    if n_units < LEAST_UNITS:
        return None
    per_unit = np.stack([np.bincount(units, row) for row in sums])
    ratio, upper = ratio_and_bound(per_unit[: len(seeds)], per_unit[len(seeds) :])
    return {
        "n_high": n, "ratio": ratio, "upper": upper, "seeds": seeds, "frames": len(rows), "unit": unit, "units": n_units
    }  # fmt: skip


def paired(cells: Sequence[FrameErrors]) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums of the frames that all cells have, [n_cells, n_frames], and their rows of the store."""
    rows = cells[0].rows
    for cell in cells[1:]:
        rows = np.intersect1d(rows, cell.rows, assume_unique=True)
    return np.stack([cell.sums[np.isin(cell.rows, rows, assume_unique=True)] for cell in cells]), rows


def units_of(group: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, str]:
    """Return the unit of each frame, numbered from 0, and what units are: ``groups`` or ``frames``.

    A frame without a group is one of its own. Frames are units where there are fewer than eight groups.
    """
    alone = np.array([not names[g] for g in group], dtype=bool)
    keys = np.where(alone, -1 - np.arange(len(group)), group)
    found, units = np.unique(keys, return_inverse=True)
    if LEAST_UNITS <= len(found) < len(group):
        return units, "groups"
    return np.arange(len(group)), "frames"


def ratio_and_bound(candidate: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Return the ratio of two methods' MAEs, geometric mean over seeds, and its bootstrap bound from above.

    Args:
        candidate, other: [n_seeds, n_units] sums of absolute errors of the same labels. With one seed units alone are
            resampled.
    """
    n_seeds, n_units = candidate.shape
    draws, seeds = _draws(n_units), _draws(n_seeds, 1)
    logs = _log(draws @ candidate.T) - _log(draws @ other.T)
    means = (logs * seeds).sum(1) / seeds.sum(1)
    ratio = np.exp((_log(candidate.sum(1)) - _log(other.sum(1))).mean())
    return float(ratio), float(np.exp(np.quantile(means, LEVEL)))


def _log(sums: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(sums, LEAST_ERROR))


@lru_cache(maxsize=4)
def _draws(n: int, stream: int = 0) -> np.ndarray:
    """Return how often each of n is drawn, [DRAWS, n]: n − 1 times with replacement; of one, itself once."""
    if n == 1:
        return np.ones((DRAWS, 1))
    drawn = np.random.default_rng([stream, n]).integers(n, size=(DRAWS, n - 1)) + n * np.arange(DRAWS)[:, None]
    return np.bincount(drawn.ravel(), minlength=DRAWS * n).reshape(DRAWS, n).astype(np.float64)


def _verdict(titles: Mapping[str, str], result: Mapping[str, Any]) -> list[str]:
    """Return one sentence for each limit."""
    bounds = [
        (point["upper"], f"{titles[name]}, {panel.replace('/', ' ')}, {point['n_high']} frames")
        for panel, methods in result["panels"].items()
        for name, points in methods.items() for point in points
    ]  # fmt: skip
    ours = titles[result["candidate"]]
    if not bounds:
        return [f"No number of labels has finished cells of {ours} and of another method: there is no verdict yet."]
    worst, where = max(bounds)
    others = len({name for methods in result["panels"].values() for name, points in methods.items() if points})
    part = " Of what is finished only." if result["missing"] else ""
    lines = []
    for limit in result["limits"]:
        above = sum(bound > limit for bound, _ in bounds)
        found = (
            f"not shown; {above} of {len(bounds)} bounds are above it" if above
            else f"{ours} is not worse than any of the {others} methods compared; all {len(bounds)} bounds hold"
        )  # fmt: skip
        lines.append(f"Within {limit}: {found}, the largest is {worst:.3g} ({where}).{part}")
    return lines
