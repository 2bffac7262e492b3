"""How pictures look: colours, figures and legends, and the files that pictures are saved as."""

import base64
import dataclasses
import io
import re
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# The palette of Okabe and Ito, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C6D1F", "#7A5195")
_REFERENCE_COLOUR = "#333333"
_INK = "#333333"
_REFERENCE_MARKER = "o"
_MARKERS = "sD^vP*X"
# In the report an inch is 96 pixels, so text of 10 points is over 13 pixels high.
_WIDTH_INCHES = 11.0
_PNG_DOTS_PER_INCH = 110
_MAX_LEGEND_COLUMNS = 6
_LEGEND_HANDLE_INCHES = 0.6
_LETTER_INCHES = 0.085
# The part of a column that the title of a panel may take; the rest is for the labels of its axis.
_TITLE_FRACTION = 0.75
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
    # Names come from data, so a dollar sign in one must not begin a formula.
    "text.parse_math": False,
}

# Decorator of functions that draw. It applies the style while they run, and leaves the settings of
# matplotlib elsewhere in the process alone.
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
    """A figure with its heading and its caption.

    Attributes:
        words: the caption: plain sentences on what the figure shows and what came out.
    """

    title: str
    words: str
    figure: Figure

    @property
    def name(self) -> str:
        """The title as a file name, without a suffix."""
        return re.sub(r"[^A-Za-z0-9.+=-]+", "_", self.title[:1].lower() + self.title[1:]).strip("_")

    @property
    def alt(self) -> str:
        """A text for people who cannot see the figure: the title and the first sentence."""
        return f"{self.title}. {self.words.partition('. ')[0].rstrip('.')}."

    def to_png(self) -> bytes:
        """Renders the contents of a PNG file."""
        return self._render("png", dpi=_PNG_DOTS_PER_INCH)

    def to_data_url(self) -> str:
        """Renders an SVG as the source of an image in a page; equal figures give equal bytes."""
        svg = self._render("svg", metadata={"Date": None, "Creator": None})
        return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"

    @in_style
    def _render(self, kind: str, **settings: Any) -> bytes:
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format=kind, facecolor="white", **settings)
        return buffer.getvalue()


@dataclasses.dataclass(frozen=True)
class Stroke:
    """The colour and the marker of an arm, the same in all pictures."""

    colour: str
    marker: str


def choose_strokes(names: Sequence[str], reference: str) -> dict[str, Stroke]:
    """Assigns a stroke to every arm; the reference is dark grey with round markers."""
    strokes = {reference: Stroke(_REFERENCE_COLOUR, _REFERENCE_MARKER)}
    for number, name in enumerate(name for name in names if name != reference):
        colour, marker = COLOURS[number % len(COLOURS)], _MARKERS[number % len(_MARKERS)]
        strokes[name] = Stroke(colour, marker)
    return strokes


@in_style
def make_figure(
    num_columns: int, height: float, num_rows: int = 1, **settings: Any
) -> tuple[Figure, list[Axes]]:
    """Makes an empty figure as wide as the page, and its panels, row by row.

    `height` is in inches; `settings` are those of `Figure.subplots`.
    """
    figure = Figure(figsize=(_WIDTH_INCHES, height), layout="constrained")
    return figure, list(figure.subplots(num_rows, num_columns, squeeze=False, **settings).flat)


def make_grid(
    count: int, max_columns: int, row_height: float, **settings: Any
) -> tuple[Figure, list[Axes]]:
    """Makes a figure of `count` panels in rows of the same height, which is in inches."""
    columns = min(count, max_columns)
    rows = -(-count // columns)
    figure, panels = make_figure(columns, rows * row_height, rows, **settings)
    for panel in panels[count:]:
        panel.remove()
    return figure, panels[:count]


def set_panel_title(panel: Axes, title: str) -> None:
    """Sets the title of a panel of `make_figure`, wrapped to the width of its column."""
    subplot = panel.get_subplotspec()
    columns = subplot.get_gridspec().ncols if subplot else 1
    letters = _WIDTH_INCHES / columns * _TITLE_FRACTION / _LETTER_INCHES
    panel.set_title(textwrap.fill(title, int(letters)), loc="left")


def add_legend(figure: Figure, *panels: Axes) -> None:
    """Adds one legend above all panels, with every label of `panels` once."""
    handles = {
        label: handle
        for panel in panels
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    entry_inches = _LEGEND_HANDLE_INCHES + _LETTER_INCHES * max(map(len, handles))
    columns = min(len(handles), _MAX_LEGEND_COLUMNS, max(1, int(_WIDTH_INCHES / entry_inches)))
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper left", ncols=columns, frameon=False
    )


def scale_of(largest: float) -> tuple[float, str]:
    """Returns a power of ten that makes numbers readable, and its name, such as ` (millions)`."""
    if np.isfinite(largest):
        for size, name in _SCALES:
            if largest >= size:
                return size, f" ({name})"
    return 1.0, ""
