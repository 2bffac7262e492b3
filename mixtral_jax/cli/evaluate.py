"""Held-out loss and perplexity of a checkpoint on any data, as one line of JSON."""

import json
import time
from typing import Any

import jax

from mixtral_jax.cli.flags import make_verb_parser
from mixtral_jax.cli.model_flags import add_model_flags, note, open_model, parse_model_flags
from mixtral_jax.cli.output import claim_stdout
from mixtral_jax.config import DataConfig, require
from mixtral_jax.data.sources import fingerprint_source
from mixtral_jax.evaluate.perplexity import TokenBytes, make_evaluator
from mixtral_jax.parallel.mesh import matmul_precision
from mixtral_jax.parallel.processes import Processes, join_processes
from mixtral_jax.pretrained import Pretrained
from mixtral_jax.runs.eval_data import Task, add_task_flags, iterate_batches, open_task, plan_task


def main(arguments: list[str]) -> int:
    """`evaluate --checkpoint DIR --data.path=F`: the line on standard output, progress on standard
    error.
    """
    parser = make_verb_parser(__doc__, "evaluate")
    add_model_flags(parser)
    add_task_flags(parser)
    flags, model, sections = parse_model_flags(parser, arguments, data=DataConfig)
    require(
        any(argument.startswith("--data.path=") for argument in arguments),
        "--data.path=F must name the data",
    )
    data = sections["data"]
    fingerprint_source(data.path, data.suffixes)  # Whether there are any, before much is loaded.
    with claim_stdout() as output, join_processes(model.launch) as processes:
        loaded = open_model(model, processes)
        task = plan_task(flags, data, loaded)
        figures = score(loaded, task, processes)
        if processes.index == 0:
            print(json.dumps(figures), file=output)
    return 0


def score(loaded: Pretrained, task: Task, processes: Processes) -> dict[str, Any]:
    """The figures: nats per token and their exponential, bits per byte of text, routing; and what
    they are of.

    Raises:
        ConfigError: there is nothing to read, or no tokenizer to read it with, or the processes
            read other data.
    """
    text = open_task(loaded, task, processes)
    num_rows = sum(plan.num_rows for plan in text.plans)
    is_shown = processes.index == 0
    said = f"scoring {task.part} of {task.data.path}: {num_rows:,} rows of {task.sequence_length} tokens"
    note(said, is_shown=is_shown)
    start = time.monotonic()
    batches = iterate_batches(loaded, text)
    with (
        jax.set_mesh(loaded.mesh),
        jax.default_matmul_precision(matmul_precision(loaded.config.model.dtype)),
    ):
        figures = make_evaluator(batches, TokenBytes.of(text.tokenizer))(loaded.model)
    note(
        f"scored {figures['eval/tokens']:,} tokens in {time.monotonic() - start:.1f} s",
        is_shown=is_shown,
    )
    figures = {name.removeprefix("eval/"): value for name, value in figures.items()}
    return figures | {
        "data": task.data.path,
        "part": task.part,
        "sequence_length": task.sequence_length,
    }
