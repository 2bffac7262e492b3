"""Trains a Mixtral from scratch: `python train.py [--config=FILE] [--workdir=DIR]
[--config.KEY=VALUE ...]`.

The same --workdir again resumes. What a run is, from top to bottom: `mixtral_jax/cli/training.py`.
"""

from mixtral_jax.cli.flags import parse_run_flags, run_command
from mixtral_jax.config import require
from mixtral_jax.parallel.processes import join_processes
from mixtral_jax.runs.run import start_run, tell_others
from mixtral_jax.runs.training import pretrain
from mixtral_jax.train.loop import EXIT_CODES, StopSignal


def main(arguments: list[str]) -> int:
    with tell_others(arguments):
        flags = parse_run_flags(arguments, description=__doc__, default_config="pretrain/tiny.py")
        require(
            flags.config.finetune is None,
            "the config has a section finetune: run finetune_instruct.py with it",
        )
    with join_processes(flags.launch) as processes, StopSignal(processes) as stop:
        return EXIT_CODES[pretrain(start_run(flags, processes), stop)]


if __name__ == "__main__":
    run_command(main)
