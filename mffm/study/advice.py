"""Plain-language advice from the errors of a study."""

from collections.abc import Mapping, Sequence

from mffm.keys import REPORT_UNITS
from mffm.study import curves
from mffm.study.grid import Grid

AS_GOOD = 1.05  # an error ratio to the best up to which a method counts as equally good, whatever its seeds say
STILL_FALLS = 0.9  # error ratio from one number of labels to the next above which more labels hardly help

Panels = Mapping[tuple[str, str], Mapping[str, Mapping[int, Mapping[int, float]]]]


def advice(grid: Grid, errors: Panels) -> list[str]:
    """Return sentences: what to use at each number of labels, whether more labels pay, what the study cannot say."""
    lines: list[str] = []
    config = grid.config
    winners: dict[int, list[str]] = {}
    for n in sorted({n for methods in errors.values() for labels in methods.values() for n in labels}):
        ranked = rank(errors, [m for m in config.methods if not config.methods[m].needs_lf_at_inference], n)
        if not ranked:
            continue
        winners[n] = [name for name, _, is_as_good in ranked if is_as_good]
        lines.append(_at(grid, errors, n, ranked))
        apart = rank(errors, [m for m in config.methods if config.methods[m].needs_lf_at_inference], n)
        if apart:
            ratio = _ratio(errors, apart[0][0], ranked[0][0], n)
            lines.append(
                f"Where every prediction may include a low-fidelity calculation, with {n} frames: "
                f"{config.title(apart[0][0])}, {ratio:.2f} times the errors of {config.title(ranked[0][0])}."
            )
    if not winners:
        return ["No cell is finished at any number of labels for all panels: there is no advice yet."]
    everywhere = [m for m in config.methods if all(m in names for names in winners.values())]
    if everywhere and len(winners) > 1:
        names = " or ".join(config.title(m) for m in everywhere)
        lines.insert(0, f"Use {names}: no method is clearly better at any number of labels studied.")
    lines += _more_labels(grid, errors, winners)
    if len(config.seeds) == 1:
        lines.append(
            "One seed: differences of some percent between methods are not resolved. Add seeds before a claim."
        )
    return lines


def rank(errors: Panels, methods: Sequence[str], n: int) -> list[tuple[str, float, bool]]:
    """Return (method, error ratio to the best, is as good as the best), the best first, of those with all panels.

    The ratio is the geometric mean over panels and over the seeds that both have. A method is as good as the best
    where its ratio is up to 1.05, or where with several seeds it is better than the best with one of them.
    """
    whole = [m for m in methods if all(labels.get(m, {}).get(n) for labels in errors.values())]
    if not whole:
        return []
    best = min(whole, key=lambda m: curves.mean(curves.mean(p[m][n].values()) for p in errors.values()))
    found = []
    for method in whole:
        ratios = _ratios(errors, method, best, n)
        ratio = curves.mean(ratios.values()) if ratios else _ratio(errors, method, best, n)
        wins_once = len(ratios) > 1 and min(ratios.values()) <= 1
        found.append((method, ratio, method == best or ratio <= AS_GOOD or wins_once))
    return sorted(found, key=lambda row: (row[0] != best, row[1]))


def _ratios(errors: Panels, method: str, other: str, n: int) -> dict[int, float]:
    """Return seed → error ratio over all panels, of the seeds that both methods have."""
    seeds = set.intersection(*(set(p[method][n]) & set(p[other][n]) for p in errors.values()))
    return {s: curves.mean(p[method][n][s] / p[other][n][s] for p in errors.values()) for s in sorted(seeds)}


def _ratio(errors: Panels, method: str, other: str, n: int) -> float:
    return curves.mean(curves.mean(p[method][n].values()) / curves.mean(p[other][n].values()) for p in errors.values())


def _at(grid: Grid, errors: Panels, n: int, ranked: list[tuple[str, float, bool]]) -> str:
    config, best = grid.config, ranked[0][0]
    shown = ", ".join(
        f"{kind} {prop} {curves.mean(methods[best][n].values()):.3g} {REPORT_UNITS[prop][0]}"
        for (kind, prop), methods in errors.items()
    )
    text = f"With {n} frames with {config.high} labels: {config.title(best)} ({shown})."
    for baseline in config.baselines:
        has = all(p.get(baseline, {}).get(n) for p in errors.values())
        if baseline != best and has:
            text += f" Its errors are {_ratio(errors, best, baseline, n):.2f} times those of {config.title(baseline)}."
    tied = [config.title(name) for name, _, is_as_good in ranked[1:] if is_as_good]
    return text + (f" As good within the spread: {', '.join(tied)}." if tied else "")


def _more_labels(grid: Grid, errors: Panels, winners: Mapping[int, list[str]]) -> list[str]:
    """Return whether the last growth of the labels still paid for the method that is best at the most labels."""
    if len(winners) < 2:
        return ["One number of labels: the study cannot say whether more labels pay."]
    most = max(winners)
    best = winners[most][0]
    have = sorted(n for n in winners if all(p.get(best, {}).get(n) for p in errors.values()))
    if len(have) < 2:
        return []
    before = have[-2]
    ratio = curves.mean(
        curves.mean(p[best][most].values()) / curves.mean(p[best][before].values()) for p in errors.values()
    )
    change = f"From {before} to {most} frames the errors of {grid.config.title(best)} change by a factor {ratio:.2f}"
    if ratio <= STILL_FALLS:
        return [f"{change}: more {grid.config.high} labels still pay."]
    return [f"{change}: more {grid.config.high} labels hardly help; more or better low-fidelity data, or steps, may."]
