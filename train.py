"""Trains a Mixtral from scratch: `python train.py [--config=FILE] [--workdir=DIR] [--config.KEY=VALUE ...]`.

The same --workdir again resumes. A run from top to bottom; each piece is a room of `mixtral_jax`.
"""

import contextlib
from pathlib import Path

import jax

from mixtral_jax.checkpoint.run import RunCheckpoints
from mixtral_jax.cli.flags import parse_run_flags, run_command
from mixtral_jax.cli.open_data import open_text
from mixtral_jax.cli.start import Run, describe_run, require_agreement, start_run
from mixtral_jax.model.transformer import model_maker
from mixtral_jax.train.loop import EXIT_CODES, Outcome, StopSignal, TrainLoop
from mixtral_jax.train.metrics import MetricLog
from mixtral_jax.train.optimizer import learning_rate_schedule, make_optimizer
from mixtral_jax.train.state import abstract_state, init_state
from mixtral_jax.train.step import make_train_step


def pretrain(run: Run) -> Outcome:
    """Tokenises, packs, trains, evaluates and saves, from wherever the workdir stands."""
    config = run.config
    make_model = model_maker(config, run.mesh.devices.flat[0].platform)
    schedule = learning_rate_schedule(config.optimizer, config.train.num_steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    describe_run(run)
    with (
        StopSignal() as stop,
        jax.set_mesh(run.mesh),
        RunCheckpoints(run.workdir / "checkpoints", config.checkpoint.keep) as checkpoints,
    ):
        data = open_text(run)
        step = checkpoints.latest_step()
        require_agreement(config, data.fingerprint, step)
        record = {"tokens": 0, "data": data.fingerprint}
        if step is None:
            state = init_state(make_model, optimizer)
        else:
            record = checkpoints.read_record(step)
            data.require_same(record["data"])
            state = checkpoints.restore(step, abstract_state(make_model, optimizer))
            run.console.print(f"resuming after step {step} of {config.train.num_steps}")
        with (
            MetricLog(run.workdir, config.log, first_step=step or 0, is_writer=run.is_writer) as log,
            contextlib.closing(data.train_batches.iterate(step or 0)) as batches,
        ):
            loop = TrainLoop(
                config=config.train,
                checkpoint=config.checkpoint,
                train_step=make_train_step(optimizer, config.router, schedule),
                batches=batches,
                evaluate=data.evaluate,
                checkpoints=checkpoints,
                log=log,
                console=run.console,
                stop=stop,
                record=record,
            )
            return loop.run(state)


def main(arguments: list[str]) -> int:
    flags = parse_run_flags(
        arguments, description=__doc__, default_config=Path(__file__).parent / "configs/pretrain/tiny.py"
    )
    return EXIT_CODES[pretrain(start_run(flags))]


if __name__ == "__main__":
    run_command(main)
