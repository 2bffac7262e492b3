"""Where a run stands: its newest checkpoint, or a fresh start; the same on every process."""

import dataclasses
from collections.abc import Callable
from typing import Any

from mixtral_jax.checkpoint.run import RunCheckpoints
from mixtral_jax.config import Config, ConfigError
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.parallel.agreement import require_same
from mixtral_jax.runs.run import Run
from mixtral_jax.runs.text_data import SAME_DATA, name_data
from mixtral_jax.runs.workdir import adopt_data
from mixtral_jax.training.optimizer import learning_rate_schedule
from mixtral_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class StartState:
    """The state after `step` steps, and the record that every checkpoint is saved with."""

    step: int
    state: TrainState
    record: dict[str, Any]


def resume_or_init(
    run: Run,
    checkpoints: RunCheckpoints,
    data_fingerprint: str,
    load_base: Callable[[], Transformer] | None = None,
) -> StartState:
    """Restores the newest checkpoint, or initialises if there is none.

    Args:
        data_fingerprint: of the rows that the run reads; a checkpoint of other rows is refused.
        load_base: loads the weights of a fresh start; None draws them.

    Raises:
        ConfigError: the data changed since the checkpoint, or the processes do not agree.
    """
    step = checkpoints.latest_step()
    length = {"num_steps": run.config.train.num_steps}
    state_of_affairs = f"{name_data(data_fingerprint)} at step {step or 0}"
    fix = f"{SAME_DATA}, and one --workdir"
    require_same(run.processes, "data and step", state_of_affairs, fix)
    if step is None:
        # No name is bound to the base here, so that the state can take over its memory.
        state = run.training.init() if load_base is None else run.training.init(load_base())
        return StartState(0, state, {"tokens": 0, "data": data_fingerprint} | length)
    record = checkpoints.read_record(step)
    if record["data"] != data_fingerprint:
        raise ConfigError(
            f"the text, the tokenizer or the packing differs from what {run.workdir} was trained "
            f"on ({record['data'][:12]} -> {data_fingerprint[:12]}): restore the data, or use "
            "another --workdir"
        )
    try:
        state = checkpoints.restore(step, run.training.abstract_state())
    except ValueError as error:
        raise ConfigError(
            f"{run.workdir} cannot be resumed ({error}): resume with the model and the optimizer "
            "that it began with, or use another --workdir"
        ) from error
    for line in adopt_data(run.workdir, run.config) if run.is_writer else ():
        run.console.print(line, markup=False)
    run.console.print(f"resuming after step {step} of {run.config.train.num_steps}")
    num_steps = run.config.train.num_steps
    # If all steps are done, no learning rate changes.
    if step < num_steps != record.get("num_steps", num_steps):
        run.console.print(_describe_new_length(run.config, record["num_steps"], step))
    return StartState(step, state, record | length)


def _describe_new_length(config: Config, num_steps_before: int, step: int) -> str:
    """What another number of steps does to the learning rate, whose schedule it stretches."""
    num_steps = config.train.num_steps
    before: Any = learning_rate_schedule(config.optimizer, num_steps_before)(step - 1)
    now: Any = learning_rate_schedule(config.optimizer, num_steps)(step)
    return (
        f"train.num_steps was {num_steps_before}, and is now {num_steps}: the learning rate "
        f"follows the schedule of {num_steps} steps, and goes from {float(before):.2g} at step "
        f"{step} to {float(now):.2g} at step {step + 1}"
    )
