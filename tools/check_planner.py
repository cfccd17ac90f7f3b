"""Does the planner's posterior know what more labels bring? Learning curves of committed studies, their ends held out.

    python tools/check_planner.py docs/studies/idle docs/studies/idle_schedules docs/studies/crystals

Each curve is fitted to its smaller numbers of labels; each larger one up to ``FARTHEST`` times is predicted.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mffm.budget.curves import curve_of, posterior
from mffm.release import read_json

FARTHEST = 4.2  # 24 to 100 labels of the crystals is 4.17
FEWEST = 2  # sizes that are fitted


class Held(NamedTuple):
    """A held-out point and what was said of it; median, low and high of 90 %."""

    study: str
    panel: str
    method: str
    n_fitted: int
    most: float
    n_labels: float
    error: float
    median: float
    low: float
    high: float

    @property
    def is_inside(self) -> bool:
        return self.low <= self.error <= self.high


def held_out(folder: Path, seen: set[tuple[float, ...]]) -> Iterator[Held]:
    """Yield every point that a prefix of its curve predicts.

    Args:
        seen: errors of curves that another study had too: not counted twice, and added to.
    """
    report = read_json(folder / "report.json")
    for panel, methods in report["curves"].items():
        for method, rows in methods.items():
            curve = curve_of(report["high"], panel, method, rows)
            errors = tuple(point.error for point in curve.points)
            if errors in seen or len(set(errors)) == 1:  # refitted references change no force: nothing to predict
                continue
            seen.add(errors)
            for n in range(FEWEST, len(curve.points)):
                known = curve.up_to(n)
                fitted = posterior(known)
                for point in curve.points[n:]:
                    if point.n_labels <= FARTHEST * known.most:
                        said = fitted.interval(point.n_labels, point.n_seeds)
                        yield Held(folder.name, panel, method, n, known.most, point.n_labels, point.error, *said)


def line(name: str, points: list[Held]) -> str:
    """Return a row of the table: how many are inside, below, above; widths; how far the medians are off."""
    inside = sum(p.is_inside for p in points)
    below, above = sum(p.error < p.low for p in points), sum(p.error > p.high for p in points)
    widths = sorted(p.high / p.low for p in points)
    ratio = math.exp(sum(math.log(p.error / p.median) for p in points) / len(points))
    off = sorted(abs(math.log(p.error / p.median)) for p in points)[len(points) // 2]
    return (
        f"| {name} | {len(points)} | {inside} ({100 * inside / len(points):.0f} %) | {below} | {above} | "
        f"{widths[len(widths) // 2]:.2f} ({widths[0]:.2f} to {widths[-1]:.2f}) | {100 * off:.0f} % | {ratio:.2f} |"
    )


def main(folders: list[str]) -> None:
    seen: set[tuple[float, ...]] = set()
    points = [held for folder in folders for held in held_out(Path(folder), seen)]
    if not points:
        sys.exit(f"no curve in {', '.join(folders)} has {FEWEST + 1} numbers of labels within {FARTHEST:g} times")
    print("| held-out points | n | inside 90 % | below | above | high/low | median off by | found/predicted |")
    print("|---|---|---|---|---|---|---|---|")
    for n in sorted({p.n_fitted for p in points}):
        for study in dict.fromkeys(p.study for p in points):
            own = [p for p in points if (p.n_fitted, p.study) == (n, study)]
            if own:
                print(line(f"{study}, {n} sizes fitted", own))
    for panel in dict.fromkeys(p.panel for p in points):
        print(line(f"all of {panel}", [p for p in points if p.panel == panel]))
    print(line("all", points))
    print("\n| study | panel | method | fitted up to | predicted at | found | median | 90 % | |")
    print("|---|---|---|---|---|---|---|---|---|")
    for p in points:
        verdict = "" if p.is_inside else "below" if p.error < p.low else "above"
        print(
            f"| {p.study} | {p.panel} | {p.method} | {p.most:g} ({p.n_fitted} sizes) | {p.n_labels:g} | {p.error:.4g} "
            f"| {p.median:.4g} | {p.low:.4g} to {p.high:.4g} | {verdict} |"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
