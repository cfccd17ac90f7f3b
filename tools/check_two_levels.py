"""Does a plan of two levels know what more labels of both bring? e² = e_low² + e_high² against trainings with both.

    mffm study configs/studies/levels_low.yaml && mffm study configs/studies/levels.yaml
    python tools/check_two_levels.py docs/studies/levels_low docs/studies/levels

The cheap level's curve is that of the first study; the expensive one's that of the second's baseline, at its smallest
numbers of labels. Everything else that the second study trained, with more labels of either, is predicted.
"""

import math
import re
import sys
from pathlib import Path

from mffm.budget.costs import CostModel
from mffm.budget.curves import MIN_SIZES, Curve, curve_of, posterior
from mffm.budget.plan import Level, error_at
from mffm.release import read_json


def level_of(curve: Curve) -> Level:
    """Return a level whose labels cost a second each: numbers of labels are what is compared."""
    cost = CostModel(curve.level, "atoms", None, 1.0, 0.0, 5, 1.0, 1.0, 1.0, 1.0)
    return Level(curve.level, cost, curve, posterior(curve))


def low_labels(method: str) -> int:
    """Return the cheap labels of a method, which its name ends with: low640."""
    return int(re.fullmatch(r"\D+(\d+)", method)[1])  # type: ignore[index]


def main(low_folder: str, high_folder: str) -> None:
    reports = [read_json(Path(folder) / "report.json") for folder in (low_folder, high_folder)]
    (base,) = reports[1]["baselines"]
    print("| panel | cheap labels | expensive labels | found | predicted | 90 % | high/low | |\n" + "|---" * 8 + "|")
    found = []
    for panel, methods in reports[1]["curves"].items():
        ((name, rows),) = reports[0]["curves"][panel].items()
        low = level_of(curve_of(reports[0]["high"], panel, name, rows))
        high = level_of(curve_of(reports[1]["high"], panel, base, methods[base]).up_to(MIN_SIZES))
        if low.curve.most != low_labels(base):
            sys.exit(f"{low_folder}: its curve ends at {low.curve.most:g} labels, {base} has others")
        for method, of_method in methods.items():
            for point in curve_of(reports[1]["high"], panel, method, of_method).points:
                more = [low_labels(method) - low.have, point.n_labels - high.have]
                if min(more) < 0 or max(more) == 0:
                    continue
                middle, least, most = error_at([low, high], more)
                verdict = "" if least <= point.error <= most else "below" if point.error < least else "above"
                found.append((not verdict, most / least, point.error / middle))
                print(
                    f"| {panel} | {low_labels(method)} | {point.n_labels:g} | {point.error:.4g} | {middle:.4g} | "
                    f"{least:.4g} to {most:.4g} | {most / least:.2f} | {verdict} |"
                )
    inside, widths, ratios = zip(*found, strict=True)
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(
        f"\n{sum(inside)} of {len(inside)} inside 90 %, median high/low {sorted(widths)[len(widths) // 2]:.2f}, "
        f"found ÷ predicted {mean:.2f} (geometric mean)"
    )


if __name__ == "__main__":
    main(*sys.argv[1:3])
