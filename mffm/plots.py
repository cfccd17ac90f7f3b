"""Plots of mffm: parity, learning curves, properties. matplotlib is imported when a plot is drawn."""

import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mffm.errors import InputError

Panel = tuple[str, str, np.ndarray, np.ndarray]  # title, unit, labels, predictions

COLORS = (
    "#0b6e4f",
    "#c8553d",
    "#28536b",
    "#d9a404",
    "#7b4b94",
    "#5c5c5c",
)  # apart in grey and for colour-blind readers


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise InputError(f"a plot needs matplotlib ({error}); install it: pip install 'mffm[properties]'") from error

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 130})
    return plt


def parity_panel(
    axes: Any, label: np.ndarray, prediction: np.ndarray, title: str, unit: str, color: str = COLORS[0]
) -> None:
    """Draw predictions against labels with the diagonal."""
    axes.scatter(label, prediction, s=4, alpha=0.5, linewidths=0, color=color, rasterized=True)
    low, high = float(min(label.min(), prediction.min())), float(max(label.max(), prediction.max()))
    axes.plot([low, high], [low, high], color="black", linewidth=0.7)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(f"label, {unit}")
    axes.set_ylabel(f"prediction, {unit}")


def parity(path: Path, panels: Sequence[Panel], heading: str = "") -> None:
    """Write one figure of parity panels."""
    plt = _pyplot()
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.3 * columns, 3.1 * rows), squeeze=False, layout="constrained")
    for axis, (title, unit, label, prediction) in zip(axes.flat, panels, strict=False):
        parity_panel(axis, label, prediction, title, unit)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    if heading:
        figure.suptitle(heading, fontsize=10)
    figure.savefig(path)
    plt.close(figure)


def _plain_numbers(scale: Any, subs: Sequence[float] = (1, 2, 5)) -> None:
    """Label a logarithmic axis of few decades with numbers as one says them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    scale.set_major_locator(LogLocator(subs=subs))
    scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    scale.set_minor_formatter(NullFormatter())


def calibration(path: Path, panels: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, str]]) -> None:
    """Write one figure, a column for each title: errors against standard deviations above, coverage below.

    Args:
        panels: title → standard deviations [n] and absolute errors [n]; levels [m] and observed coverage [m]; the unit
            of the first two.
    """
    plt = _pyplot()
    size = (3.4 * len(panels), 6.2)
    figure, axes = plt.subplots(2, len(panels), figsize=size, squeeze=False, layout="constrained")
    for (above, below), (title, (stds, errors, levels, observed, unit)) in zip(axes.T, panels.items(), strict=True):
        shown = np.maximum(errors, 1e-2 * stds.min())  # an exact zero has no place on a logarithmic axis
        above.scatter(stds, shown, s=5, alpha=0.5, linewidths=0, color=COLORS[0], rasterized=True)
        ends = np.array([stds.min(), stds.max()])
        for factor, style, label in ((1.0, "-", "1 σ"), (2.0, "--", "2 σ")):
            above.plot(ends, factor * ends, style, color="black", linewidth=0.8, label=label)
        above.set_xscale("log")
        above.set_yscale("log")
        for scale in (above.xaxis, above.yaxis):
            _plain_numbers(scale)
        above.set_title(title, fontsize=9)
        above.set_xlabel(f"standard deviation, {unit}")
        above.set_ylabel(f"absolute error, {unit}")
        above.legend(frameon=False, fontsize=8)
        below.plot([0, 1], [0, 1], color="black", linewidth=0.7)
        below.plot(levels, observed, color=COLORS[1], linewidth=1.6)
        below.set_xlabel("expected share inside")
        below.set_ylabel("observed share inside")
    figure.savefig(path)
    plt.close(figure)


def learning_curves(axes: Any, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], ylabel: str) -> None:
    """Draw error against step, one line a run, on a logarithmic axis; a single value is a dashed level."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    for (name, (steps, values)), color in zip(curves.items(), COLORS, strict=False):
        if len(values) == 1:
            axes.axhline(values[0], label=name, color=color, linewidth=1.2, linestyle="--")
        else:
            axes.plot(steps, values, label=name, color=color, linewidth=1.4)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)


def comparison(
    path: Path,
    curves: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    panels: Sequence[Panel],
) -> None:
    """Write one figure: learning curves above (y label → run → (steps, values)), parity panels below."""
    plt = _pyplot()
    columns = max(len(curves), len(panels))
    figure, axes = plt.subplots(2, columns, figsize=(3.6 * columns, 6.2), squeeze=False, layout="constrained")
    for axis, (ylabel, lines) in zip(axes[0], curves.items(), strict=False):
        learning_curves(axis, lines, ylabel)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    for axis, (title, unit, label, prediction) in zip(axes[1], panels, strict=False):
        parity_panel(axis, label, prediction, title, unit)
    for axis in [*axes[0][len(curves) :], *axes[1][len(panels) :]]:
        axis.set_visible(False)
    figure.savefig(path)
    plt.close(figure)


