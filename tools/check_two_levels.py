"""Does a plan of two levels know what more labels of both bring? Trainings with both against what it says of them.

    mffm study configs/studies/levels_low.yaml && mffm study configs/studies/levels.yaml
    python tools/check_two_levels.py docs/studies/levels_low docs/studies/levels

The cheap level's curve is that of the first study; the expensive one's that of the second's baseline, at its smallest
numbers of labels. Everything else that the second study trained, with more labels of either, is predicted.
"""

import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mffm.budget.costs import CostModel
from mffm.budget.curves import MIN_SIZES, Curve, curve_of
from mffm.budget.plan import Level, error_at, level_of
from mffm.errors import InputError
from mffm.release import read_json


class Predicted(NamedTuple):
    """A training with more labels, and what was said of it; median, low and high of 90 %."""

    panel: str
    n_low: int
    n_high: float
    error: float
    median: float
    low: float
    high: float

    @property
    def is_inside(self) -> bool:
        return self.low <= self.error <= self.high


def level(curve: Curve) -> Level:
    """Return a level whose labels cost a second each: numbers of labels are what is compared."""
    return level_of(CostModel(curve.level, "atoms", None, 1.0, 0.0, 5, 1.0, 1.0, 1.0, 1.0), curve)


def low_labels(method: str) -> int:
    """Return the cheap labels of a method, which its name ends with: low640."""
    return int(re.fullmatch(r"\D+(\d+)", method)[1])  # type: ignore[index]


def predicted(low_folder: Path, high_folder: Path) -> Iterator[Predicted]:
    """Yield what was trained with more labels of either level than the plan knows."""
    reports = [read_json(folder / "report.json") for folder in (low_folder, high_folder)]
    (base,) = reports[1]["baselines"]
    for panel, methods in reports[1]["curves"].items():
        ((name, rows),) = reports[0]["curves"][panel].items()
        low = level(curve_of(reports[0]["high"], panel, name, rows).up_to(MIN_SIZES))
        high = level(curve_of(reports[1]["high"], panel, base, methods[base]).up_to(MIN_SIZES))
        if low.curve.most != low_labels(base):
            raise InputError(f"{low_folder}: its curve ends at {low.curve.most:g} labels, {base} has others")
        for method, of_method in methods.items():
            for point in curve_of(reports[1]["high"], panel, method, of_method).points:
                more = [low_labels(method) - low.have, point.n_labels - high.have]
                if min(more) >= 0 and max(more) > 0:
                    yield Predicted(
                        panel, low_labels(method), point.n_labels, point.error, *error_at([low, high], more)
                    )


def main(low_folder: Path, high_folder: Path) -> None:
    """Print every prediction beside what was found."""
    points = list(predicted(low_folder, high_folder))
    print("| panel | cheap labels | expensive labels | found | predicted | 90 % | high/low | |\n" + "|---" * 8 + "|")
    for p in points:
        verdict = "" if p.is_inside else "below" if p.error < p.low else "above"
        print(
            f"| {p.panel} | {p.n_low} | {p.n_high:g} | {p.error:.4g} | {p.median:.4g} | {p.low:.4g} to {p.high:.4g} | "
            f"{p.high / p.low:.2f} | {verdict} |"
        )
    ratio = math.exp(sum(math.log(p.error / p.median) for p in points) / len(points))
    widths = sorted(p.high / p.low for p in points)
    print(
        f"\n{sum(p.is_inside for p in points)} of {len(points)} inside 90 %, median high/low "
        f"{widths[len(widths) // 2]:.2f}, found ÷ predicted {ratio:.2f} (geometric mean)"
    )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python tools/check_two_levels.py LOW_STUDY HIGH_STUDY, folders with a report.json")
    try:
        main(*map(Path, sys.argv[1:]))
    except InputError as error:
        sys.exit(f"error: {error}")
