"""Learning curves from the reports of studies, and what they say of numbers of labels that nobody has trained with.

    e(N) = a N^-b + c,  log of a measured error ~ N(log e(N), σ² + s²/k)

with s the scatter of seeds, k their number and σ what a curve deviates from the form, as a posterior on a grid: few
points leave most of it to the priors, and a floor c that the data do not show stays possible.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mffm.errors import InputError, known
from mffm.keys import REPORT_UNITS

MIN_SIZES = 3  # numbers of labels that a curve is fitted to
EXPONENT = (
    0.45,
    0.2,
)  # mean and standard deviation of the normal prior of b; machine-learned potentials have 0.2 to 0.9
DEVIATION = (0.06, math.log(2.0))  # median of σ, and the standard deviation of its logarithm
N_DRAWS = 4_000
# Range of k values of a normal distribution over its standard deviation: the seeds' least and most are in a report.
_RANGE = {2: 1.128, 3: 1.693, 4: 2.059, 5: 2.326, 6: 2.534, 7: 2.704, 8: 2.847, 9: 2.970, 10: 3.078}


@dataclass(frozen=True)
class Point:
    """A geometric mean of errors over seeds; ``spread``: standard deviation of a seed's logarithm, or None."""

    n_labels: float
    error: float
    n_seeds: int = 1
    spread: float | None = None


@dataclass(frozen=True)
class Curve:
    """Errors of one method on one panel against labels of one level, ascending."""

    level: str
    panel: str
    method: str
    points: tuple[Point, ...]

    @property
    def unit(self) -> str:
        return REPORT_UNITS[self.panel.split("/")[-1]][0]

    @property
    def most(self) -> float:
        """The largest number of labels that was tried."""
        return self.points[-1].n_labels

    def up_to(self, n_points: int) -> "Curve":
        """Return its first points."""
        return replace(self, points=self.points[:n_points])

    def with_outcome(self, n_labels: float, error: float) -> "Curve":
        """Return the curve with one measured point more.

        Raises:
            InputError: not more labels than the largest number so far, or an error that is none.
        """
        if not (n_labels > self.most and math.isfinite(n_labels)):
            raise InputError(
                f"outcome at {n_labels:g} labels of {self.level!r}: the curve has {self.most:g} already; give the "
                "number of all labels that the training had"
            )
        if not (error > 0 and math.isfinite(error)):
            raise InputError(f"outcome of {self.level!r}: error {error:g}: expected a positive number, {self.unit}")
        return replace(self, points=(*self.points, Point(n_labels, error)))


@dataclass(frozen=True)
class Posterior:
    """Draws [n_draws] of a curve's parameters.

    Attributes:
        exponent: b.
        power: a · first^-b, the part that falls, at the curve's first number of labels.
        floor: c.
        deviation: σ of a point's logarithm about the form.
        seed: standard deviation of the logarithm between seeds.
    """

    first: float
    exponent: np.ndarray
    power: np.ndarray
    floor: np.ndarray
    deviation: np.ndarray
    seed: float

    def errors(self, n_labels: float, with_floor: bool = True) -> np.ndarray:
        """Return e(N) of each draw, or only its part that falls. [n_draws]"""
        falling = self.power * (n_labels / self.first) ** -self.exponent
        return falling + self.floor if with_floor else falling

    def interval(self, n_labels: float, n_seeds: int = 1, share: float = 0.9) -> tuple[float, float, float]:
        """Return median, low and high of a measured geometric mean over seeds."""
        noise = np.sqrt(np.square(self.deviation) + self.seed**2 / n_seeds)
        noisy = np.log(self.errors(n_labels)) + noise * np.random.default_rng(1).standard_normal(len(noise))
        low, middle, high = np.exp(np.quantile(noisy, [(1 - share) / 2, 0.5, (1 + share) / 2]))
        return float(middle), float(low), float(high)


