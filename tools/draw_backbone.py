"""Draw the figure of docs/backbone.md: what lies on an edge and what on an atom in a layer of the density backbone.

python tools/draw_backbone.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

OUTPUT = Path(__file__).parents[1] / "docs" / "backbone.png"
EDGE, ATOM, OTHER = "#f6d7a7", "#bcd4e6", "#e4e4e4"


def box(ax: Axes, x: float, y: float, width: float, title: str, text: str, colour: str, height: float = 0.9) -> None:
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.08", fc=colour, ec="#555555")
    ax.add_patch(shape)
    ax.text(x + width / 2, y + height - 0.2, title, ha="center", va="center", fontsize=9, weight="bold")
    ax.text(x + width / 2, y + (height - 0.3) / 2, text, ha="center", va="center", fontsize=7.5)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    ax.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": "#333333", "lw": 1.1})
    if text:
        upright = start[0] == end[0]
        middle = (start[0] + end[0]) / 2 + 0.08 * upright, (start[1] + end[1]) / 2 + 0.12 * (not upright)
        ax.text(*middle, text, ha="left" if upright else "center", va="center", fontsize=7)


def main() -> None:
    figure, ax = plt.subplots(figsize=(9.6, 4.6))
    box(ax, 0.1, 3.6, 2.1, "edge vectors", "$r_{ij}$, inside the cutoff", OTHER)
    box(ax, 2.9, 3.6, 2.6, "harmonics, once a step", "$Y_{lm}(\\hat r_{ij})$, $l \\leq$ lmax", EDGE)
    box(ax, 6.1, 3.6, 3.4, "radial functions, once a step", "Bessel → MLP (or none) × envelope", EDGE)
    box(ax, 0.1, 1.9, 2.1, "features $h_j$", "$l \\leq$ l_message, channels", ATOM)
    box(ax, 2.9, 1.9, 2.6, "send", "norm, linear per $l$\n→ edge_channels", ATOM)
    box(
        ax, 6.1, 1.9, 3.4, "density",
        "$A_i = \\sum_j Y_{l_2 m_2} R_{l_2 c}(r_{ij})\\, h_{j, l_1 m_1 c}$\nsummed uncoupled, nothing stored per edge",
        EDGE,
    )  # fmt: skip
    box(ax, 6.1, 0.2, 3.4, "couple, receive, gate", "Clebsch–Gordan, linear over (path, channel)", ATOM)
    box(
        ax,
        2.9,
        0.2,
        2.6,
        "products",
        "$A$, $A \\otimes A$, $A \\otimes A \\otimes A$\nby channel; linear per $l$",
        ATOM,
    )
    box(ax, 0.1, 0.2, 2.1, "feed-forward", "norm, gated, expansion\n+ residual", ATOM)
    arrow(ax, (2.25, 4.05), (2.85, 4.05))
    ax.plot([1.15, 1.15, 7.8, 7.8], [4.55, 4.75, 4.75, 4.6], color="#333333", lw=1.1)
    arrow(ax, (7.8, 3.55), (7.8, 2.85), "$R$: a linear map, per layer")
    arrow(ax, (5.0, 3.55), (6.3, 2.85))
    arrow(ax, (2.25, 2.35), (2.85, 2.35))
    arrow(ax, (5.55, 2.35), (6.05, 2.35))
    arrow(ax, (7.8, 1.85), (7.8, 1.15))
    arrow(ax, (6.05, 0.65), (5.55, 0.65))
    arrow(ax, (2.85, 0.65), (2.25, 0.65), "+ $h_i$")
    arrow(ax, (1.15, 1.15), (1.15, 1.85), "next layer")
    ax.text(0.1, -0.25, "orange: on edges, linear in edge_channels", fontsize=8, color="#8a5a00")
    ax.text(3.5, -0.25, "blue: on atoms, channels × channels", fontsize=8, color="#2a5a80")
    ax.text(6.6, -0.25, "after the last layer: scalars to the heads", fontsize=8)
    ax.set_xlim(0, 9.7)
    ax.set_ylim(-0.4, 4.85)
    ax.axis("off")
    figure.savefig(OUTPUT, dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    main()
