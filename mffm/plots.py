"""Plots of mffm: parity and learning curves. matplotlib is imported when a plot is drawn."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

COLORS = (
    "#0b6e4f",
    "#c8553d",
    "#28536b",
    "#d9a404",
    "#7b4b94",
    "#5c5c5c",
)  # apart in grey and for colour-blind readers


def _pyplot() -> Any:
    import matplotlib

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


def parity(path: Path, panels: Sequence[tuple[str, str, np.ndarray, np.ndarray]]) -> None:
    """Write one figure of parity panels: (title, unit, labels, predictions)."""
    plt = _pyplot()
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.3 * columns, 3.1 * rows), squeeze=False, layout="constrained")
    for axis, (title, unit, label, prediction) in zip(axes.flat, panels, strict=False):
        parity_panel(axis, label, prediction, title, unit)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
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
    panels: Sequence[tuple[str, str, np.ndarray, np.ndarray]],
) -> None:
    """Write one figure: learning curves above (y label → run → (steps, values)), parity panels below."""
    plt = _pyplot()
    columns = max(len(curves), len(panels))
    figure, axes = plt.subplots(2, columns, figsize=(3.6 * columns, 6.2), squeeze=False, layout="constrained")
    for axis, (ylabel, lines) in zip(axes[0], curves.items(), strict=False):
        learning_curves(axis, lines, ylabel)
    axes[0][0].legend(frameon=False, fontsize=8)
    for axis, (title, unit, label, prediction) in zip(axes[1], panels, strict=False):
        parity_panel(axis, label, prediction, title, unit)
    for axis in [*axes[0][len(curves) :], *axes[1][len(panels) :]]:
        axis.set_visible(False)
    figure.savefig(path)
    plt.close(figure)
