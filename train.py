"""Trains a Mixtral from scratch.

    python train.py [--config=CONFIG] [--workdir=RUN] [--config.KEY=VALUE ...]

The same --workdir again resumes. What a run does, from top to bottom: mixtral_jax/runs/pretrain.py
and mixtral_jax/runs/training.py.
"""

from mixtral_jax.cli.flags import parse_run_flags, run_command, tell_others
from mixtral_jax.config import require


def main(arguments: list[str]) -> int:
    with tell_others(arguments):
        flags = parse_run_flags(arguments, description=__doc__, default_config="pretrain/tiny.py")
        is_pretraining = flags.config.finetune is None
        require(is_pretraining, "the config has a section finetune: run finetune_instruct.py")

    # Only now, since help and wrong flags should not wait for jax.
    from mixtral_jax.parallel.processes import join_processes
    from mixtral_jax.runs.pretrain import pretrain
    from mixtral_jax.runs.run import choose_workdir, start_run
    from mixtral_jax.runs.stop import EXIT_CODES, StopSignal

    with join_processes(flags.launch) as processes, StopSignal(processes) as stop:
        workdir = choose_workdir(flags.workdir, flags.config_path.stem, processes)
        run = start_run(flags.config, workdir, processes)
        flags.tell_workdir(workdir)
        return EXIT_CODES[pretrain(run, stop, named_keys=flags.named_keys)]


if __name__ == "__main__":
    run_command(main)
