"""What the runs of an ablation wrote, read back: how each stands, and its figures.

Needs no devices, and none of the programs that wrote it. What the figures say together is for
`results`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mixtral_jax.checkpoint.run_parameters import find_steps
from mixtral_jax.lab.ablation.plan import Ablation, ArmRun

# In the folder of a run: why it broke off; what is known of it before its first step, and which
# data it reads.
FAILURE, FACTS, DATA = "failure.json", "facts.json", "data.json"
# Figures of training are means over the lines of this last part of a run: one batch says little.
END_FRACTION = 0.1

Status = Literal["done", "failed", "missing"]


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """One run:

    `status`, why it is not `done`, the lines of its metrics.jsonl, and its facts (empty: not
    started).
    """

    run: ArmRun
    status: Status
    reason: str
    lines: tuple[dict[str, Any], ...]
    facts: dict[str, Any]

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The lines that have a figure, and its values: [n], and [n] or what the figure's shape
        makes of it.
        """
        numbers = [number for number, line in enumerate(self.lines) if name in line]
        return np.array(numbers, int), np.array(
            [self.lines[number][name] for number in numbers], float
        )

    def last(self, name: str) -> float | None:
        """A figure where it was last measured."""
        values = self.series(name)[1]
        return float(values[-1]) if len(values) else None

    def end(self, name: str) -> float | None:
        """The mean of a figure over the end of the run."""
        first = (1 - END_FRACTION) * self.run.config.train.num_steps
        values = [line[name] for line in self.lines if name in line and line["step"] > first]
        return float(np.mean(values)) if values else None

    def tokens(self) -> np.ndarray:
        """Tokens seen at each line, [lines]."""
        return self.series("tokens")[1]

    def seconds(self) -> np.ndarray:
        """Time spent in steps until each line, [lines]: without compiling, evaluating and saving."""
        return np.cumsum(np.diff(self.tokens(), prepend=0) / self.series("tokens_per_second")[1])

    def flops(self) -> np.ndarray:
        """What the model needed until each line, [lines]."""
        return self.series("step")[1] * self.facts.get("model_flops_per_step", np.nan)


def is_finished(run: ArmRun, workdir: Path) -> bool:
    """Whether the run has nothing left to do: its last step is saved, evaluated and logged."""
    folder, last = run.folder(workdir), run.config.train.num_steps
    checkpoints = folder / "checkpoints"
    if not checkpoints.is_dir() or last not in find_steps(checkpoints):
        return False
    lines = _read_lines(folder / "metrics.jsonl")
    return bool(lines) and lines[-1]["step"] == last and "eval/loss" in lines[-1]


def read_records(ablation: Ablation, workdir: Path) -> list[RunRecord]:
    """How all runs stand; one that saw other rows than those of its seed before it has failed."""
    records: list[RunRecord] = []
    for run in ablation.runs:
        record = _read_record(run, workdir)
        before = [other for other in records if other.run.seed == run.seed]
        different = next(filter(None, (_find_other_rows(record, other) for other in before)), None)
        records.append(
            dataclasses.replace(record, status="failed", reason=different) if different else record
        )
    return records


def _read_record(run: ArmRun, workdir: Path) -> RunRecord:
    folder = run.folder(workdir)
    lines, facts = (
        _read_lines(folder / "metrics.jsonl"),
        _read_object(folder / FACTS) | _read_object(folder / DATA),
    )
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


def _find_other_rows(record: RunRecord, other: RunRecord) -> str | None:
    """Where two runs of one seed saw different batches, in words."""
    hashes = {line["step"]: line["batch_hash"] for line in other.lines}
    for line in record.lines:
        if hashes.get(line["step"], line["batch_hash"]) != line["batch_hash"]:
            return (
                f"saw other rows than {other.run.name} at step {line['step']} (batch "
                f"{line['batch_hash']} instead of "
                f"{hashes[line['step']]}): the text, the tokenizer or Python differ; run both "
                "again with the same"
            )
    return None


def _read_lines(path: Path) -> tuple[dict[str, Any], ...]:
    """The records of a metrics file, without one that is still being written."""
    text = path.read_text() if path.exists() else ""
    return tuple(json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n"))


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    return json.loads(path.read_text("utf-8")) if path.exists() else {}
