"""How to spend a budget on labels of one to three levels, from a learning curve of each.

The error is that of the highest level: e² = e_high(N)² - Σ over lower levels of κ (e_low(n)² - e_low(N)²). Its curve
was measured with the n labels that the lower levels have, and holds as long as they have no more; what a lower level
becomes better by takes κ times its squares away, never more than leaves the part of the high curve that falls. κ is
uniform between 0 and 2: a sum of independent squares would have 1, the trainings of docs/studies/planner.md have 1.8 in
the median.
"""

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mffm.budget.costs import CostModel
from mffm.budget.curves import Curve, Posterior, posterior
from mffm.errors import InputError

FORM = 0.075  # standard deviation of the logarithm that the form is wrong by
CARRIED = 2.0  # most of a lower level's gain, in squares, that the highest level gains
WARN, REFUSE = 4.0, 16.0  # labels over the largest number that was tried
AS_GOOD = 1.05  # error over the least one up to which a split of the budget counts as equally good
FIRST = 1 / 3  # share to buy before the curves are fitted again
MAX_LEVELS = 3
_DRAWS = 1_000  # for the search; the interval takes all
_GRID = {1: 120, 2: 240, 3: 60}  # spends of a level that are tried


@dataclass(frozen=True)
class Level:
    """A level of theory that labels can be bought of.

    Attributes:
        known_with: labels of it that the highest level's curve was measured with, where it is a lower one.
        have: labels that there are: the largest number of its learning curve.
    """

    name: str
    cost: CostModel
    curve: Curve
    posterior: Posterior
    known_with: float

    @property
    def have(self) -> float:
        return self.curve.most

    @property
    def cap(self) -> float:
        """CPU seconds up to which the learning curve may be extrapolated."""
        return (REFUSE - 1) * self.have * self.cost.mean


@dataclass(frozen=True)
class Share:
    """What to buy of a level.

    Attributes:
        buy: labels; ``least`` to ``most`` are as good within 5 %.
        factor: all labels then, over those of its curve.
    """

    level: str
    buy: int
    least: int
    most: int
    seconds: float
    factor: float


@dataclass(frozen=True)
class Plan:
    """A proposal, with the error that is expected of it: median, low and high of 90 %."""

    shares: tuple[Share, ...]
    error: tuple[float, float, float]
    now: tuple[float, float, float]
    unspent: float
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "levels": {share.level: vars(share) for share in self.shares},
            "error": dict(zip(("median", "low", "high"), self.error, strict=True)),
            "error_now": dict(zip(("median", "low", "high"), self.now, strict=True)),
            "unspent_seconds": self.unspent,
            "warnings": list(self.warnings),
        }


def level_of(cost: CostModel, curve: Curve, known_with: float | None = None) -> Level:
    """Return a level; the draws of one are independent of those of another."""
    own = posterior(curve)
    order = np.random.default_rng([_number_of(curve.level), 1]).permutation(len(own.exponent))
    drawn = {name: getattr(own, name)[order] for name in ("exponent", "power", "floor", "deviation")}
    return Level(curve.level, cost, curve, replace(own, **drawn), curve.most if known_with is None else known_with)


