"""Where the metrics of a run go: metrics.jsonl, TensorBoard and, if asked for, Weights & Biases."""

import hashlib
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

from mixtral_jax.config import ConfigError, LogConfig
from mixtral_jax.whole_files import write_whole

Record = dict[str, Any]

MUST_BE_FINITE = ("loss", "grad_norm")


class MetricLog:
    """Writes one record per logged step, and flushes it.

    A resumed run continues the file of its earlier start, without gaps or repeats.

    Args:
        is_writer: true on exactly one process; the others write nothing.
    """

    def __init__(self, workdir: Path, config: LogConfig, *, first_step: int, is_writer: bool):
        self._file = None
        self._tensorboard = None
        self._wandb = None
        if config.wandb_project and importlib.util.find_spec("wandb") is None:
            raise ConfigError(
                "log.wandb_project is set but wandb is missing: pip install -e '.[wandb]'"
            )
        if not is_writer:
            return
        path = workdir / "metrics.jsonl"
        cut_after(path, first_step)
        self._file = path.open("a")
        if config.tensorboard:
            # Slow to import, and only the writer needs it.
            from tensorboardX import SummaryWriter

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
        """Writes a record as a line of JSON, and its numbers to the other sinks."""
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
    """Drops the lines of a metrics file after `last_step`, and an unfinished last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > last_step:
            break
        kept.append(line)
    write_whole(path, "".join(kept))


def check_finite(record: Record) -> None:
    """Raises FloatingPointError, naming the metric and the step, if one is not finite."""
    for name in MUST_BE_FINITE:
        if not math.isfinite(record[name]):
            raise FloatingPointError(
                f"{name} is {record[name]} at step {record['step']}: nothing of this step was "
                "saved; start a new "
                "--workdir with a lower optimizer.learning_rate, or look at the batch "
                f"{record['batch_hash']}"
            )
