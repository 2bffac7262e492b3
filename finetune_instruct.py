"""Tunes a Mixtral on chats: `python finetune_instruct.py [--config=FILE] [--workdir=DIR]
[--config.KEY=VALUE ...]`.

The base is --config.finetune.base=DIR; without it, a tiny one is pretrained first. The same
--workdir again resumes. The tuned model is exported to DIR/export, for transformers, vLLM and
SGLang. Each piece is a room of `mixtral_jax`.
"""

import dataclasses

from mixtral_jax.cli.flags import RunFlags, run_command
from mixtral_jax.parallel.processes import Processes, join_processes
from mixtral_jax.runs.answers import ask, ask_base, compare_with_base, report_answers
from mixtral_jax.runs.base import Base
from mixtral_jax.runs.chat_data import open_chat
from mixtral_jax.runs.export import export_run, save_adapters
from mixtral_jax.runs.run import choose_workdir, describe_run, start_run, tell_others
from mixtral_jax.runs.training import train_model
from mixtral_jax.runs.tune import Tuned, choose_best, parse_tuning_flags
from mixtral_jax.runs.tuning_base import find_base
from mixtral_jax.train.loop import EXIT_CODES, StopSignal


def tune(flags: RunFlags, base: Base, processes: Processes, stop: StopSignal) -> Tuned | None:
    """Tunes the base from wherever the workdir stands, and asks it before and after;

    None if it was stopped.
    """
    run = start_run(dataclasses.replace(flags, config=base.fit(flags.config)), processes)
    describe_run(run)
    with stop.at_once():
        data = open_chat(run, base.tokenizer)
    before = ask_base(base, run, data)
    ending = train_model(run, compare_with_base(data, before), stop, base.loader(run))
    if ending.outcome == "stopped":
        return None
    save_adapters(run, ending.state, base.folder)
    del ending  # Makes room for the model that is asked.
    after = ask(run.workdir, run, data)
    report_answers(run, data, before, after)
    return Tuned(run, after)


def main(arguments: list[str]) -> int:
    with tell_others(arguments):
        flags = parse_tuning_flags(
            arguments, description=__doc__, default_config="instruct/tiny.py"
        )
    with join_processes(flags.run.launch) as processes, StopSignal(processes) as stop:
        workdir = choose_workdir(flags.run, processes)
        base = find_base(flags.run, workdir, processes, stop)
        if base is None:
            return EXIT_CODES["stopped"]
        runs: list[Tuned] = []
        for one in flags.each_seed(workdir):
            tuned = tune(one, base, processes, stop)
            if tuned is None:
                return EXIT_CODES["stopped"]
            runs.append(tuned)
        with stop.at_once():
            export_run(choose_best(runs, workdir).run, workdir / "export")
    return EXIT_CODES["finished"]


if __name__ == "__main__":
    run_command(main)
