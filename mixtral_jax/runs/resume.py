"""Where a run stands: its newest checkpoint, or a fresh start; the same on every process, or none
goes on.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

from mixtral_jax.checkpoint.run import RunCheckpoints
from mixtral_jax.runs.text_data import SAME_DATA, name_data
from mixtral_jax.runs.run import Run
from mixtral_jax.config import ConfigError
from mixtral_jax.finetune.tunable import Tunable
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.parallel.agreement import require_same
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
    tunable: Tunable,
    optimizer: optax.GradientTransformation,
    data_fingerprint: str,
    load_base: Callable[[], Transformer] | None = None,
) -> OpenState:
    """Restores the newest checkpoint, if it saw the rows of `data_fingerprint`, or initialises.

    `load_base` gives weights to start from, in place of random ones.

    Raises:
        ConfigError: the data changed since, or the processes do not agree.
    """
    step = checkpoints.latest_step()
    said = f"{name_data(data_fingerprint)} at step {step or 0}"
    require_same(run.processes, "data and step", said, f"{SAME_DATA}, and one --workdir")
    if step is None:
        return OpenState(0, _begin(tunable, optimizer, load_base), {"tokens": 0, "data": data_fingerprint})
    record = checkpoints.read_record(step)
    if record["data"] != data_fingerprint:
        raise ConfigError(
            f"the text, the tokenizer or the packing differs from what {run.workdir} was trained "
            "on "
            f"({record['data'][:12]} -> {data_fingerprint[:12]}): restore the data, or use another "
            "--workdir"
        )
    state = checkpoints.restore(step, abstract_state(tunable.make_model, optimizer, tunable.trainable))
    run.console.print(f"resuming after step {step} of {run.config.train.num_steps}")
    return OpenState(step, state, record)


def _begin(
    tunable: Tunable, optimizer: optax.GradientTransformation, load_base: Callable[[], Transformer] | None
) -> TrainState:
    if load_base is None:
        return init_state(tunable.make_model, optimizer, tunable.trainable)
    # The base is named nowhere here: the state takes its memory.
    return init_state(tunable.adapt, optimizer, tunable.trainable, load_base())
