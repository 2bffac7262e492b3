"""The table of an ablation: for each arm, means over its seeds and differences to the reference
arm.

Made from what the runs wrote, whatever there is of it by now. Words and pictures are for `findings`
and `figures`.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mixtral_jax.config import Config
from mixtral_jax.lab.ablation.plan import Ablation, Arm
from mixtral_jax.lab.ablation.records import RunRecord, Status, read_records
from mixtral_jax.lab.ablation.spread import Difference, Spread, compare, measure_spread


@dataclasses.dataclass(frozen=True)
class Measure:
    """A column: its name here, that of the figure in metrics.jsonl, and which of its values count.

    `end` is the mean over the last tenth of the run, `last` the last value; `of_collapse` makes it
    a share of the maximum violation of total collapse.
    """

    name: str
    figure: str
    when: Literal["end", "last"]
    of_collapse: bool = False

    def of(self, record: RunRecord) -> float | None:
        """None where the run has no such figure."""
        value = record.end(self.figure) if self.when == "end" else record.last(self.figure)
        if value is None or not self.of_collapse:
            return value
        return value / (collapsed_violation(record.run.config) or 1)


MEASURES = (
    Measure("eval_loss", "eval/loss", "last"),
    Measure("loss", "loss", "end"),
    Measure("max_violation", "router/max_violation", "end"),
    Measure("running_max_violation", "router/running_max_violation", "last"),
    Measure("eval_max_violation", "eval/router/max_violation", "last"),
    Measure("collapse", "router/max_violation", "end", of_collapse=True),
    Measure("eval_collapse", "eval/router/max_violation", "last", of_collapse=True),
    Measure("coefficient_of_variation", "router/coefficient_of_variation", "end"),
    Measure("load_entropy", "router/load_entropy", "end"),
    Measure("gate_entropy", "router/gate_entropy", "end"),
    Measure("dropped_fraction", "router/dropped_fraction", "end"),
    Measure("overflowed_fraction", "router/overflowed_fraction", "end"),
    Measure("dead_experts", "router/dead_experts", "end"),
    Measure("device_imbalance", "router/device_imbalance", "end"),
    Measure("tokens", "tokens", "last"),
)
SPEED = Measure("tokens_per_second", "tokens_per_second", "end")
# Those that are compared with the reference, seed by seed.
COMPARED = ("eval_loss", "max_violation", "eval_max_violation", "collapse")


@dataclasses.dataclass(frozen=True)
class ArmResult:
    """One row of the table.

    Spreads and differences are of the seeds that are done, by the name of the measure.
    """

    arm: Arm
    records: tuple[RunRecord, ...]
    spreads: dict[str, Spread]
    differences: dict[str, Difference]
    speed: Spread | None

    @property
    def done(self) -> list[RunRecord]:
        """The runs that are."""
        return [record for record in self.records if record.status == "done"]

    @property
    def status(self) -> Status:
        """Of the arm: `done` where all seeds are, `failed` where one has."""
        statuses = {record.status for record in self.records}
        return "failed" if "failed" in statuses else "missing" if "missing" in statuses else "done"

    @property
    def reasons(self) -> list[str]:
        """A line for each seed that is not done."""
        return [
            f"seed {one.run.seed}: {one.reason}" for one in self.records if one.status != "done"
        ]

    @property
    def device_imbalance(self) -> Spread | None:
        """None where all experts lie in one place of the expert axis, or each alone in its own:
        then it is 0, or the maximum violation said again.
        """
        found, violation = self.spreads.get("device_imbalance"), self.spreads.get("max_violation")
        is_new = (
            found and violation and not np.isclose(found.mean, [0, violation.mean], rtol=1e-4).any()
        )
        return found if is_new else None

    def fact(self, name: str) -> Any:
        """What the runs noted before their first step; None if none has begun."""
        return next((record.facts[name] for record in self.records if name in record.facts), None)

    def to_json(self) -> dict[str, Any]:
        """The row of `results.json`; what the clock had a hand in lies under `clock`."""
        figures: dict[str, Any] = {}
        for measure in MEASURES:
            spread = self.spreads.get(measure.name)
            figures[f"{measure.name}_mean"] = spread and spread.mean
            figures[f"{measure.name}_sd"] = spread and spread.sd
        for name in COMPARED:
            difference = self.differences.get(name)
            figures[f"{name}_difference"] = difference and dataclasses.asdict(difference)
        by_seed = [
            {"seed": record.run.seed, "status": record.status, "reason": record.reason}
            | {measure.name: measure.of(record) for measure in MEASURES}
            for record in self.records
        ]
        return {
            "name": self.arm.name,
            "changes": dict(self.arm.changes),
            "seeds": [one.run.seed for one in self.records],
            "status": self.status,
            "reasons": self.reasons,
            "config": hash_config(self.arm),
            "parameters_total": self.fact("parameters_total"),
            "parameters_active": self.fact("parameters_active"),
            "model_flops_per_step": self.fact("model_flops_per_step"),
            **figures,
            "runs": by_seed,
            "clock": {
                "tokens_per_second_mean": self.speed and self.speed.mean,
                "tokens_per_second_sd": self.speed and self.speed.sd,
            },
        }


@dataclasses.dataclass(frozen=True)
class Results:
    """The whole table, in the order of the ablation file."""

    ablation: Ablation
    arms: tuple[ArmResult, ...]

    @property
    def reference(self) -> ArmResult:
        """The arm that the others are compared with."""
        return next(result for result in self.arms if result.arm.name == self.ablation.reference)

    @property
    def others(self) -> list[ArmResult]:
        """All but the reference."""
        return [result for result in self.arms if result is not self.reference]

    @property
    def collapsed_violations(self) -> dict[str, float]:
        """Arm -> the maximum violation of its total collapse, for those that can be uneven."""
        found = {result.arm.name: collapsed_violation(result.arm.config) for result in self.arms}
        return {name: violation for name, violation in found.items() if violation}

    @property
    def unevenness(self) -> str:
        """The measure that compares arms: the maximum violation, or its share of collapse where
        that differs.
        """
        return "collapse" if len(set(self.collapsed_violations.values())) > 1 else "max_violation"

    @property
    def failed(self) -> list[str]:
        """The names of the runs that have."""
        return [
            one.run.name for result in self.arms for one in result.records if one.status == "failed"
        ]

    def provenance(self, name: str) -> list[Any]:
        """The different things that runs noted under `name` before their first step."""
        noted = [
            record.facts[name]
            for result in self.arms
            for record in result.records
            if name in record.facts
        ]
        return [value for number, value in enumerate(noted) if value not in noted[:number]]

    def to_json(self) -> dict[str, Any]:
        """`results.json`; what may differ between two runs of one ablation lies under `clock` and
        `provenance`.
        """
        return {
            "question": self.ablation.question,
            "reference": self.ablation.reference,
            "seeds": list(self.ablation.seeds),
            "num_steps": self.reference.arm.config.train.num_steps,
            "arms": [result.to_json() for result in self.arms],
            "provenance": {
                name: self.provenance(name)
                for name in ("data", "tokenizer", "versions", "commit", "devices", "command")
            },
        }


def read_results(ablation: Ablation, workdir: Path) -> Results:
    """What is known of an ablation whose runs lie in `workdir`."""
    records = read_records(ablation, workdir)
    by_arm = {
        arm.name: tuple(one for one in records if one.run.arm.name == arm.name)
        for arm in ablation.arms
    }
    reference = _by_measure(by_arm[ablation.reference])
    return Results(
        ablation, tuple(_read_arm(arm, by_arm[arm.name], reference) for arm in ablation.arms)
    )


def collapsed_violation(config: Config) -> float:
    """The most that the maximum violation can be, E / k - 1: all tokens choose the same k of E
    experts.
    """
    return config.model.num_experts / config.router.num_experts_per_token - 1


def hash_config(arm: Arm) -> str:
    """What the config of an arm is called, but for its seed: 12 hex digits."""
    text = json.dumps(dataclasses.asdict(arm.config), sort_keys=True)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:12]


def _read_arm(
    arm: Arm, records: tuple[RunRecord, ...], reference: dict[str, dict[int, float]]
) -> ArmResult:
    values = _by_measure(records)
    spreads = {name: measure_spread(list(by_seed.values())) for name, by_seed in values.items()}
    differences = {name: compare(values[name], reference[name]) for name in COMPARED}
    speeds = [
        speed
        for record in records
        if record.status == "done" and (speed := SPEED.of(record)) is not None
    ]
    return ArmResult(
        arm,
        records,
        {name: spread for name, spread in spreads.items() if spread},
        {name: difference for name, difference in differences.items() if difference},
        measure_spread(speeds),
    )


def _by_measure(records: tuple[RunRecord, ...]) -> dict[str, dict[int, float]]:
    """Measure -> seed -> value, of the runs that are done."""
    done = [record for record in records if record.status == "done"]
    return {
        measure.name: {
            one.run.seed: value for one in done if (value := measure.of(one)) is not None
        }
        for measure in MEASURES
    }
