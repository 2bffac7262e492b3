"""Training of one model on one data set, from wherever its workdir stands to its end."""

import contextlib
from collections.abc import Callable, Sequence

import jax

from mixtral_jax.checkpoint.run import RunCheckpoints
from mixtral_jax.data.tokenizer import read_tokenizer
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.runs.console import RunProgress
from mixtral_jax.runs.resume import resume_or_init
from mixtral_jax.runs.run import Run
from mixtral_jax.runs.stop import StopSignal
from mixtral_jax.runs.text_data import TrainingData
from mixtral_jax.training.loop import Ending, TrainLoop
from mixtral_jax.training.metrics import MetricLog, Record
from mixtral_jax.whole_files import write_json

# Called with the record of each logged step; a step that was evaluated has `eval/` figures in it.
Callback = Callable[[Record], None]


def train_model(
    run: Run,
    data: TrainingData,
    stop: StopSignal,
    load_base: Callable[[], Transformer] | None = None,
    callbacks: Sequence[Callback] = (),
) -> Ending:
    """Trains, evaluates and saves, to the end of the run or until told to stop.

    Args:
        load_base: loads the weights that a new run starts from onto the mesh in force, in the
            dtypes of `Training.make_base`; None starts from random weights.

    Raises:
        ConfigError: the run in the workdir cannot be resumed with this data.
    """
    config = run.config
    folder = run.workdir / "checkpoints"
    with jax.set_mesh(run.mesh), RunCheckpoints(folder, config.checkpoint.keep) as checkpoints:
        start = resume_or_init(run, checkpoints, data.fingerprint, load_base)
        if run.is_writer:  # Only now is it certain that these are the data of this run.
            _write_fingerprints(run, data)
        with (
            MetricLog(
                run.workdir, config.log, first_step=start.step, is_writer=run.is_writer
            ) as log,
            contextlib.closing(data.train_batches.iterate(start.step)) as batches,
        ):
            return TrainLoop(
                config=config.train,
                checkpoint=config.checkpoint,
                train_step=run.training.train_step,
                batches=batches,
                evaluate=data.evaluate,
                checkpoints=checkpoints,
                log=log,
                progress=RunProgress(run.console, start.step, config.train.num_steps),
                is_stop_requested=stop.is_due,
                record=start.record,
                callbacks=callbacks,
            ).run(start.state)


def _write_fingerprints(run: Run, data: TrainingData) -> None:
    tokenizer = read_tokenizer(f"{run.workdir / 'tokenizer.model'}")
    fingerprints = {"data": data.fingerprint, "tokenizer": tokenizer.fingerprint}
    write_json(run.workdir / "data.json", fingerprints)
