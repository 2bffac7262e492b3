"""Training of one model on one kind of data, wherever its workdir stands: all that pretraining and tuning share."""

import contextlib
from collections.abc import Callable

import jax

from mixtral_jax.checkpoint.run import RunCheckpoints
from mixtral_jax.cli.open_data import TrainingData, open_text
from mixtral_jax.cli.open_state import open_state
from mixtral_jax.cli.start import Run, describe_run
from mixtral_jax.finetune.tunable import make_tunable
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.train.loop import Ending, Outcome, StopSignal, TrainLoop
from mixtral_jax.train.metrics import MetricLog
from mixtral_jax.train.optimizer import bias_rate_schedule, learning_rate_schedule, make_optimizer
from mixtral_jax.train.step import make_train_step


def pretrain(run: Run, stop: StopSignal) -> Outcome:
    """Trains a plain model on text, from random weights."""
    describe_run(run)
    with stop.at_once():
        data = open_text(run)
    return train_model(run, data, stop).outcome


def train_model(
    run: Run, data: TrainingData, stop: StopSignal, load_base: Callable[[], Transformer] | None = None
) -> Ending:
    """Trains, evaluates and saves, to the end of the run or until told to stop.

    Args:
        load_base: gives the weights that a new run starts from, on the mesh in force, in the dtypes of
            `Tunable.make_base`; without it they are random.

    Raises:
        ConfigError: what the workdir holds cannot be gone on with.
    """
    config = run.config
    tunable = make_tunable(config, run.mesh.devices.flat[0].platform)
    schedule = learning_rate_schedule(config.optimizer, config.train.num_steps)
    optimizer = make_optimizer(config.optimizer, schedule, config.router.learning_rate_factor)
    bias_rate = bias_rate_schedule(config.router.bias, config.train.num_steps)
    folder = run.workdir / "checkpoints"
    with jax.set_mesh(run.mesh), RunCheckpoints(folder, config.checkpoint.keep) as checkpoints:
        start = open_state(run, checkpoints, tunable, optimizer, data.fingerprint, load_base)
        with (
            MetricLog(run.workdir, config.log, first_step=start.step, is_writer=run.is_writer) as log,
            contextlib.closing(data.train_batches.iterate(start.step)) as batches,
        ):
            return TrainLoop(
                config=config.train,
                checkpoint=config.checkpoint,
                train_step=make_train_step(optimizer, config.router, schedule, tunable.perturb, bias_rate),
                batches=batches,
                evaluate=data.evaluate,
                checkpoints=checkpoints,
                log=log,
                console=run.console,
                stop=stop,
                record=start.record,
            ).run(start.state)
