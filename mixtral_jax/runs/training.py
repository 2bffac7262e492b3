"""Training of one model on one kind of data, wherever its workdir stands: all that pretraining and
tuning share.
"""

import contextlib
from collections.abc import Callable

import jax

from mixtral_jax.checkpoint.run import RunCheckpoints
from mixtral_jax.runs.base import saved_steps
from mixtral_jax.runs.text_data import TrainingData, open_text
from mixtral_jax.runs.upcycle import dense_loader, open_dense, start_dense
from mixtral_jax.runs.resume import open_state
from mixtral_jax.runs.run import Run, describe_run
from mixtral_jax.runs.workdir import write_json
from mixtral_jax.config import UpcycleConfig
from mixtral_jax.data.tokenizer import read_tokenizer
from mixtral_jax.finetune.tunable import make_tunable
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.train.loop import Ending, Outcome, StopSignal, TrainLoop
from mixtral_jax.train.metrics import MetricLog
from mixtral_jax.train.optimizer import bias_rate_schedule, learning_rate_schedule, make_optimizer
from mixtral_jax.train.step import make_train_step


def pretrain(run: Run, stop: StopSignal) -> Outcome:
    """Trains a plain model on text: from random weights, or as `upcycle` says from those of a dense
    one.
    """
    if run.config.upcycle:
        return _upcycle(run, run.config.upcycle, stop)
    describe_run(run)
    with stop.at_once():
        data = open_text(run)
    return train_model(run, data, stop).outcome


def _upcycle(run: Run, settings: UpcycleConfig, stop: StopSignal) -> Outcome:
    """A run that has saved a step needs its dense model no more: weights and tokenizer are in its
    workdir.
    """
    base = None
    if not saved_steps(run):
        if settings.base is None and _pretrain_dense(run, stop) == "stopped":
            return "stopped"
        base = open_dense(run)
    describe_run(run)
    with stop.at_once():
        data = open_text(run, base.tokenizer if base else read_tokenizer(f"{run.workdir / 'tokenizer.model'}"))
    return train_model(run, data, stop, dense_loader(base, run) if base else None).outcome


def _pretrain_dense(run: Run, stop: StopSignal) -> Outcome:
    dense = start_dense(run)
    if dense.config.train.num_steps in saved_steps(dense):
        return "finished"
    run.console.print(f"upcycle.base is not given: pretraining a dense model into {dense.workdir}")
    return pretrain(dense, stop)


def train_model(
    run: Run, data: TrainingData, stop: StopSignal, load_base: Callable[[], Transformer] | None = None
) -> Ending:
    """Trains, evaluates and saves, to the end of the run or until told to stop.

    Args:
        load_base: gives the weights that a new run starts from, on the mesh in force, in the dtypes
            of `Tunable.make_base`; without it they are random.

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
        if run.is_writer:  # Now that these are known to be the data of this run.
            tokenizer = read_tokenizer(f"{run.workdir / 'tokenizer.model'}")
            write_json(run.workdir / "data.json", {"data": data.fingerprint, "tokenizer": tokenizer.fingerprint})
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
