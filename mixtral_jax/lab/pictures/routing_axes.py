"""Parts that pictures of routing share: axes of layers and shares, lines of chance, colour maps."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

SHARES_COLOUR_MAP = "Blues"
RATIOS_COLOUR_MAP = "PuOr_r"
# A larger ratio has the colour of this one; a ratio below its inverse has the colour of the
# inverse.
_MAX_RATIO = 4.0
_MAX_LAYER_TICKS = 16
CHANCE_STYLE: dict[str, Any] = {"color": "#555555", "linestyle": "--", "linewidth": 1.5}


def mark_layers(axes: Axes, num_layers: int, *, vertical: bool = False) -> None:
    """Labels the axis of the layers with whole numbers from 0."""
    shown = range(0, num_layers, math.ceil(num_layers / _MAX_LAYER_TICKS))
    axis = axes.yaxis if vertical else axes.xaxis
    axis.set_ticks(shown, labels=[str(layer) for layer in shown])
    axis.set_label_text("layer")


def mark_shares(axes: Axes, label: str, *, top: float | None = None) -> None:
    """Shows shares in percent, from 0, on the y axis."""
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.set_ylim(0, top)
    axes.set_ylabel(label)


def write_numbers(axes: Axes, values: np.ndarray, highest: float) -> None:
    """Writes each share on its cell of a map, in white on dark cells."""
    for (row, column), value in np.ndenumerate(values):
        color = "white" if value > 0.6 * highest else "black"
        axes.text(column, row, f"{value:.0%}", ha="center", va="center", color=color)


def add_scale(
    figure: Figure, image: ScalarMappable, axes: Axes | Sequence[Axes], label: str
) -> None:
    """Adds a colour bar in percent."""
    decimals = 0 if image.get_clim()[1] > 0.1 else 1
    bar = figure.colorbar(
        image, ax=axes, format=PercentFormatter(1.0, decimals), label=label, shrink=0.8
    )
    bar.outline.set_visible(False)


def draw_ratios(axes: Axes, values: np.ndarray, **settings: Any) -> None:
    """Draws a map of ratios on a scale that all such maps share: white is 1, grey is NaN."""
    colors = mpl.colormaps[RATIOS_COLOUR_MAP].with_extremes(bad="#cccccc")
    norm = LogNorm(1 / _MAX_RATIO, _MAX_RATIO)
    axes.imshow(
        np.maximum(values, 1e-9), cmap=colors, norm=norm, interpolation="nearest", **settings
    )
    axes.grid(False)


def add_ratio_scale(figure: Figure, panels: Sequence[Axes], label: str) -> None:
    """Adds the colour bar of `draw_ratios` above all panels."""
    image = panels[0].images[0]
    bar = figure.colorbar(
        image, ax=panels, location="top", shrink=0.4, aspect=40, extend="both", label=label
    )
    bar.ax.xaxis.set_major_locator(FixedLocator([0.25, 0.5, 1, 2, 4]))
    bar.ax.xaxis.set_minor_locator(NullLocator())
    bar.ax.set_xticklabels(["¼", "½", "1", "2", "4"])


def draw_chance(axes: Axes, height: float, name: str, color: str = CHANCE_STYLE["color"]) -> None:
    """Draws a dashed line at the value by chance, which the legend states."""
    style: dict[str, Any] = {**CHANCE_STYLE, "color": color}
    axes.axhline(height, label=f"{name}: {height:.1%}", **style)