def levels_of(
    names: Sequence[str],
    costs: Mapping[str, CostModel],
    curves: Mapping[str, Curve],
    outcomes: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> list[Level]:
    """Return the levels, the cheapest first.

    Args:
        outcomes: level → (labels, error) of what was trained since its curve. The errors of the highest level count as
            if the lower ones had no more labels than its curve was measured with: what those brought is put back.

    Raises:
        InputError: none, too many or one twice; a level without a curve; curves of different panels.
    """
    if not names or len(names) > MAX_LEVELS or len(set(names)) != len(names):
        raise InputError(f"--levels {','.join(names)}: expected one to {MAX_LEVELS} different levels")
    missing = [name for name in names if name not in curves]
    if missing:
        raise InputError(
            f"level {missing[0]!r}: no learning curve; give the report of a study over numbers of its labels: "
            f"--curve {missing[0]}=REPORT.json"
        )
    panels = {curves[name].panel for name in names}
    if len(panels) > 1:
        raise InputError(
            f"curves of different panels ({', '.join(sorted(panels))}): their errors do not add up; --panel"
        )
    *lower, highest = sorted(names, key=lambda name: costs[name].mean)
    found, gained = [], 0.0
    for name in lower:
        curve = _with_outcomes(curves[name], outcomes, 0.0)
        found.append(level_of(costs[name], curve, curves[name].most))
        gained += float(np.median(_gain(found[-1], 0.0)))
    return [*found, level_of(costs[highest], _with_outcomes(curves[highest], outcomes, gained))]


def _with_outcomes(curve: Curve, outcomes: Mapping[str, Sequence[tuple[float, float]]] | None, gained: float) -> Curve:
    """Return a curve with what was trained since, ``gained`` put back to the squares of the errors."""
    for n_labels, error in (outcomes or {}).get(curve.level, ()):
        curve = curve.with_outcome(n_labels, math.sqrt(error**2 + gained))
    return curve


def propose(levels: Sequence[Level], budget: float) -> Plan:
    """Return how many labels of each level to buy for a budget of CPU seconds.

    Raises:
        InputError: no budget; less than the cheapest label; more than 16 times the labels of every curve.
    """
    _check(levels, budget)
    *others, last = levels
    grids = [_spends(level, budget, _GRID[len(levels)]) for level in others]
    combinations = [c for c in itertools.product(*grids) if sum(c) <= budget]
    spends = np.array([[*c, min(budget - sum(c), last.cap)] for c in combinations])
    if not others:  # less than all may be as good
        spends = _spends(last, budget, _GRID[1])[:, None]
    gains = np.zeros((len(spends), _DRAWS))
    for i, level in enumerate(others):
        unique, at = np.unique(spends[:, i], return_inverse=True)
        gains += np.stack([_gain(level, seconds)[:_DRAWS] for seconds in unique])[at.reshape(-1)]
    high = np.stack([np.stack(_squared(last, seconds))[:, :_DRAWS] for seconds in spends[:, -1]])
    medians = np.sqrt(np.median(np.maximum(high[:, 0] - gains, high[:, 1]), axis=1))
    best = int(np.argmin(medians))
    good = spends[medians <= AS_GOOD * medians[best]]
    shares = []
    for i, level in enumerate(levels):
        buy, least, most = (int(s / level.cost.mean) for s in (spends[best, i], good[:, i].min(), good[:, i].max()))
        factor = (level.have + buy) / level.have
        shares.append(Share(level.name, buy, least, most, buy * level.cost.mean, factor))
    spent = spends[best].tolist()
    unspent = max(0.0, budget - sum(share.seconds for share in shares))
    return Plan(
        tuple(shares), error_at(levels, spent), error_at(levels, [0.0] * len(levels)), unspent,
        tuple(_warnings(levels, shares)),
    )  # fmt: skip


def error_at(levels: Sequence[Level], seconds: Sequence[float]) -> tuple[float, float, float]:
    """Return median, low and high of 90 % of the error after so many CPU seconds were spent on each level."""
    *others, last = levels
    squared, least = _squared(last, seconds[-1])
    for level, spent in zip(others, seconds, strict=False):
        squared = squared - _gain(level, spent)
    squared = np.maximum(squared, least)
    form = FORM * np.random.default_rng(2).standard_normal(np.shape(squared)) if others else 0.0
    low, middle, high = np.quantile(np.sqrt(squared) * np.exp(form), [0.05, 0.5, 0.95])
    return float(middle), float(low), float(high)


def _squared(level: Level, seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """Return e² of each draw of the highest level, its deviation from the form included, and e² of what falls alone."""
    own = level.posterior
    noise = np.random.default_rng(_number_of(level.name)).standard_normal(len(own.exponent))
    n_labels = level.have + seconds / level.cost.mean
    whole, falling = (own.errors(n_labels, with_floor) * np.exp(own.deviation * noise) for with_floor in (True, False))
    return np.square(whole), np.square(falling)


def _gain(level: Level, seconds: float) -> np.ndarray:
    """Return by how much labels of a lower level make the squared error of the highest less, of each draw."""
    own = level.posterior
    carried = np.random.default_rng(_number_of(level.name)).uniform(0, CARRIED, len(own.exponent))
    n_labels = level.have + seconds / level.cost.mean
    return carried * (np.square(own.errors(level.known_with)) - np.square(own.errors(n_labels)))


def _number_of(name: str) -> int:
    """Return a number that names a level in every process: what is drawn for levels is independent."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _spends(level: Level, budget: float, n: int) -> np.ndarray:
    """Return CPU seconds to try on a level: nothing, and from one label to all that is sensible."""
    most = min(budget, level.cap)
    if most <= level.cost.mean:
        return np.zeros(1)
    return np.concatenate([[0.0], np.geomspace(level.cost.mean, most, n - 1)])


def _check(levels: Sequence[Level], budget: float) -> None:
    if not (budget > 0 and math.isfinite(budget)):
        raise InputError(f"--budget {budget:g}: expected a positive time, such as 24h")
    cheapest = min(level.cost.mean for level in levels)
    if budget < cheapest:
        raise InputError(f"--budget of {duration(budget)}: one label of the cheapest level costs {duration(cheapest)}")
    most = sum(level.cap for level in levels)
    if budget > most:
        raise InputError(
            f"--budget of {duration(budget)} buys more than {REFUSE:g} times the labels of every learning curve, where "
            f"it says nothing any more; spend up to {duration(most)}, train, and give the outcome"
        )


def _warnings(levels: Sequence[Level], shares: Sequence[Share]) -> list[str]:
    found = []
    for level, share in zip(levels, shares, strict=True):
        n_sizes = len(level.curve.points)
        if share.factor > WARN:
            found.append(
                f"{level.name}: {share.factor:.3g} times the {level.have:g} labels of its curve; beyond {WARN:g} times "
                f"a curve may bend{', and beyond 16 nothing is proposed' if share.factor > 0.95 * REFUSE else ''}"
            )
        if n_sizes < 4:
            found.append(f"{level.name}: {n_sizes} numbers of labels in its curve; four or more say much more")
    return found


def duration(seconds: float) -> str:
    """Return a time for people: 3.2 ms, 12 s, 3.5 h."""
    for unit, size in (("d", 86_400.0), ("h", 3_600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= 1.5 * size or unit == "s":
            return f"{1e3 * seconds:.3g} ms" if seconds < 0.1 else f"{seconds / size:.3g} {unit}"
    raise AssertionError(seconds)
