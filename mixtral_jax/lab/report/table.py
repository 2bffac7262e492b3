"""The headings and cells of the table of an ablation, for `page` and `markdown` to lay out."""

import dataclasses
from collections.abc import Callable

from mixtral_jax.lab.ablation.results import ArmResult, Results
from mixtral_jax.lab.ablation.spread import NOTHING, show_difference, show_spread

_LOSS = "held-out loss (nats/token)"
_VIOLATION = "maximum violation"
_BALANCE = "balance, at the end of training"
# Groups of columns on routing. `page` shows them in a table of their own.
ROUTING_GROUPS = (_VIOLATION, _BALANCE)
# A column with this heading is laid out as text.
CHANGED_KEYS = "changed keys"


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        group: a heading above those of neighbouring columns.
        cell: returns the text of the cell of an arm.
    """

    group: str
    heading: str
    cell: Callable[[ArmResult], str]


def make_columns(results: Results) -> list[Column]:
    """Returns the columns of the table, without those in which no arm has a value."""
    reference, is_share = results.ablation.reference, results.unevenness == "collapse"
    columns = [
        Column(
            "arm",
            "name",
            lambda one: one.arm.name + (" (reference)" if one.arm.name == reference else ""),
        ),
        Column("arm", CHANGED_KEYS, show_changes),
        Column("arm", "status", lambda one: one.status),
        Column("arm", "seeds done", lambda one: f"{len(one.done)} of {len(one.records)}"),
        Column("size", "parameters", lambda one: _show_count(one.fact("parameters_total"))),
        Column("size", "active parameters", lambda one: _show_count(one.fact("parameters_active"))),
        Column(
            "size",
            "tokens",
            lambda one: _show_count(one.spreads["tokens"].mean if one.done else None),
        ),
        _spread(_LOSS, "mean ± sd", "eval_loss", 4),
        _difference(results, _LOSS, "eval_loss", 4),
        _spread(_VIOLATION, "training, mean ± sd", "max_violation", 2),
        *(
            [_spread(_VIOLATION, "share of total collapse (E/k - 1)", "collapse", 2)]
            if is_share
            else []
        ),
        _difference(results, _VIOLATION, results.unevenness, 2),
        _spread(_VIOLATION, "running load", "running_max_violation", 2),
        _spread(_VIOLATION, "held-out text", "eval_max_violation", 2),
        _spread(_BALANCE, "CV", "coefficient_of_variation", 2),
        _spread(_BALANCE, "load entropy", "load_entropy", 3),
        _spread(_BALANCE, "gate entropy", "gate_entropy", 3),
        Column(_BALANCE, "dropped", lambda one: _show_share(one, "dropped_fraction")),
        _spread(_BALANCE, "dead experts (mean over layers)", "dead_experts", 1),
        Column(_BALANCE, "device imbalance", lambda one: show_spread(one.device_imbalance, 2)),
        Column("speed", "tokens/s", lambda one: f"{one.speed.mean:,.0f}" if one.speed else NOTHING),
    ]
    return [
        column
        for column in columns
        if column.group == "arm" or any(column.cell(result) != NOTHING for result in results.arms)
    ]


def show_changes(result: ArmResult) -> str:
    """Writes the changed keys of an arm as `key=value`."""
    changes = [f"{key}={value}" for key, value in result.arm.changes.items()]
    return ", ".join(changes) or "none (the base config)"


def _spread(group: str, heading: str, name: str, digits: int) -> Column:
    return Column(group, heading, lambda one: show_spread(one.spreads.get(name), digits))


def _difference(results: Results, group: str, name: str, digits: int) -> Column:
    reference = results.ablation.reference

    def show(one: ArmResult) -> str:
        if one.arm.name == reference:
            return NOTHING
        return show_difference(one.differences.get(name), digits)

    return Column(group, f"difference to {reference} [95% interval]", show)


def _show_share(one: ArmResult, name: str) -> str:
    return f"{one.spreads[name].mean:.1%}" if name in one.spreads else NOTHING


def _show_count(count: float | None) -> str:
    if count is None:
        return NOTHING
    sizes = ((1e9, "B"), (1e6, "M"), (1e3, "k"))
    return next(
        (f"{count / size:.2f}{letter}" for size, letter in sizes if count >= size), f"{count:.0f}"
    )
