"""How pictures look: colours, axes, and the files they become.

What they show is for the modules that draw them.
"""

import base64
import dataclasses
import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers; the reference arm is dark grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C6D1F", "#7A5195")
_REFERENCE, _INK = "#333333", "#333333"
_MARKERS = "osD^vP*X"
# An inch is 96 pixels: text of 10 points is over 13 pixels high where the page shows the picture in
# full.
_WIDTH = 11.0
_SETTINGS: Any = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 10.5,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "svg.hashsalt": "mixtral_jax",
    "svg.fonttype": "path",
    # Names come from data: a dollar sign in one begins no formula.
    "text.parse_math": False,
}

# Decorates what draws: all that is drawn within has the style, and no setting of others is touched.
in_style = matplotlib.rc_context(_SETTINGS)

_SCALES = (
    (1e18, "quintillions"),
    (1e15, "quadrillions"),
    (1e12, "trillions"),
    (1e9, "billions"),
    (1e6, "millions"),
    (1e3, "thousands"),
)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A drawing with its heading, and what must stand beside it: plain sentences on what it shows
    and what came out.
    """

    title: str
    words: str
    figure: Figure

    @property
    def name(self) -> str:
        """The title as the name of a file, without ending; names of arms stay as they are, and so
        apart.
        """
        return re.sub(r"[^A-Za-z0-9.+=-]+", "_", self.title[:1].lower() + self.title[1:]).strip("_")

    @property
    def alt(self) -> str:
        """What it is, for those who cannot see it: the title and the first sentence."""
        return f"{self.title}. {self.words.partition('. ')[0].rstrip('.')}."

    def to_png(self) -> bytes:
        """As a file for any viewer."""
        return self._render("png", dpi=110)

    def to_data_url(self) -> str:
        """As the source of an image in a page, sharp at any size; the same bytes for the same
        drawing.
        """
        svg = self._render("svg", metadata={"Date": None, "Creator": None})
        return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"

    @in_style
    def _render(self, kind: str, **settings: Any) -> bytes:
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format=kind, facecolor="white", **settings)
        return buffer.getvalue()


@dataclasses.dataclass(frozen=True)
class Stroke:
    """The colour and the marker of an arm, in every picture the same."""

    colour: str
    marker: str


def choose_strokes(names: Sequence[str], reference: str) -> dict[str, Stroke]:
    """Arm -> its stroke."""
    strokes = {reference: Stroke(_REFERENCE, "o")}
    for number, name in enumerate(name for name in names if name != reference):
        strokes[name] = Stroke(
            COLOURS[number % len(COLOURS)], _MARKERS[1 + number % (len(_MARKERS) - 1)]
        )
    return strokes


@in_style
def make_figure(
    num_columns: int, height: float, num_rows: int = 1, **settings: Any
) -> tuple[Figure, list[Axes]]:
    """An empty figure of the page's width (inches) and its panels, row by row."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(num_rows, num_columns, squeeze=False, **settings).flat)


def make_grid(
    count: int, most_columns: int, row_height: float, **settings: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, at most so many in a row, and rows of the same height (inches)."""
    columns = min(count, most_columns)
    rows = -(-count // columns)
    figure, panels = make_figure(columns, rows * row_height, rows, **settings)
    for panel in panels[count:]:
        panel.remove()
    return figure, panels[:count]


def add_legend(figure: Figure, *panels: Axes) -> None:
    """One legend above all panels: the names of what these show."""
    shown = [panel.get_legend_handles_labels() for panel in panels]
    named = {
        label: handle
        for handles, labels in shown
        for handle, label in zip(handles, labels, strict=True)
    }
    widest = 0.6 + 0.085 * max(map(len, named))  # Inches: a handle with its margins, and letters.
    columns = min(len(named), 6, max(1, int(_WIDTH / widest)))
    figure.legend(
        named.values(), named.keys(), loc="outside upper left", ncols=columns, frameon=False
    )


def scale_of(largest: float) -> tuple[float, str]:
    """A power of ten that makes numbers readable, and its name: as in tokens (millions)."""
    named = np.isfinite(largest) and next((one for one in _SCALES if largest >= one[0]), None)
    return (named[0], f" ({named[1]})") if named else (1.0, "")
