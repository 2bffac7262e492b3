"""Pictures of how runs went: loss against what it cost, and balance over the run.

Lines are means over seeds.
"""

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

# A line of more points than this is noise: neighbours are averaged.
_NUM_POINTS = 50

# Figure in metrics.jsonl -> what it is called here.
_BALANCE_PANELS = {
    "router/max_violation": "maximum violation\n(busiest expert / even share - 1)\ndashed: of recent steps together",
    "router/load_entropy": "load entropy\n(1 = even)",
    "router/coefficient_of_variation": "coefficient of variation\nof the load",
    "router/gate_entropy": "gate entropy of a token\n(1 = undecided)",
    "router/min_load": "load of the idlest expert\n(1 = even share)",
    "router/dropped_fraction": "dropped routes\n(fraction of all)",
    "router/logit_rms": "size of the logits\n(root mean square; dashed: largest)",
    "router/bias_range": "range of the balance bias\n(score units)",
    "router/device_imbalance": "device imbalance\n(busiest place / even share - 1)",
}
# What is drawn dashed into the panel of another.
_DASHED = {
    "router/max_violation": "router/running_max_violation",
    "router/logit_rms": "router/logit_max",
}


@dataclasses.dataclass(frozen=True)
class Curve:
    """A figure over a run, [points]: the mean over seeds, the lowest and the highest of them."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def average_seeds(
    result: ArmResult,
    figure: str,
    place: Callable[[RunRecord], np.ndarray],
    num_points: int | None = None,
) -> Curve | None:
    """The curve of an arm's finished runs; None where they have no such figure.

    Args:
        place: where on the horizontal axis each line of a run lies.
        num_points: at most so many, by averaging neighbours; None keeps all.
    """
    series = [
        (place(record)[numbers], values)
        for record in result.done
        for numbers, values in [record.series(figure)]
        if len(values)
    ]
    if not series:
        return None
    count = min(len(values) for _, values in series)
    x_SN, y_SN = (np.stack([one[part][:count] for one in series]) for part in (0, 1))
    if num_points is not None:
        x_SN, y_SN = _thin(x_SN, num_points), _thin(y_SN, num_points)
    return Curve(x_SN.mean(0), y_SN.mean(0), y_SN.min(0), y_SN.max(0))


@in_style
def draw_losses(results: Results, strokes: dict[str, Stroke]) -> Picture:
    """Held-out loss against tokens, against FLOPs and against time."""
    figure, panels = make_figure(3, 3.9, sharey=True)
    axes: tuple[tuple[str, Callable[[RunRecord], np.ndarray]], ...] = (
        ("tokens seen", RunRecord.tokens),
        ("model FLOPs", RunRecord.flops),
        ("time in steps, minutes", lambda record: record.seconds() / 60),
    )
    for panel, (label, place) in zip(panels, axes, strict=True):
        curves = {
            result.arm.name: average_seeds(result, "eval/loss", place) for result in results.arms
        }
        _draw_curves(panel, curves, {}, strokes, label)
    panels[0].set_ylabel("held-out loss (nats a token)")
    add_legend(figure, panels[0])
    words = (
        "Held-out loss against what it cost: tokens, arithmetic that the model needs, and time "
        "spent in steps (without "
        "compiling, evaluating and saving). A line is the mean over seeds, its band reaches from "
        "the lowest to the "
        f"highest of them. {describe_flops(results)} Time depends on the machine, and on what else "
        "it did."
    )
    return Picture("Loss against cost", words, figure)


@in_style
def draw_balance(results: Results, strokes: dict[str, Stroke]) -> Picture:
    """What the router's metrics did over the run; drops only where there were some."""
    shown = [figure for figure in _BALANCE_PANELS if _is_worth_a_panel(results, figure)]
    figure, panels = make_grid(len(shown), 3, 3.5)
    for panel, name in zip(panels, shown, strict=True):
        curves, dashed = (
            {
                result.arm.name: average_seeds(result, one, RunRecord.tokens, _NUM_POINTS)
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
        "How evenly tokens went to experts in training, as means over layers. The band reaches "
        "from the lowest to the "
        "highest seed; neighbouring steps are averaged. In the load of recent steps together, the "
        "last hundred or so, "
        f"what one batch does by chance has averaged out. {describe_balance(results)}{dropped}"
    )
    return Picture("Balance over the run", words, figure)


def _is_worth_a_panel(results: Results, name: str) -> bool:
    if name == "router/device_imbalance":
        return any(result.device_imbalance for result in results.arms)
    values = [record.series(name)[1] for result in results.arms for record in result.done]
    is_there = any(len(value) for value in values)
    return is_there and (name != "router/dropped_fraction" or any(value.any() for value in values))


def _draw_curves(
    panel: Axes,
    curves: dict[str, Curve | None],
    dashed: dict[str, Curve | None],
    strokes: dict[str, Stroke],
    label: str,
) -> None:
    """Lines in the colours of their arms, with bands; `dashed` ones without."""
    there = {name: curve for name, curve in curves.items() if curve is not None}
    size, unit = scale_of(max(curve.x.max() for curve in there.values()))
    for name, curve in there.items():
        stroke = strokes[name]
        marker = stroke.marker if len(curve.x) <= 20 else None
        panel.plot(curve.x / size, curve.mean, color=stroke.colour, label=name, marker=marker)
        panel.fill_between(
            curve.x / size, curve.low, curve.high, color=stroke.colour, alpha=0.15, linewidth=0
        )
        if beside := dashed.get(name):
            panel.plot(
                beside.x / size, beside.mean, color=stroke.colour, linewidth=1.2, linestyle="--"
            )
    panel.set_xlabel(f"{label}{unit}")


def _thin(values_SN: np.ndarray, num_points: int) -> np.ndarray:
    """Means of equal groups of neighbours along the second dimension; a last group that is not full
    is left out.
    """
    group = max(1, values_SN.shape[1] // num_points)
    whole = values_SN.shape[1] // group * group
    return values_SN[:, :whole].reshape(len(values_SN), -1, group).mean(-1)
