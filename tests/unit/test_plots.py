"""What a figure must show whatever it is given."""

from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest

from mffm import plots


@pytest.mark.parametrize("columns", [1, 2])
def test_long_names_stay_inside_the_figure(columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: list[Any] = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda figure, path: drawn.append(figure) or save(figure, path)
    )
    long = "FiLM conditioning and delta head, draws by temperature, the last third on CCSD(T) alone"
    points = {name: [(12, 50, 40, 60), (100, 20, 15, 30)] for name in (long, "short", f"{long} and something more")}
    plots.label_curves(tmp_path / "a.png", {"energy": points, "forces": points}, "labels", columns)
    (figure,) = drawn
    figure.canvas.draw()
    (legend,) = figure.legends
    box, page = legend.get_window_extent(), figure.bbox
    assert box.x0 >= 0
    assert box.x1 <= page.x1
    assert box.y1 <= page.y1
    lowest = min(axis.get_window_extent().height for axis in figure.axes)
    assert lowest > 150, "the legend leaves no room to the curves"
