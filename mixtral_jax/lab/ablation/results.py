"""The table of an ablation: means over the seeds of each arm, and differences to the reference.

It is made from the runs that have finished so far. `findings` puts it into words.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mixtral_jax.config import Config
from mixtral_jax.lab.ablation.definition import Ablation, Arm
from mixtral_jax.lab.ablation.records import RunRecord, Status, read_records
from mixtral_jax.lab.ablation.spread import Difference, Spread, compare, measure_spread


@dataclasses.dataclass(frozen=True)
class Measure:
    """A number that is computed for every run.

    Attributes:
        name: its name in results.json.
        metric: the metric of metrics.jsonl that it is computed from.
        when: `end` is the mean over the last tenth of the run, `last` the last value.
        is_share_of_collapse: whether it is divided by the maximum violation of total collapse.
    """

    name: str
    metric: str
    when: Literal["end", "last"]
    is_share_of_collapse: bool = False

    def compute(self, record: RunRecord) -> float | None:
        """Returns the value for a run, or None if the run did not log the metric."""
        value = record.end(self.metric) if self.when == "end" else record.last(self.metric)
        if value is None or not self.is_share_of_collapse:
            return value
        return value / (collapsed_violation(record.run.config) or 1)


MEASURES = (
    Measure("eval_loss", "eval/loss", "last"),
    Measure("loss", "loss", "end"),
    Measure("max_violation", "router/max_violation", "end"),
    Measure("running_max_violation", "router/running_max_violation", "last"),
    Measure("eval_max_violation", "eval/router/max_violation", "last"),
    Measure("collapse", "router/max_violation", "end", is_share_of_collapse=True),
    Measure("eval_collapse", "eval/router/max_violation", "last", is_share_of_collapse=True),
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
# Names of the measures that are compared with the reference arm, seed by seed.
COMPARED = ("eval_loss", "max_violation", "eval_max_violation", "collapse")


@dataclasses.dataclass(frozen=True)
class ArmResult:
    """One row of the table.

    Attributes:
        records: one for each seed, finished or not.
        spreads: name of the measure -> its mean and standard deviation over the finished seeds.
        differences: name of the measure -> its difference to the reference arm, over the seeds
            that both have finished.
        speed: tokens per second.
    """

    arm: Arm
    records: tuple[RunRecord, ...]
    spreads: dict[str, Spread]
    differences: dict[str, Difference]
    speed: Spread | None

    @property
    def done(self) -> list[RunRecord]:
        """The finished runs."""
        return [record for record in self.records if record.status == "done"]

    @property
    def status(self) -> Status:
        """`done` if all seeds are done, `failed` if at least one failed, else `missing`."""
        statuses = {record.status for record in self.records}
        return "failed" if "failed" in statuses else "missing" if "missing" in statuses else "done"

    @property
    def reasons(self) -> list[str]:
        """One line for each seed that is not done."""
        return [
            f"seed {one.run.seed}: {one.reason}" for one in self.records if one.status != "done"
        ]

    @property
    def device_imbalance(self) -> Spread | None:
        """The device imbalance, or None if it tells nothing new.

        It is 0 if one shard of the expert axis holds all experts, and it equals the maximum
        violation if every shard holds one expert.
        """
        imbalance = self.spreads.get("device_imbalance")
        violation = self.spreads.get("max_violation")
        if imbalance is None or violation is None:
            return None
        is_known = np.isclose(imbalance.mean, [0, violation.mean], rtol=1e-4).any()
        return None if is_known else imbalance

    def fact(self, name: str) -> Any:
        """Returns an entry of `RunRecord.facts`, or None if no run of the arm has started."""
        return next((record.facts[name] for record in self.records if name in record.facts), None)

    def to_json(self) -> dict[str, Any]:
        """Returns the row of `results.json`; measurements of time are under `clock`."""
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
            | {measure.name: measure.compute(record) for measure in MEASURES}
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
        """All arms except the reference."""
        return [result for result in self.arms if result is not self.reference]

    @property
    def collapsed_violations(self) -> dict[str, float]:
        """Name of the arm -> its maximum violation under total collapse, where that is not 0."""
        found = {result.arm.name: collapsed_violation(result.arm.config) for result in self.arms}
        return {name: violation for name, violation in found.items() if violation}

    @property
    def unevenness(self) -> str:
        """Name of the measure of imbalance by which arms are compared.

        This is the maximum violation, or its share of total collapse if arms differ in the value
        of total collapse.
        """
        return "collapse" if len(set(self.collapsed_violations.values())) > 1 else "max_violation"

    @property
    def failed(self) -> list[str]:
        """The names of the runs that failed."""
        return [
            one.run.name for result in self.arms for one in result.records if one.status == "failed"
        ]

    def provenance(self, name: str) -> list[Any]:
        """Returns the distinct values that the runs have for an entry of `RunRecord.facts`."""
        values = [
            record.facts[name]
            for result in self.arms
            for record in result.records
            if name in record.facts
        ]
        return [value for number, value in enumerate(values) if value not in values[:number]]

    def to_json(self) -> dict[str, Any]:
        """Returns `results.json`.

        Whatever may differ if the same ablation is run twice is under `clock` and `provenance`.
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
    """Reads the runs in the workdir of an ablation and computes the table."""
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
    """Returns the largest possible maximum violation, E / k - 1.

    It is reached if all tokens choose the same k of E experts (total collapse).
    """
    return config.model.num_experts / config.router.num_experts_per_token - 1


def hash_config(arm: Arm) -> str:
    """Returns 12 hexadecimal digits that identify the config of an arm, without its seed."""
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
        if record.status == "done" and (speed := SPEED.compute(record)) is not None
    ]
    return ArmResult(
        arm,
        records,
        {name: spread for name, spread in spreads.items() if spread},
        {name: difference for name, difference in differences.items() if difference},
        measure_spread(speeds),
    )


def _by_measure(records: tuple[RunRecord, ...]) -> dict[str, dict[int, float]]:
    """Returns name of the measure -> seed -> value, for the finished runs."""
    done = [record for record in records if record.status == "done"]
    return {
        measure.name: {
            one.run.seed: value for one in done if (value := measure.compute(one)) is not None
        }
        for measure in MEASURES
    }
