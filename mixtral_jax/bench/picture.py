"""Draws where the time of a step goes."""

from typing import Any

from mixtral_jax.bench.parts import HOST, NOT_SEEN, rows_of
from mixtral_jax.lab.pictures.style import COLOURS, Picture, in_style, make_figure

_BAR_INCHES = 0.42
_UNKNOWN_COLOUR = "#B8B8B8"


@in_style
def draw_parts(figures: dict[str, Any]) -> Picture:
    """Draws a bar for each part of a step, from the figures in `StepParts.to_json`."""
    rows, step = rows_of(figures), figures["step_seconds"]
    figure, (panel,) = make_figure(1, _BAR_INCHES * len(rows) + 0.9)
    colours = [_UNKNOWN_COLOUR if name in (NOT_SEEN, HOST) else COLOURS[0] for name in rows]
    bars = panel.barh(list(rows), [1e3 * seconds for seconds in rows.values()], color=colours)
    labels = [f"{1e3 * taken:,.1f} ms, {taken / step:.0%}" for taken in rows.values()]
    panel.bar_label(bars, labels, padding=4)
    panel.invert_yaxis()
    panel.grid(visible=False, axis="y")
    panel.tick_params(axis="y", length=0)
    panel.margins(x=0.14)
    panel.set_xlabel(f"milliseconds of a step of {1e3 * step:,.1f} ms, with a profiler")
    words = (
        "A bar is the time of a part of the model, forward and backward, on all devices together. "
        "The grey bars are time in which the profiler saw no operation."
    )
    return Picture("Where the time of a step goes", words, figure)