def posterior(curve: Curve) -> Posterior:
    """Return draws from the posterior of a curve's parameters, the same ones every time.

    Priors: b normal (``EXPONENT``) on (0.05, 1.1); c uniform between 0 and the least error; the logarithm of the part
    that falls uniform between 1 % and 200 % of the first error; σ log-normal (``DEVIATION``).
    """
    n, k, y = (
        np.array(values, np.float64)
        for values in zip(*((p.n_labels, p.n_seeds, math.log(p.error)) for p in curve.points), strict=True)
    )
    spreads = [(p.spread, p.n_seeds - 1) for p in curve.points if p.spread is not None]
    freedom = sum(f for _, f in spreads)
    seed = math.sqrt(sum(s**2 * f for s, f in spreads) / freedom) if freedom else 0.0
    exponent = np.linspace(0.05, 1.1, 36)
    power = math.exp(y[0]) * np.exp(np.linspace(math.log(0.01), math.log(2.0), 72))
    floor = math.exp(y.min()) * np.linspace(0.0, 1.0, 26)
    deviation = np.geomspace(0.01, 0.5, 14)
    b, a, c = np.meshgrid(exponent, power, floor, indexing="ij")
    log_weight = -0.5 * np.square((exponent - EXPONENT[0]) / EXPONENT[1])[:, None, None, None]
    log_weight = log_weight - 0.5 * np.square(np.log(deviation / DEVIATION[0]) / DEVIATION[1])
    log_weight = np.broadcast_to(log_weight, (*b.shape, len(deviation))).copy()
    for at, seeds, measured in zip(n, k, y, strict=True):
        squared = np.square(np.log(a * (at / n[0]) ** -b + c) - measured)
        variance = np.square(deviation) + seed**2 / seeds
        log_weight -= 0.5 * squared[..., None] / variance + 0.5 * np.log(variance)
    weights = np.exp(log_weight - log_weight.max()).ravel()
    drawn = np.searchsorted(
        weights.cumsum(), (np.arange(N_DRAWS) + 0.5) / N_DRAWS * weights.sum()
    )  # evenly spaced: the grid's cells in proportion to their weight, without the noise of drawing
    drawn = np.random.default_rng(0).permutation(np.minimum(drawn, len(weights) - 1))
    i, j, m, s = np.unravel_index(drawn, log_weight.shape)
    return Posterior(float(n[0]), exponent[i], power[j], floor[m], deviation[s], seed)


def read(path: Path, panel: str | None = None, method: str | None = None) -> Curve:
    """Return a curve of the report.json of ``mffm study``, or of the folder that it lies in.

    Args:
        panel: kind of split and property, "iid/energy"; None: the report's first.
        method: None: the one with the least error at its most labels, of those with three numbers of labels that need
            no low level at inference.

    Raises:
        InputError: no such report, panel or method; too few numbers of labels.
    """
    report = _report(path)
    panels = report["curves"]
    panel = panel or next(iter(panels))
    if panel not in panels:
        raise InputError(f"{path}: no panel {panel!r}; panels: {known(panels)}")
    methods = panels[panel]
    long = [name for name, points in methods.items() if len(points) >= MIN_SIZES]
    if method is None:
        plain = [n for n in long if not report.get("methods", {}).get(n, {}).get("needs_lf_at_inference")]
        if not plain:
            raise InputError(
                f"{path}: no method of {panel} has {MIN_SIZES} numbers of labels; add some to the study's n_high"
            )
        method = min(plain, key=lambda name: methods[name][-1]["mean"])
    if method not in methods:
        raise InputError(f"{path}: no method {method!r} in {panel}; methods: {known(methods)}")
    if method not in long:
        raise InputError(
            f"{path}: {method} has {len(methods[method])} numbers of labels in {panel}, a curve needs {MIN_SIZES}; "
            f"methods with as many: {known(long)}"
        )
    return curve_of(report["high"], panel, method, methods[method])


def curve_of(level: str, panel: str, method: str, rows: Sequence[dict[str, Any]]) -> Curve:
    """Return a curve from the rows of a report."""
    points = []
    for row in sorted(rows, key=lambda row: row["n_high"]):
        seeds = int(row["seeds"])
        known_range = seeds > 1 and row["least"] > 0
        spread = math.log(row["most"] / row["least"]) / _RANGE[min(seeds, max(_RANGE))] if known_range else None
        points.append(Point(float(row["n_high"]), float(row["mean"]), seeds, spread))
    return Curve(level, panel, method, tuple(points))


def _report(path: Path) -> dict[str, Any]:
    file = path / "report.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file}: no such file; give the report.json that mffm study wrote")
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: no JSON ({error}); give the report.json that mffm study wrote") from error
    if not isinstance(report, dict) or not {"high", "curves"} <= set(report) or not report["curves"]:
        raise InputError(f"{file}: not the report.json of mffm study (it lacks high or curves)")
    return report
