"""Tunes a Mixtral on chats.

    python finetune_instruct.py [--config=CONFIG] [--workdir=RUN] [--config.KEY=VALUE ...]

The base is --config.finetune.base=MODEL; without it, a tiny one is pretrained first. The same
--workdir again resumes. The tuned model is exported to RUN/export, for transformers, vLLM and
SGLang. What a tuning does, from top to bottom: mixtral_jax/runs/tune.py.
"""

from pathlib import Path

from mixtral_jax.cli.flags import run_command, tell_others
from mixtral_jax.cli.tune_flags import parse_tuning_flags
from mixtral_jax.config import Config


def main(arguments: list[str]) -> int:
    with tell_others(arguments):
        flags = parse_tuning_flags(
            arguments, description=__doc__, default_config="instruct/tiny.py"
        )

    # Only now, since help and wrong flags should not wait for jax.
    from mixtral_jax.parallel.processes import join_processes
    from mixtral_jax.runs.export import export_run
    from mixtral_jax.runs.run import choose_workdir, start_run
    from mixtral_jax.runs.stop import EXIT_CODES, StopSignal
    from mixtral_jax.runs.tune import Tuned, find_base, tune, tune_seeds

    run_flags = flags.run
    with join_processes(run_flags.launch) as processes, StopSignal(processes) as stop:
        workdir = choose_workdir(run_flags.workdir, run_flags.config_path.stem, processes)
        base = find_base(run_flags.config, workdir, processes, stop, run_flags.named_keys)
        if base is None:
            return EXIT_CODES["stopped"]
        run_flags.tell_workdir(workdir)

        def tune_one(config: Config, folder: Path) -> Tuned | None:
            return tune(start_run(base.fit(config), folder, processes), base, stop)

        tuned = tune_seeds(flags.num_seeds, run_flags.config, workdir, tune_one)
        if tuned is None:
            return EXIT_CODES["stopped"]
        with stop.at_once():
            export_run(tuned.run, workdir / "export")
    return EXIT_CODES["finished"]


if __name__ == "__main__":
    run_command(main)
