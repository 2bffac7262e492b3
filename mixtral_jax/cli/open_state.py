"""Where a run stands: its newest checkpoint, or a fresh start; the same on every process, or none goes on."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils

from mixtral_jax.checkpoint.run import RunCheckpoints
from mixtral_jax.cli.start import Run
from mixtral_jax.config import Config, ConfigError
from mixtral_jax.train.state import TrainState, abstract_state, init_state


@dataclasses.dataclass(frozen=True)
class OpenState:
    """The state after `step` steps, and the record that goes into every checkpoint."""

    step: int
    state: TrainState
    record: dict[str, Any]


def open_state(
    run: Run,
    checkpoints: RunCheckpoints,
    make_model: Callable[[], nnx.Module],
    optimizer: optax.GradientTransformation,
    data_fingerprint: str,
) -> OpenState:
    """Restores the newest checkpoint, if it saw the rows of `data_fingerprint`, or initialises.

    Raises:
        ConfigError: the data changed since, or the processes do not agree.
    """
    step = checkpoints.latest_step()
    _require_agreement(run.config, data_fingerprint, step)
    if step is None:
        return OpenState(0, init_state(make_model, optimizer), {"tokens": 0, "data": data_fingerprint})
    record = checkpoints.read_record(step)
    if record["data"] != data_fingerprint:
        raise ConfigError(
            f"the text, the tokenizer or the packing differs from what {run.workdir} was trained on "
            f"({record['data'][:12]} -> {data_fingerprint[:12]}): restore the data, or use another --workdir"
        )
    state = checkpoints.restore(step, abstract_state(make_model, optimizer))
    run.console.print(f"resuming after step {step} of {run.config.train.num_steps}")
    return OpenState(step, state, record)


def _require_agreement(config: Config, data_fingerprint: str, step: int | None) -> None:
    """Compares a hash over all processes: one that differs would make the others wait for ever."""
    if jax.process_count() == 1:
        return
    here = f"{dataclasses.asdict(config)} {data_fingerprint} {step}".encode()
    digest = np.frombuffer(hashlib.sha256(here).digest(), np.uint8)
    if len(np.unique(multihost_utils.process_allgather(digest), axis=0)) > 1:
        raise ConfigError(
            "the processes do not agree on the config, the data or the checkpoint to go on from (here: data "
            f"{data_fingerprint[:12]}, step {step}): give all the same flags, data and Python, and one --workdir"
        )
