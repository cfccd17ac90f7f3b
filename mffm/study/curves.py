"""Learning curves: error against the number of labels, and the factor of labels that a method saves at equal error."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Curve = Sequence[tuple[float, float]]  # (labels, error), labels ascending, both positive

LEAST_ERROR = 1e-12  # an exact zero has no logarithm


@dataclass(frozen=True)
class Bounded:
    """A number, or a bound of it.

    Attributes:
        bound: ``=`` the number itself; ``<=`` at most; ``>`` more than.
    """

    value: float
    bound: Literal["=", "<=", ">=", ">", "<"] = "="

    def text(self, digits: int = 2) -> str:
        """Return it for a table: ``3.4``, ``> 8``."""
        sign = {"=": "", "<=": "≤ ", ">=": "≥ "}.get(self.bound, f"{self.bound} ")
        return f"{sign}{self.value:.{digits}g}"


def mean(errors: Iterable[float]) -> float:
    """Return the geometric mean: errors are compared by their ratios."""
    logs = [math.log(max(e, LEAST_ERROR)) for e in errors]
    return math.exp(sum(logs) / len(logs))


def labels_needed(curve: Curve, error: float) -> Bounded:
    """Return the number of labels at which a curve first has no larger error than ``error``.

    Between points the curve is a straight line in the logarithms of both. A curve that goes up and down counts from its
    first crossing, which is the choice that favours this curve. A curve that begins at or below the error needs at
    most its least labels (just these where the error is the same); one that never comes down to it more than its most.
    """
    assert curve, "a curve without points"
    assert all(a[0] < b[0] for a, b in itertools.pairwise(curve)), f"labels do not ascend: {curve}"
    n_before, error_before = curve[0]
    if error_before <= error:
        return Bounded(n_before, "=" if math.isclose(error_before, error, rel_tol=1e-9) else "<=")
    for n, here in curve[1:]:
        if here <= error:
            low, high, wanted = (math.log(max(e, LEAST_ERROR)) for e in (here, error_before, error))
            part = (high - wanted) / (high - low)
            return Bounded(math.exp(math.log(n_before) + part * (math.log(n) - math.log(n_before))))
        n_before, error_before = n, here
    return Bounded(n_before, ">")


def factor(baseline: Curve, n_labels: float, error: float) -> Bounded:
    """Return k = labels that the baseline needs for a method's error ÷ labels of the method there.

    ``>`` where the baseline never gets so good, ``<=`` where it is as good at its least labels already.
    """
    needed = labels_needed(baseline, error)
    return Bounded(needed.value / n_labels, needed.bound)


def factor_at_best(baseline: Curve, method: Curve) -> Bounded:
    """Return k at the least error that the baseline reaches: its labels there ÷ what the method needs for that error.

    On a baseline that falls all the way these are its most labels; where more labels did it harm, they do not count.
    ``>=`` where the method is as good at its least labels already, ``<`` where it never gets so good.
    """
    n_labels, error = min(baseline, key=lambda point: point[1])
    needed = labels_needed(method, error)
    flipped: dict[str, Literal["=", ">=", "<"]] = {"=": "=", "<=": ">=", ">": "<"}
    return Bounded(n_labels / needed.value, flipped[needed.bound])


def mean_curve(errors: Mapping[int, Mapping[int, float]]) -> list[tuple[float, float]]:
    """Return labels → seed → error as a curve of geometric means over the seeds."""
    return [(float(n), mean(seeds.values())) for n, seeds in sorted(errors.items()) if seeds]


def curve_of_seed(errors: Mapping[int, Mapping[int, float]], seed: int) -> list[tuple[float, float]]:
    """Return the curve of one seed; empty where it has no point."""
    return [(float(n), seeds[seed]) for n, seeds in sorted(errors.items()) if seed in seeds]


def factors_of_seeds(
    baseline: Mapping[int, Mapping[int, float]], method: Mapping[int, float], n_labels: int
) -> dict[int, Bounded]:
    """Return seed → k of a method at ``n_labels``, each against the baseline's curve of the same seed."""
    curves = {seed: curve_of_seed(baseline, seed) for seed in method}
    return {seed: factor(curves[seed], n_labels, error) for seed, error in method.items() if curves[seed]}
