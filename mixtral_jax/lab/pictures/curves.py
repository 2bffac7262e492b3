"""Curves over the run: loss against its cost, and balance. Lines are means over seeds."""

import dataclasses
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes

from mixtral_jax.lab.ablation.findings import describe_balance, describe_flops
from mixtral_jax.lab.ablation.records import RunRecord
from mixtral_jax.lab.ablation.results import ArmResult, Results
from mixtral_jax.lab.pictures.style import (
    Picture,
    Stroke,
    add_legend,
    in_style,
    make_figure,
    make_grid,
    scale_of,
)

# Neighbouring points of a longer line are averaged, since single steps are noisy.
_MAX_POINTS = 50
# Lines with more points have no markers.
_MAX_MARKERS = 20

# Metric -> label of its panel.
_BALANCE_PANELS = {
    "router/max_violation": (
        "maximum violation\n(busiest expert / even share - 1)\ndashed: of the running load"
    ),
    "router/load_entropy": "load entropy\n(1 = even)",
    "router/coefficient_of_variation": "coefficient of variation\nof the load",
    "router/gate_entropy": "gate entropy per token\n(1 = undecided)",
    "router/min_load": "load of the least used expert\n(1 = even share)",
    "router/dropped_fraction": "dropped routes\n(fraction of all)",
    "router/logit_rms": "router logits\n(root mean square; dashed: largest)",
    "router/bias_range": "range of the balance bias\n(units of the score)",
    "router/device_imbalance": "device imbalance\n(busiest device / even share - 1)",
}
# Metric -> the metric that is drawn dashed in the same panel.
_DASHED = {
    "router/max_violation": "router/running_max_violation",
    "router/logit_rms": "router/logit_max",
}


@dataclasses.dataclass(frozen=True)
class Curve:
    """A metric over the run: mean, minimum and maximum over seeds, each [points]."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def average_seeds(
    result: ArmResult,
    metric: str,
    get_x: Callable[[RunRecord], np.ndarray],
    max_points: int | None = None,
) -> Curve | None:
    """Averages a metric over the finished runs of an arm; None if they did not log it.

    Args:
        get_x: returns the horizontal position of each line of a run.
        max_points: neighbouring points are averaged so that about this many are left; None keeps
            all.
    """
    series = [
        (get_x(record)[one.lines], one.values)
        for record in result.done
        if len((one := record.series(metric)).values)
    ]
    if not series:
        return None
    count = min(len(values) for _, values in series)
    x_SN, y_SN = (np.stack([one[part][:count] for one in series]) for part in (0, 1))
    if max_points is not None:
        x_SN, y_SN = _thin(x_SN, max_points), _thin(y_SN, max_points)
    return Curve(x_SN.mean(0), y_SN.mean(0), y_SN.min(0), y_SN.max(0))


@in_style
def draw_losses(results: Results, strokes: dict[str, Stroke]) -> Picture:
    """Draws held-out loss against tokens, FLOPs and time."""
    figure, panels = make_figure(3, 3.9, sharey=True)
    axes: tuple[tuple[str, Callable[[RunRecord], np.ndarray]], ...] = (
        ("tokens seen", RunRecord.tokens),
        ("model FLOPs", RunRecord.flops),
        ("time in steps (minutes)", lambda record: record.seconds() / 60),
    )
    for panel, (label, get_x) in zip(panels, axes, strict=True):
        curves = {
            result.arm.name: average_seeds(result, "eval/loss", get_x) for result in results.arms
        }
        _draw_curves(panel, curves, {}, strokes, label)
    panels[0].set_ylabel("held-out loss (nats per token)")
    add_legend(figure, panels[0])
    words = (
        "Held-out loss against its cost: training tokens, FLOPs of the model, and time spent in "
        "steps (without compilation, evaluation and saving). A line is the mean over seeds, with a "
        f"band from the lowest to the highest. {describe_flops(results)} Time depends on the "
        "machine and on what else was running."
    )
    return Picture("Loss against cost", words, figure)


@in_style
def draw_balance(results: Results, strokes: dict[str, Stroke]) -> Picture:
    """Draws the metrics of the router over the run, without those that tell nothing."""
    shown = [figure for figure in _BALANCE_PANELS if _is_worth_a_panel(results, figure)]
    figure, panels = make_grid(len(shown), 3, 3.5)
    for panel, name in zip(panels, shown, strict=True):
        curves, dashed = (
            {
                result.arm.name: average_seeds(result, one, RunRecord.tokens, _MAX_POINTS)
                for result in results.arms
            }
            for one in (name, _DASHED.get(name, ""))
        )
        _draw_curves(panel, curves, dashed, strokes, "tokens seen")
        panel.set_ylabel(_BALANCE_PANELS[name])
        panel.set_ylim(bottom=None if name in ("router/load_entropy", "router/gate_entropy") else 0)
    add_legend(figure, panels[0])
    dropped = "" if "router/dropped_fraction" in shown else " No arm dropped a route."
    words = (
        "How evenly tokens went to experts in training, averaged over layers. Bands reach from the "
        "lowest to the highest seed; neighbouring steps are averaged. The running load averages "
        "about 100 steps, so the chance of single batches has averaged out. "
        f"{describe_balance(results)}{dropped}"
    )
    return Picture("Balance over the run", words, figure)


def _is_worth_a_panel(results: Results, name: str) -> bool:
    if name == "router/device_imbalance":
        return any(result.device_imbalance for result in results.arms)
    values = [record.series(name).values for result in results.arms for record in result.done]
    is_logged = any(len(value) for value in values)
    return is_logged and (name != "router/dropped_fraction" or any(value.any() for value in values))


def _draw_curves(
    panel: Axes,
    curves: dict[str, Curve | None],
    dashed: dict[str, Curve | None],
    strokes: dict[str, Stroke],
    label: str,
) -> None:
    """Draws a line with a band for each arm, and `dashed` lines without bands."""
    present = {name: curve for name, curve in curves.items() if curve is not None}
    size, unit = scale_of(max(curve.x.max() for curve in present.values()))
    for name, curve in present.items():
        stroke = strokes[name]
        marker = stroke.marker if len(curve.x) <= _MAX_MARKERS else None
        panel.plot(curve.x / size, curve.mean, color=stroke.colour, label=name, marker=marker)
        panel.fill_between(
            curve.x / size, curve.low, curve.high, color=stroke.colour, alpha=0.15, linewidth=0
        )
        if beside := dashed.get(name):
            panel.plot(
                beside.x / size, beside.mean, color=stroke.colour, linewidth=1.2, linestyle="--"
            )
    panel.set_xlabel(f"{label}{unit}")


def _thin(values_SN: np.ndarray, max_points: int) -> np.ndarray:
    """Averages groups of neighbours along the second dimension; drops an incomplete last group."""
    group = max(1, values_SN.shape[1] // max_points)
    whole = values_SN.shape[1] // group * group
    return values_SN[:, :whole].reshape(len(values_SN), -1, group).mean(-1)
