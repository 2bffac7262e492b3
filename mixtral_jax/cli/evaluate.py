"""Held-out loss and perplexity of a checkpoint on any data, as one line of JSON."""

import json

from mixtral_jax.cli.flags import make_verb_parser
from mixtral_jax.cli.model_flags import add_model_flags, open_model, parse_model_flags
from mixtral_jax.cli.output import claim_stdout
from mixtral_jax.cli.task_flags import add_task_flags, choose_data, read_task
from mixtral_jax.config import DataConfig


def main(arguments: list[str]) -> int:
    """`evaluate --checkpoint MODEL [--data.path=TEXT]`: a line of JSON on standard output."""
    parser = make_verb_parser(__doc__, "evaluate")
    add_model_flags(parser)
    add_task_flags(parser)
    flags, model, _ = parse_model_flags(parser, arguments, data=DataConfig)

    from mixtral_jax.data.sources import require_sources
    from mixtral_jax.parallel.processes import join_processes
    from mixtral_jax.runs.eval_data import read_run, score

    run = read_run(flags.checkpoint)
    data = choose_data(arguments, run)
    require_sources(data)  # Missing data are found before much is loaded.
    with claim_stdout() as output, join_processes(model.launch) as processes:
        loaded = open_model(model, processes)
        figures = score(loaded, read_task(flags, arguments, run, data, loaded), processes)
        if processes.index == 0:
            print(json.dumps(figures), file=output)
    return 0
