"""What pictures of routing have in common: axes of layers and of shares, chance, heat. `style` makes files of them."""

import math
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from mixtral_jax.lab.style import WIDTH, Picture

# From pale to dark, of one hue.
HEAT = "Blues"
CHANCE: dict[str, Any] = {"color": "#555555", "linestyle": "--", "linewidth": 1.5}
_STYLE: Any = {
    "font.size": 11, "axes.titlesize": 11, "axes.titleweight": "bold",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd",
    "axes.axisbelow": True, "legend.frameon": False, "lines.linewidth": 2,
    "figure.constrained_layout.use": True,
    # Names come from data: a dollar sign in one begins no formula.
    "text.parse_math": False,
}  # fmt: skip


def draw(title: str, words: str, paint: Callable[[Figure], object], *, height: float = 5.5) -> Picture:
    """A picture of the page's width that `paint` fills; needs no display, and touches no setting of others."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height))
        paint(figure)
        # What is laid out when it is drawn must be laid out in this style.
        figure.draw_without_rendering()
    return Picture(title, words, figure)


def mark_layers(axes: Axes, num_layers: int, *, vertical: bool = False) -> None:
    """Whole numbers on the axis of the layers, which are counted from 0."""
    shown = range(0, num_layers, math.ceil(num_layers / 16))
    axis = axes.yaxis if vertical else axes.xaxis
    axis.set_ticks(shown, labels=[str(layer) for layer in shown])
    axis.set_label_text("layer")


def mark_shares(axes: Axes, label: str, *, top: float | None = None) -> None:
    """Shares in percent, from 0, on the y axis."""
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.set_ylim(0, top)
    axes.set_ylabel(label)


def shade(value: float, highest: float) -> str:
    """What colour a number written on a cell of that value must have to be read, where dark is high."""
    return "white" if value > 0.6 * highest else "black"