def rank_curves(
    path: Path, one: np.ndarray, two: np.ndarray, difference: np.ndarray, floor: np.ndarray, factor: float
) -> None:
    """Write one figure: the losses of 1 and 2 ranks above, [n_steps] each; their difference and the floor below."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    plt = _pyplot()
    steps = np.arange(1, len(one) + 1)
    figure, (above, below) = plt.subplots(2, 1, figsize=(6.2, 5.6), sharex=True, layout="constrained")
    above.plot(steps, one, color=COLORS[0], linewidth=3.5, alpha=0.45, label="1 rank")
    above.plot(steps, two, color=COLORS[1], linewidth=1.2, label="2 ranks")
    above.set_ylabel("training loss")
    above.set_yscale("log")
    above.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    above.yaxis.set_major_formatter(ScalarFormatter())
    above.yaxis.set_minor_formatter(NullFormatter())
    above.legend(frameon=False)
    below.fill_between(
        steps, floor, factor * floor, color=COLORS[5], alpha=0.2, linewidth=0, label=f"up to {factor:g} × the floor"
    )
    below.plot(steps, floor, color=COLORS[5], linewidth=1.2, label="noise floor: 1 rank, other orders of summation")
    shown = difference > 0  # an exact zero has no place on a logarithmic axis
    below.plot(steps[shown], difference[shown], "o", markersize=3, color=COLORS[1], label="|2 ranks − 1 rank|")
    below.set_yscale("log")
    below.set_xlabel("step")
    below.set_ylabel("difference of the loss")
    below.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path)
    plt.close(figure)


def errors_at_time(
    path: Path, panels: Mapping[str, Mapping[str, Sequence[tuple[Sequence[float], Sequence[float], bool]]]]
) -> None:
    """Write one figure of errors against CPU minutes, both logarithmic, a panel for each y label.

    An entry of a panel has (minutes, errors, whether the last is the end) for every length of its schedule; a filled
    dot is the end of a schedule.
    """
    from matplotlib.lines import Line2D

    plt = _pyplot()
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    size = (3.6 * columns, 3.1 * rows + 0.4)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    names = list(dict.fromkeys(name for entries in panels.values() for name in entries))
    styles: dict[str, tuple[str, Any]] = {
        n: (COLORS[i % len(COLORS)], ("-", "--", ":")[i // len(COLORS) % 3]) for i, n in enumerate(names)
    }
    for axis, (ylabel, entries) in zip(axes.flat, panels.items(), strict=False):
        for name, schedules in entries.items():
            color, line = styles[name]
            for minutes, errors, is_over in schedules:
                axis.plot(minutes, errors, line, color=color, linewidth=1.4)
                axis.plot(minutes, errors, "o", markersize=3, color=color, markerfacecolor="white")
                if is_over:
                    axis.plot(minutes[-1:], errors[-1:], "o", markersize=4, color=color)
        axis.set_xscale("log")
        axis.set_yscale("log")
        for scale, steps in ((axis.xaxis, (1, 2, 5)), (axis.yaxis, (1, 2, 3, 5, 7))):
            _plain_numbers(scale, steps)
        axis.set_xlabel("CPU minutes, one thread")
        axis.set_ylabel(ylabel)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    handles = [Line2D([], [], color=styles[n][0], linestyle=styles[n][1], label=n) for n in names]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(names), 8) or 1, frameon=False, fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def label_curves(
    path: Path,
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float, float, float]]]],
    xlabel: str,
    columns: int,
    dashed: Collection[str] = (),
) -> None:
    """Write one figure of errors against numbers of labels, both logarithmic, a panel for each y label.

    Args:
        panels: y label → name → points (labels, mean, least, most); bars go from least to most.
        columns: panels a row.
        dashed: names that are drawn with a broken line.
    """
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, ScalarFormatter

    plt = _pyplot()
    rows = -(-len(panels) // columns)
    names = list(dict.fromkeys(name for entries in panels.values() for name in entries))
    width = 4.2 * columns
    fits = int(16 * width) - 8  # letters of a line beside the key
    told = [textwrap.fill(name, fits) for name in names]
    longest = min(fits, max(map(len, names), default=0)) + 8
    in_a_row = max(1, min(3, int(16 * width / longest)))
    lines = sum(text.count("\n") + 1 for text in told)
    size = (width, 3.3 * rows + 0.18 * -(-lines // in_a_row))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    handles: dict[str, Any] = {}
    for axis, (ylabel, entries) in zip(axes.flat, panels.items(), strict=False):
        for name, points in entries.items():
            i = names.index(name)
            labels, means, least, most = (np.array(column) for column in zip(*points, strict=True))
            handles[name] = axis.errorbar(
                labels * 1.015 ** (i - len(names) / 2), means, yerr=np.maximum(0.0, (means - least, most - means)),
                capsize=2, color=COLORS[i % len(COLORS)], marker="os^D"[i // len(COLORS) % 4], markersize=4,
                linewidth=1.4, elinewidth=0.8, linestyle="--" if name in dashed else "-",
            )  # fmt: skip
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.xaxis.set_major_locator(FixedLocator(sorted({p[0] for points in entries.values() for p in points})))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_formatter(ScalarFormatter())
            scale.set_minor_formatter(NullFormatter())
        axis.set_xlabel(xlabel)
        axis.set_ylabel(ylabel)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    figure.legend(
        [handles[name] for name in names], told, loc="outside upper center", ncols=in_a_row, frameon=False, fontsize=8
    )  # fmt: skip
    figure.savefig(path)
    plt.close(figure)


def against_composition(
    path: Path, panels: Mapping[str, tuple[Sequence[float], Mapping[str, Sequence[float]]]], ylabel: str
) -> None:
    """Write one figure of values against composition, a panel for each title.

    Args:
        panels: title → fractions and name → values there; the first name is drawn as black dots, the others as lines.
    """
    plt = _pyplot()
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    size = (3.4 * columns, 2.7 * rows + 0.8)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    handles: dict[str, Any] = {}
    for axis, (title, (fractions, lines)) in zip(axes.flat, panels.items(), strict=False):
        axis.axhline(0, color="black", linewidth=0.5)
        for i, (name, values) in enumerate(lines.items()):
            if i == 0:
                (handles[name],) = axis.plot(fractions, values, "o", color="black", markersize=4.5, zorder=5)
            else:
                (handles[name],) = axis.plot(
                    fractions, values, color=COLORS[(i - 1) % len(COLORS)], linewidth=1.3, marker="sD^v"[i % 4],
                    markersize=3, linestyle=("-", "--", ":")[(i - 1) // len(COLORS) % 3],
                )  # fmt: skip
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("fraction replaced")
    for axis in axes[:, 0]:
        axis.set_ylabel(ylabel)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def curves(path: Path, panels: Sequence[tuple[str, str, Mapping[str, tuple[Any, Any, str]]]]) -> None:
    """Write one figure of panels side by side, linear axes.

    Args:
        panels: (x label, y label, name → (x [n], y [n], matplotlib's format such as "-" or "o")); a legend where a
            panel has several names.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.1), squeeze=False, layout="constrained")
    for axis, (xlabel, ylabel, entries) in zip(axes[0], panels, strict=True):
        for (name, (x, y, style)), color in zip(entries.items(), COLORS * len(entries), strict=False):
            axis.plot(x, y, style, color=color, linewidth=1.2, markersize=4, label=name)
        axis.set_xlabel(xlabel)
        axis.set_ylabel(ylabel)
        if len(entries) > 1:
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def histograms(path: Path, panels: Sequence[tuple[str, Mapping[str, np.ndarray], bool]], ylabel: str) -> None:
    """Write one figure of histograms side by side, their counts on a logarithmic axis.

    Args:
        panels: (x label, name → values [n], whether the values' axis is logarithmic too); a legend where a panel has
            several names. Values of a logarithmic axis are positive.
    """
    plt = _pyplot()
    beside = any(len(entries) > len(COLORS) for _, entries, _ in panels)  # a legend of many names hides the lines
    size = ((6.0 if beside else 4.6) * len(panels), 3.1)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, (xlabel, entries, logarithmic) in zip(axes[0], panels, strict=True):
        low = min(float(values.min()) for values in entries.values())
        high = max(float(values.max()) for values in entries.values())
        if high <= low:
            low, high = (low / 1.1, high * 1.1) if logarithmic else (low - 0.5, high + 0.5)
        edges = np.geomspace(low, high, 61) if logarithmic else np.linspace(low, high, 61)
        for k, (name, values) in enumerate(entries.items()):
            style = {"color": COLORS[k % len(COLORS)], "linestyle": ("-", "--", ":")[k // len(COLORS) % 3]}
            counts, _ = np.histogram(np.clip(values, low, high), edges)
            axis.stairs(counts, edges, baseline=None, linewidth=1.2, label=name, **style)
        if logarithmic:
            axis.set_xscale("log")
            if high < 1e3 * low:
                _plain_numbers(axis.xaxis)
        axis.set_yscale("log")
        axis.set_ylim(bottom=0.5)
        axis.set_xlabel(xlabel)
        axis.set_ylabel(ylabel)
        if len(entries) > 1:
            axis.legend(
                frameon=False, fontsize=8, **({"bbox_to_anchor": (1, 1), "loc": "upper left"} if beside else {})
            )
    figure.savefig(path)
    plt.close(figure)


def bands(
    path: Path,
    branches: Sequence[tuple[np.ndarray, np.ndarray]],
    ticks: Sequence[tuple[float, str]],
    density: tuple[np.ndarray, np.ndarray],
) -> None:
    """Write one figure of phonon bands beside their density of states.

    Args:
        branches: (distances [n_q], frequencies [n_q, n_bands], THz) of each piece of the path.
        ticks: distance and name of the special points.
        density: frequencies [n], THz, and density of states [n].
    """
    plt = _pyplot()
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(6.4, 3.6), sharey=True, layout="constrained", gridspec_kw={"width_ratios": (3, 1)}
    )
    for distances, frequencies in branches:
        left.plot(distances, frequencies, color=COLORS[0], linewidth=1)
    for axis in (left, right):
        axis.axhline(0, color="black", linewidth=0.5)
    for distance, _ in ticks:
        left.axvline(distance, color="black", linewidth=0.4)
    left.set_xticks([d for d, _ in ticks], [name for _, name in ticks])
    left.set_xlim(branches[0][0][0], branches[-1][0][-1])
    left.set_ylabel("frequency, THz")
    right.plot(density[1], density[0], color=COLORS[2], linewidth=1.2)
    right.set_xlabel("density of states")
    figure.savefig(path)
    plt.close(figure)


def radar(path: Path, axes_names: Sequence[str], lines: Mapping[str, Sequence[float]]) -> None:
    """Write one radar plot of values from 0 (centre) to 1: a line for each name, a spoke for each axis."""
    plt = _pyplot()
    angles = np.linspace(0, 2 * np.pi, len(axes_names), endpoint=False)
    figure, axis = plt.subplots(figsize=(5.2, 4.6), subplot_kw={"projection": "polar"}, layout="constrained")
    for i, (name, values) in enumerate(lines.items()):
        style = ("-", "--", ":")[i // len(COLORS) % 3]
        axis.plot(
            [*angles, angles[0]], [*values, values[0]], style, color=COLORS[i % len(COLORS)], linewidth=1.4, label=name
        )
    axis.set_xticks(angles, axes_names)
    axis.set_ylim(0, 1)
    axis.set_yticks([0.25, 0.5, 0.75, 1.0])
    axis.tick_params(axis="y", labelsize=7, labelcolor=COLORS[5])
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def points_by_name(path: Path, names: Sequence[str], panels: Sequence[tuple[str, Sequence[Sequence[float]]]]) -> None:
    """Draw values of named things, logarithmic, a panel for each (title, values of each name): a dot a value."""
    plt = _pyplot()
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1.5 + 2.6 * len(panels), 0.8 + 0.3 * len(names)), sharey=True, layout="constrained"
    )
    for axis, (title, values) in zip(np.atleast_1d(axes), panels, strict=True):
        for i, own in enumerate(values):
            axis.plot(own, [i] * len(own), "o", color=COLORS[0], alpha=0.7)
        axis.set_xscale("log")
        _plain_numbers(axis.xaxis)
        axis.set_title(title, fontsize=9)
        axis.grid(axis="x", alpha=0.3)
        axis.set_yticks(range(len(names)), names)
    np.atleast_1d(axes)[0].invert_yaxis()
    figure.savefig(path)
    plt.close(figure)


def ratios(
    path: Path, names: Sequence[str], panels: Mapping[str, Mapping[str, tuple[float, float, float]]], limit: float
) -> None:
    """Draw ratios of named things with their intervals, logarithmic, a panel for each title; lines at 1 and a limit.

    Args:
        panels: title → name → (low, ratio, high).
        limit: ratios above it have the second colour.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1.8 + 2.6 * len(panels), 1.0 + 0.28 * len(names)), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, (title, values) in zip(axes[0], panels.items(), strict=True):
        for name, (low, ratio, high) in values.items():
            color = COLORS[int(ratio > limit)]
            axis.plot([low, high], [names.index(name)] * 2, color=color, linewidth=1.2)
            axis.plot([ratio], [names.index(name)], "o", color=color, markersize=5)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.axvline(limit, color="black", linewidth=0.8, linestyle="--")
        axis.set_xscale("log")
        least, most = axis.get_xlim()
        _plain_numbers(axis.xaxis, (1, 2, 5) if most > 5 * least else (1, 1.2, 1.5, 2, 3, 4, 5, 6, 7, 8, 9))
        axis.set_title(title, fontsize=9)
        axis.grid(axis="x", alpha=0.3)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
    figure.savefig(path)
    plt.close(figure)
