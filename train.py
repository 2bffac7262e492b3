"""Trains a Mixtral from scratch: `python train.py [--config=FILE] [--workdir=DIR] [--config.KEY=VALUE ...]`.

The same --workdir again resumes. A run from top to bottom; each piece is a room of `mixtral_jax`."""

import contextlib

import jax

from mixtral_jax.checkpoint.run import RunCheckpoints
from mixtral_jax.cli.flags import parse_run_flags, run_command
from mixtral_jax.cli.open_data import open_text
from mixtral_jax.cli.open_state import open_state
from mixtral_jax.cli.start import Run, describe_run, start_run
from mixtral_jax.config import require
from mixtral_jax.model.transformer import model_maker
from mixtral_jax.parallel.processes import join_processes
from mixtral_jax.train.loop import EXIT_CODES, Outcome, StopSignal, TrainLoop
from mixtral_jax.train.metrics import MetricLog
from mixtral_jax.train.optimizer import learning_rate_schedule, make_optimizer
from mixtral_jax.train.step import make_train_step


def pretrain(run: Run, stop: StopSignal) -> Outcome:
    """Tokenises, packs, trains, evaluates and saves, from wherever the workdir stands."""
    config = run.config
    make_model = model_maker(config, run.mesh.devices.flat[0].platform)
    schedule = learning_rate_schedule(config.optimizer, config.train.num_steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    describe_run(run)
    with stop.at_once():
        data = open_text(run)
    folder = run.workdir / "checkpoints"
    with jax.set_mesh(run.mesh), RunCheckpoints(folder, config.checkpoint.keep) as checkpoints:
        start = open_state(run, checkpoints, make_model, optimizer, data.fingerprint)
        with (
            MetricLog(run.workdir, config.log, first_step=start.step, is_writer=run.is_writer) as log,
            contextlib.closing(data.train_batches.iterate(start.step)) as batches,
        ):
            return TrainLoop(
                config=config.train,
                checkpoint=config.checkpoint,
                train_step=make_train_step(optimizer, config.router, schedule),
                batches=batches,
                evaluate=data.evaluate,
                checkpoints=checkpoints,
                log=log,
                console=run.console,
                stop=stop,
                record=start.record,
            ).run(start.state)


def main(arguments: list[str]) -> int:
    flags = parse_run_flags(arguments, description=__doc__, default_config="pretrain/tiny.py")
    require(flags.config.finetune is None, "the config has a section finetune: run finetune_instruct.py with it")
    with join_processes(flags.launch) as processes, StopSignal(processes.count) as stop:
        return EXIT_CODES[pretrain(start_run(flags, processes), stop)]


if __name__ == "__main__":
    run_command(main)
