"""Where the figures of a run go: metrics.jsonl, TensorBoard and, asked for, Weights & Biases."""

import hashlib
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

from mixtral_jax.config import ConfigError, LogConfig
from mixtral_jax.whole_files import write_whole

Record = dict[str, Any]


class MetricLog:
    """Writes one record a step, flushed; continues the file of an earlier start without gaps or
    repeats.

    `is_writer` is true on one process alone; on the others nothing is written.
    """

    def __init__(self, workdir: Path, config: LogConfig, *, first_step: int, is_writer: bool):
        self._file = None
        self._tensorboard = None
        self._wandb = None
        if config.wandb_project and importlib.util.find_spec("wandb") is None:
            raise ConfigError(
                "log.wandb_project is set but wandb is missing: pip install '.[wandb]'"
            )
        if not is_writer:
            return
        path = workdir / "metrics.jsonl"
        cut_after(path, first_step)
        self._file = path.open("a")
        if config.tensorboard:
            from tensorboardX import (
                SummaryWriter,  # Slow to import, and not needed by every process.
            )

            self._tensorboard = SummaryWriter(
                str(workdir / "tensorboard"), purge_step=first_step + 1
            )
        if config.wandb_project:
            import wandb  # type: ignore[import-not-found]

            run_id = hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16]
            self._wandb = wandb.init(
                project=config.wandb_project, dir=str(workdir), id=run_id, resume="allow"
            )

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, *_: object) -> None:
        for sink in (self._file, self._tensorboard):
            if sink:
                sink.close()
        if self._wandb:
            self._wandb.finish()

    def write(self, record: Record) -> None:
        """One JSON object on a line of its own; numbers also to the other sinks, at record["step"]."""
        if not self._file:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        numbers = {
            key: value
            for key, value in record.items()
            if isinstance(value, int | float) and key != "step"
        }
        if self._tensorboard:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, record["step"])
        if self._wandb:
            self._wandb.log(numbers, step=record["step"])


def cut_after(path: Path, last_step: int) -> None:
    """Drops the lines of a metrics file past `last_step`, and one that a killed process left
    unfinished.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > last_step:
            break
        kept.append(line)
    write_whole(path, "".join(kept))


def check_finite(record: Record, names: tuple[str, ...] = ("loss", "grad_norm")) -> None:
    """Raises FloatingPointError, naming the figure and the step, when one is not finite."""
    for name in names:
        if not math.isfinite(record[name]):
            raise FloatingPointError(
                f"{name} is {record[name]} at step {record['step']}: nothing of this step was "
                "saved; start a new "
                "--workdir with a lower optimizer.learning_rate, or look at the batch "
                f"{record['batch_hash']}"
            )
