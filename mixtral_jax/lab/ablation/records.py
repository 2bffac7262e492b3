"""Reads the files of the runs of an ablation: the status of each run and its metrics.

This needs no devices. `results` compares the runs.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mixtral_jax.checkpoint.run_parameters import find_steps
from mixtral_jax.lab.ablation.definition import Ablation, ArmRun

# Files in the workdir of a run.
FAILURE = "failure.json"  # Why the run failed.
FACTS = "facts.json"  # Sizes, versions and devices, written before the first step.
DATA = "data.json"  # Fingerprints of the data and the tokenizer.

# Metrics of training are averaged over this last part of a run, since single batches are noisy.
END_FRACTION = 0.1

Status = Literal["done", "failed", "missing"]


@dataclasses.dataclass(frozen=True)
class Series:
    """A metric over a run: the indices of the lines that have it, [n], and its values, [n, ...]."""

    lines: np.ndarray
    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The state and the metrics of one run.

    Attributes:
        reason: why `status` is not `done`; empty if it is.
        lines: the records of metrics.jsonl.
        facts: the contents of `FACTS` and `DATA`; empty if the run has not started.
    """

    run: ArmRun
    status: Status
    reason: str
    lines: tuple[dict[str, Any], ...]
    facts: dict[str, Any]

    def series(self, name: str) -> Series:
        """Returns a metric at all lines that have it."""
        numbers = [number for number, line in enumerate(self.lines) if name in line]
        values = [self.lines[number][name] for number in numbers]
        return Series(np.array(numbers, int), np.array(values, float))

    def last(self, name: str) -> float | None:
        """Returns the last value of a metric, or None if there is none."""
        values = self.series(name).values
        return float(values[-1]) if len(values) else None

    def end(self, name: str) -> float | None:
        """Returns the mean of a metric over the last `END_FRACTION` of the steps, or None."""
        first = (1 - END_FRACTION) * self.run.config.train.num_steps
        values = [line[name] for line in self.lines if name in line and line["step"] > first]
        return float(np.mean(values)) if values else None

    def tokens(self) -> np.ndarray:
        """Returns the number of tokens seen up to each line, [lines]."""
        return self.series("tokens").values

    def seconds(self) -> np.ndarray:
        """Returns the seconds spent in steps up to each line, [lines].

        Compilation, evaluation and saving do not count.
        """
        return np.cumsum(
            np.diff(self.tokens(), prepend=0) / self.series("tokens_per_second").values
        )

    def flops(self) -> np.ndarray:
        """Returns the model FLOPs up to each line, [lines]."""
        return self.series("step").values * self.facts.get("model_flops_per_step", np.nan)


def is_finished(run: ArmRun, workdir: Path) -> bool:
    """True if the last step of the run is saved, evaluated and logged."""
    folder, last = run.folder(workdir), run.config.train.num_steps
    checkpoints = folder / "checkpoints"
    if not checkpoints.is_dir() or last not in find_steps(checkpoints):
        return False
    lines = _read_lines(folder / "metrics.jsonl")
    return bool(lines) and lines[-1]["step"] == last and "eval/loss" in lines[-1]


def read_records(ablation: Ablation, workdir: Path) -> list[RunRecord]:
    """Reads all runs, in the order of `ablation.runs`.

    A run is `failed` if its batches differ from those of an earlier run with the same seed.
    """
    records: list[RunRecord] = []
    for run in ablation.runs:
        record = _read_record(run, workdir)
        same_seed = [other for other in records if other.run.seed == run.seed]
        problems = [problem for other in same_seed if (problem := _compare_rows(record, other))]
        if problems:
            record = dataclasses.replace(record, status="failed", reason=problems[0])
        records.append(record)
    return records


def _read_record(run: ArmRun, workdir: Path) -> RunRecord:
    folder = run.folder(workdir)
    lines = _read_lines(folder / "metrics.jsonl")
    facts = _read_object(folder / FACTS) | _read_object(folder / DATA)
    failure = _read_object(folder / FAILURE)
    if failure:
        return RunRecord(run, "failed", failure["reason"], lines, facts)
    if is_finished(run, workdir):
        return RunRecord(run, "done", "", lines, facts)
    place = (
        f"at step {lines[-1]['step']} of {run.config.train.num_steps}"
        if lines
        else "before the first logged step"
    )
    reason = f"running or stopped, {place}" if facts else "not started"
    return RunRecord(run, "missing", reason, lines, facts)


def _compare_rows(record: RunRecord, other: RunRecord) -> str | None:
    """Describes the first step at which two runs trained on different batches, or returns None."""
    hashes = {line["step"]: line["batch_hash"] for line in other.lines}
    for line in record.lines:
        step, here = line["step"], line["batch_hash"]
        if (there := hashes.get(step, here)) != here:
            return (
                f"saw other rows than {other.run.name} at step {step} (batch {here} instead of "
                f"{there}): the text, the tokenizer or the version of Python differs; run both "
                "again with the same ones"
            )
    return None


def _read_lines(path: Path) -> tuple[dict[str, Any], ...]:
    """Reads the lines of a metrics file, without a last one that is still being written."""
    text = path.read_text() if path.exists() else ""
    return tuple(json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n"))


def _read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object; an absent file gives an empty one."""
    return json.loads(path.read_text("utf-8")) if path.exists() else {}
