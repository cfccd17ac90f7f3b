"""One pick after the other, by a criterion, within limits: a number, a budget, so many of a formula."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mffm.select.criteria import Criterion, MaxDet

PIVOT = 0.5
RANK_TOLERANCE = 1e-6  # of distances between fractions; rounding leaves 1e-15


@dataclass(frozen=True)
class Limits:
    """What ends the picks, or forbids some.

    Attributes:
        n: picks; None: no limit.
        costs: [n_candidates], positive; gains then count per cost. None: every candidate costs the same.
        budget: sum of the costs of the picks, at most.
        formulas: [n_candidates] int, equal for equal formulas.
        per_formula: picks of one formula, at most.
        fractions: [n_formulas, n_elements], of the atoms of each of ``formulas``. While those of labels and picks do
            not span those of the candidates, only candidates outside that span are picked from, at least ``PIVOT``
            times as far as the farthest: element references are then determined, and not by small differences. None:
            no such rule.
        covered: [n_compositions, n_elements] fractions, of labels.
    """

    n: int | None
    costs: np.ndarray | None
    budget: float
    formulas: np.ndarray
    per_formula: int | None
    fractions: np.ndarray | None = None
    covered: np.ndarray | None = None


@dataclass(frozen=True)
class Pick:
    """A candidate's index, its gain when it was chosen (per cost where there are costs), and what was noted of it.

    ``is_new``: labels and picks before it do not span its composition.
    """

    index: int
    gain: float
    note: Any
    is_new: bool = False


def greedy(
    criterion: Criterion, limits: Limits, allowed: np.ndarray, note: Callable[[int], Any], by_cost: bool = True
) -> list[Pick]:
    """Return the picks in their order. Equal gains: the lower index.

    Args:
        allowed: [n_candidates] bool.
        note: called with a pick before it is added to the criterion.
        by_cost: divide gains by costs; not for a random choice.

    With a budget the picks of ``MaxDet`` are given up for the best single one where that gains more than all of them:
    what bounds the loss of a greedy choice. Not where compositions come first: those are needed whatever they gain.
    """
    allowed = allowed.copy()
    price = limits.costs if by_cost else None
    used = np.zeros(int(limits.formulas.max(initial=0)) + 1, np.int64)
    left = limits.budget
    unseen = None if limits.fractions is None else Unseen(limits.fractions, limits.covered)
    if unseen is not None and not unseen.of(limits.formulas, allowed).any():
        unseen = None
    alone = _best_alone(criterion, limits, allowed, note) if unseen is None else None
    picks: list[Pick] = []
    total = 0.0
    while limits.n is None or len(picks) < limits.n:
        if limits.costs is not None:
            allowed &= limits.costs <= left
        if not allowed.any():
            break
        offered = allowed
        if unseen is not None:
            distances = unseen.of(limits.formulas, allowed)
            if distances.any():
                offered = distances >= PIVOT * distances.max()
            else:
                unseen = None  # for good: nothing becomes allowed, or farther
        gains = criterion.gains(offered)
        values = gains if price is None else gains / price
        best = int(np.argmax(np.where(offered, values, -np.inf)))
        if unseen is not None:
            unseen.add(int(limits.formulas[best]))
        picks.append(Pick(best, float(values[best]), note(best), is_new=unseen is not None))
        total += float(gains[best])
        criterion.add(best)
        allowed[best] = False
        if limits.costs is not None:
            left -= float(limits.costs[best])
        formula = limits.formulas[best]
        used[formula] += 1
        if limits.per_formula is not None and used[formula] >= limits.per_formula:
            allowed &= limits.formulas != formula
    return [alone[0]] if alone is not None and alone[1] > total else picks


def _best_alone(
    criterion: Criterion, limits: Limits, allowed: np.ndarray, note: Callable[[int], Any]
) -> tuple[Pick, float] | None:
    """Return the affordable candidate of the largest gain, and that gain, where gains add up to a sum: log det."""
    if limits.costs is None or math.isinf(limits.budget):
        return None
    if not isinstance(criterion, MaxDet):
        return None
    gains = np.where(allowed & (limits.costs <= limits.budget), criterion.gains(allowed), -np.inf)
    best = int(np.argmax(gains))
    if gains[best] == -np.inf:
        return None
    return Pick(best, float(gains[best] / limits.costs[best]), note(best)), float(gains[best])


class Unseen:
    """How far compositions, fractions of atoms [n, n_elements], are from the span of what labels and picks have."""

    def __init__(self, fractions: np.ndarray, covered: np.ndarray | None):
        self._rest = np.array(fractions, np.float64)
        if covered is not None and len(covered):
            _, values, vectors = np.linalg.svd(covered, full_matrices=False)
            basis = vectors[values > RANK_TOLERANCE * values[0]]
            for _ in range(2):  # the second takes what rounding left
                self._rest -= (self._rest @ basis.T) @ basis

    def of(self, formulas: np.ndarray, allowed: np.ndarray) -> np.ndarray:
        """Return the distances of candidates [n] of these compositions; 0 where not allowed, or within rounding."""
        distances = np.linalg.norm(self._rest, axis=1)
        distances[distances < RANK_TOLERANCE] = 0
        return np.where(allowed, distances[formulas], 0)

    def add(self, chosen: int) -> None:
        """Take a composition into the span."""
        direction = self._rest[chosen] / np.linalg.norm(self._rest[chosen])
        for _ in range(2):
            self._rest -= np.outer(self._rest @ direction, direction)
