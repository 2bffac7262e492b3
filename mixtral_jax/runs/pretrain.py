"""The recipe of pretraining: text, and random weights or those of a dense model."""

from collections.abc import Sequence

from mixtral_jax.data.tokenizer import read_tokenizer
from mixtral_jax.runs.base import Base, naming_pretrain_path, saved_steps
from mixtral_jax.runs.checkup import require_disk
from mixtral_jax.runs.describe import describe_run
from mixtral_jax.runs.run import Run
from mixtral_jax.runs.stop import StopSignal
from mixtral_jax.runs.text_data import open_text
from mixtral_jax.runs.training import Callback, train_model
from mixtral_jax.runs.upcycle import dense_loader, open_dense, start_dense
from mixtral_jax.training.loop import Outcome


def pretrain(
    run: Run,
    stop: StopSignal,
    callbacks: Sequence[Callback] = (),
    named_keys: Sequence[str] = (),
) -> Outcome:
    """Trains on the text of a run; with a section `upcycle`, from the weights of a dense model.

    Args:
        named_keys: keys of the config that a command line sets; those that a named dense model
            makes void are refused.

    Raises:
        ConfigError: the disk has no room for the checkpoints, there is nothing to read, or the run
            in the workdir cannot be resumed.
    """
    require_disk(run.training, run.workdir, run.mesh)
    if run.config.upcycle:
        return _upcycle(run, stop, callbacks, named_keys)
    describe_run(run)
    with stop.at_once():
        data = open_text(run)
    return train_model(run, data, stop, callbacks=callbacks).outcome


def _upcycle(
    run: Run, stop: StopSignal, callbacks: Sequence[Callback], named_keys: Sequence[str]
) -> Outcome:
    dense: Base | None = None
    # A run that has saved a step needs its dense model no more: its workdir has all weights.
    if not saved_steps(run):
        assert run.config.upcycle is not None
        if run.config.upcycle.base is None and _pretrain_dense(run, stop) == "stopped":
            return "stopped"
        dense = open_dense(run, named_keys)
    describe_run(run)
    with stop.at_once():
        kept = run.workdir / "tokenizer.model"
        data = open_text(run, dense.tokenizer if dense else read_tokenizer(f"{kept}"))
    if dense and run.is_writer:
        dense.weights.side_files.after_training(dense.tokenizer).save(run.workdir)
    load = dense_loader(dense, run) if dense else None
    return train_model(run, data, stop, load, callbacks=callbacks).outcome


def _pretrain_dense(run: Run, stop: StopSignal) -> Outcome:
    """Pretrains the dense model of an upcycled run that names none."""
    dense = start_dense(run)
    if dense.config.train.num_steps in saved_steps(dense):
        return "finished"
    run.console.print(f"upcycle.base is not given: pretraining a dense model into {dense.workdir}")
    assert run.config.upcycle is not None
    with naming_pretrain_path(run.config.upcycle.pretrain, "upcycle"):
        return pretrain(dense, stop)
