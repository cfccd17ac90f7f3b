"""One pick after the other, by a criterion, within limits: a number, a budget, so many of a formula."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mffm.select.criteria import Criterion, MaxDet


@dataclass(frozen=True)
class Limits:
    """What ends the picks, or forbids some.

    Attributes:
        n: picks; None: no limit.
        costs: [n_candidates], positive; gains then count per cost. None: every candidate costs the same.
        budget: sum of the costs of the picks, at most.
        formulas: [n_candidates] int, equal for equal formulas.
        per_formula: picks of one formula, at most.
        elements: [n_candidates, n_elements] bool, what each candidate is made of. While there is a candidate with an
            element that is neither in ``covered`` nor in a pick, only those are picked from. None: no such rule.
        covered: [n_elements] bool.
    """

    n: int | None
    costs: np.ndarray | None
    budget: float
    formulas: np.ndarray
    per_formula: int | None
    elements: np.ndarray | None = None
    covered: np.ndarray | None = None


@dataclass(frozen=True)
class Pick:
    """A candidate's index, its gain when it was chosen (per cost where there are costs), and what was noted of it."""

    index: int
    gain: float
    note: Any


def greedy(
    criterion: Criterion, limits: Limits, allowed: np.ndarray, note: Callable[[int], Any], by_cost: bool = True
) -> list[Pick]:
    """Return the picks in their order. Equal gains: the lower index.

    Args:
        allowed: [n_candidates] bool.
        note: called with a pick before it is added to the criterion.
        by_cost: divide gains by costs; not for a random choice.

    With a budget the picks of ``MaxDet`` are given up for the best single one where that gains more than all of them:
    what bounds the loss of a greedy choice. Not where elements come first: their picks are needed whatever they gain.
    """
    allowed = allowed.copy()
    price = limits.costs if by_cost else None
    used = np.zeros(int(limits.formulas.max(initial=0)) + 1, np.int64)
    left = limits.budget
    lacking = None  # [n_candidates, n_elements] bool
    if limits.elements is not None:
        lacking = limits.elements if limits.covered is None else limits.elements & ~limits.covered
    alone = _best_alone(criterion, limits, allowed, note)
    picks: list[Pick] = []
    total = 0.0
    while limits.n is None or len(picks) < limits.n:
        if limits.costs is not None:
            allowed &= limits.costs <= left
        if not allowed.any():
            break
        offered = allowed
        if lacking is not None:
            offered = allowed & lacking.any(axis=1)
            if not offered.any():
                offered, lacking = allowed, None  # for good: nothing becomes allowed, or lacks more
        gains = criterion.gains(offered)
        values = gains if price is None else gains / price
        best = int(np.argmax(np.where(offered, values, -np.inf)))
        if lacking is not None and limits.elements is not None:
            lacking = lacking & ~limits.elements[best]
        picks.append(Pick(best, float(values[best]), note(best)))
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
    if limits.costs is None or math.isinf(limits.budget) or limits.elements is not None:
        return None
    if not isinstance(criterion, MaxDet):
        return None
    gains = np.where(allowed & (limits.costs <= limits.budget), criterion.gains(allowed), -np.inf)
    best = int(np.argmax(gains))
    if gains[best] == -np.inf:
        return None
    return Pick(best, float(gains[best] / limits.costs[best]), note(best)), float(gains[best])
