"""Draws the load of every expert of every layer over the run."""

import numpy as np
from matplotlib.axes import Axes

from mixtral_jax.lab.ablation.records import RunRecord
from mixtral_jax.lab.ablation.results import Results
from mixtral_jax.lab.pictures.routing_axes import add_ratio_scale, draw_ratios
from mixtral_jax.lab.pictures.style import Picture, in_style, make_grid, scale_of, set_panel_title

_MAX_TIME_COLUMNS = 80
_MAX_PANELS_PER_ROW = 4
# With more layers than this, the axis shows their numbers alone.
_MAX_NAMED_LAYERS = 8


@in_style
def draw_loads(results: Results) -> Picture | None:
    """Draws a panel for each arm, of its first finished seed; None if no run logged its loads."""
    shown = {
        result.arm.name: load
        for result in results.arms
        if result.done
        if (load := read_loads(result.done[0])) is not None
    }
    if not shown:
        return None
    num_bands = max(load_LEN.shape[0] * load_LEN.shape[1] for load_LEN in shown.values())
    figure, panels = make_grid(
        len(shown), _MAX_PANELS_PER_ROW, min(9.0, max(3.0, 0.13 * num_bands + 0.4))
    )
    done = {result.arm.name: result.done[0] for result in results.arms if result.done}
    for panel, (name, load_LEN) in zip(panels, shown.items(), strict=True):
        _draw(panel, load_LEN, done[name])
        set_panel_title(panel, f"{name}, seed {done[name].run.seed}")
    add_ratio_scale(figure, panels, "load of an expert, relative to an even share")
    return Picture("Load of each expert over the run", _describe(shown), figure)


def read_loads(record: RunRecord) -> np.ndarray | None:
    """Returns the load relative to an even share, [layers, experts, time], or None.

    Neighbouring lines of the metrics are averaged into at most `_MAX_TIME_COLUMNS` columns.
    """
    names = {
        name
        for line in record.lines
        for name in line
        if name.startswith("router/layer_") and name.endswith("/load")
    }
    if not names:
        return None
    names = sorted(names, key=lambda name: (len(name), name))  # Layer 100 comes after layer 11.
    load_LNE = np.stack([record.series(name).values for name in names])
    groups = np.array_split(load_LNE, min(_MAX_TIME_COLUMNS, load_LNE.shape[1]), axis=1)
    load_LNE = np.stack([group.mean(1) for group in groups], axis=1)
    return load_LNE.swapaxes(1, 2) * load_LNE.shape[2]


def _draw(panel: Axes, load_LEN: np.ndarray, record: RunRecord) -> None:
    L, E, N = load_LEN.shape
    size, unit = scale_of(record.tokens()[-1])
    extent = (0, record.tokens()[-1] / size, L * E, 0)
    draw_ratios(panel, load_LEN.reshape(L * E, N), aspect="auto", extent=extent)
    for layer in range(1, L):
        panel.axhline(layer * E, color="#222222", linewidth=1.0)
    names = [f"layer {layer}\n{E} experts" for layer in range(L)]
    if L > _MAX_NAMED_LAYERS:
        names = [str(layer) for layer in range(L)]
        panel.set_ylabel(f"layer, {E} experts each")
    panel.set_yticks([layer * E + E / 2 for layer in range(L)], names)
    panel.tick_params(axis="y", length=0)
    panel.set_xlabel(f"tokens seen{unit}")


def _describe(shown: dict[str, np.ndarray]) -> str:
    ends = {
        name: load_LEN[:, :, -max(1, load_LEN.shape[2] // 10) :].mean(2)
        for name, load_LEN in shown.items()
    }
    ranges = (
        f'{load_LE.min():.2f} to {load_LE.max():.2f} for "{name}"' for name, load_LE in ends.items()
    )
    return (
        "A row is an expert and a column a part of the run. The colour is the number of tokens "
        "that the expert got, relative to an even share: white is even, and a stripe is an expert "
        "that is always busier or less busy than the others. Over the last tenth of the run the "
        f"loads ranged from {', '.join(ranges)} of an even share."
    )
