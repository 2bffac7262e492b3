"""Held-out loss and perplexity of a checkpoint on any data, as one line of JSON."""

import argparse
import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import jax
from rich.console import Console
from rich.progress import track

from mixtral_jax.checkpoint.foreign_folder import read_object
from mixtral_jax.cli.flags import make_verb_parser
from mixtral_jax.cli.open_data import SAME_DATA, find_tokenizer, name_data
from mixtral_jax.cli.open_model import add_model_flags, note, open_model, parse_model_flags
from mixtral_jax.cli.output import claim_stdout
from mixtral_jax.config import DataConfig, TrainConfig, require
from mixtral_jax.config_mapping import build
from mixtral_jax.data.batches import spread_batches
from mixtral_jax.data.chats import prepare_chats
from mixtral_jax.data.packing import PackPlan, plan_rows
from mixtral_jax.data.sources import fingerprint_source
from mixtral_jax.data.store import TokenStore
from mixtral_jax.data.text import tokenize_text
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.evaluate.perplexity import TokenBytes, make_evaluator
from mixtral_jax.parallel.agreement import require_same
from mixtral_jax.parallel.batch import Batch
from mixtral_jax.parallel.mesh import matmul_precision
from mixtral_jax.parallel.processes import Processes, join_processes
from mixtral_jax.pretrained import Pretrained

Part = Literal["held_out", "all"]
# Of a row, unless the run was trained on shorter ones; and of the rows that a device scores at once.
_LONGEST_ROW, _TOKENS_AT_ONCE = 2048, 2048


@dataclasses.dataclass(frozen=True)
class Task:
    """What is scored: which documents of which data, cut into rows of which length, and how many of these."""

    data: DataConfig
    part: Part
    is_chat: bool
    sequence_length: int
    num_sequences: int | None


@dataclasses.dataclass(frozen=True)
class _Trained:
    """What a workdir says of the run that made a checkpoint."""

    data: DataConfig
    train: TrainConfig
    is_chat: bool


def main(arguments: list[str]) -> int:
    """`evaluate --checkpoint DIR --data.path=F`: the line on standard output, progress on standard error."""
    parser = make_verb_parser(__doc__, "evaluate")
    add_model_flags(parser)
    add_flags = parser.add_argument
    add_flags("--chat", action="store_true", help="the data are conversations: score the answers alone")
    add_flags("--part", choices=get_args(Part), help="by default all; of a run's own data, what it held out")
    add_flags("--sequence_length", type=int, help="of a row; by default the run's own, or 2048")
    add_flags("--num_sequences", type=int, help="of rows, spread evenly; by default all, or what the run evaluates on")
    parser.epilog = f"{parser.epilog}; --data.path=F and other --data.KEY=VALUE name the data, as in training"
    flags, model, sections = parse_model_flags(parser, arguments, data=DataConfig)
    require(any(argument.startswith("--data.path=") for argument in arguments), "--data.path=F must name the data")
    fingerprint_source(sections["data"].path)  # Whether there are any, before much is loaded.
    with claim_stdout() as output, join_processes(model.launch) as processes:
        loaded = open_model(model, processes)
        task = plan_task(flags, sections["data"], loaded)
        figures = score(loaded, task, processes)
        if processes.index == 0:
            print(json.dumps(figures), file=output)
    return 0


def plan_task(flags: argparse.Namespace, data: DataConfig, loaded: Pretrained) -> Task:
    """What the flags ask for; what they leave open is as the run itself did it, if these are its data."""
    run = _read_run(flags.checkpoint)
    length = flags.sequence_length
    require(length is None or length >= 2, f"--sequence_length={length} must be at least 2")
    length = length or min(loaded.config.train.sequence_length, _LONGEST_ROW)
    count = flags.num_sequences
    require(count is None or count >= 1, f"--num_sequences={count} must be at least 1")
    if run is None or run.data.path != data.path:
        return Task(data, flags.part or "all", flags.chat, length, count)
    part = flags.part or "held_out"
    data = run.data if data == DataConfig(path=data.path) else data
    count = count or (run.train.eval_sequences if part == "held_out" else None)
    return Task(data, part, flags.chat or run.is_chat, length, count)


def score(loaded: Pretrained, task: Task, processes: Processes) -> dict[str, Any]:
    """The figures: nats per token and their exponential, bits per byte of text, routing; and what they are of.

    Raises:
        ConfigError: there is nothing to read, or no tokenizer to read it with, or the processes read other data.
    """
    tokenizer = find_tokenizer(loaded.tokenizer, task.data, loaded.config.model.vocab_size)
    is_shown = processes.index == 0
    stores = _open_stores(task, tokenizer, is_shown)
    long_documents = task.data.chat.long_rows if task.is_chat else "split"
    plans = [plan_rows(store, task.sequence_length, long_documents=long_documents) for store in stores]
    said = " and ".join(name_data(plan.fingerprint) for plan in plans)
    require_same(processes, "data", said, SAME_DATA)
    num_rows = sum(plan.num_rows for plan in plans)
    require(num_rows, f"data.path={task.data.path} gives no row to score")
    note(
        f"scoring {task.part} of {task.data.path}: {num_rows:,} rows of {task.sequence_length} tokens",
        is_shown=is_shown,
    )
    start = time.monotonic()
    batches = _iterate_batches(loaded, task, stores, plans, is_shown)
    with jax.set_mesh(loaded.mesh), jax.default_matmul_precision(matmul_precision(loaded.config.model.dtype)):
        figures = make_evaluator(batches, TokenBytes.of(tokenizer))(loaded.model)
    note(f"scored {figures['eval/tokens']:,} tokens in {time.monotonic() - start:.1f} s", is_shown=is_shown)
    figures = {name.removeprefix("eval/"): value for name, value in figures.items()}
    return figures | {"data": task.data.path, "part": task.part, "sequence_length": task.sequence_length}


def _open_stores(task: Task, tokenizer: Tokenizer, is_shown: bool) -> list[TokenStore]:
    note(f"reading {task.data.path} (tokenised the first time, then cached) ...", is_shown=is_shown)
    prepared = prepare_chats(task.data, tokenizer) if task.is_chat else tokenize_text(task.data, tokenizer)
    return [prepared.held_out] if task.part == "held_out" else [prepared.train, prepared.held_out]


def _iterate_batches(
    loaded: Pretrained, task: Task, stores: list[TokenStore], plans: list[PackPlan], is_shown: bool
) -> Iterable[Batch]:
    """Some or all rows of each store, with a bar in a terminal."""
    devices = loaded.model.rules.count_row_devices(loaded.mesh)
    batch_size = devices * max(1, _TOKENS_AT_ONCE // task.sequence_length)
    num_rows = sum(plan.num_rows for plan in plans)
    counts = [math.ceil((task.num_sequences or num_rows) * plan.num_rows / num_rows) for plan in plans]
    layout = {"batch_size": batch_size, "mesh": loaded.mesh, "rules": loaded.model.rules}
    batches = itertools.chain.from_iterable(
        spread_batches(store, plan, num_sequences=count, **layout)
        for store, plan, count in zip(stores, plans, counts, strict=True)
    )
    total = sum(math.ceil(min(count, plan.num_rows) / batch_size) for plan, count in zip(plans, counts, strict=True))
    console = Console(file=sys.stderr)
    return track(
        batches, "scoring", total, console=console, transient=True, disable=not (is_shown and console.is_terminal)
    )


def _read_run(checkpoint: Path) -> _Trained | None:
    """What made the checkpoint, if it is a run's workdir or one of its steps."""
    for folder in (checkpoint, *checkpoint.absolute().parents[1:2]):  # A folder of the root has one parent.
        if (folder / "config.json").is_file() and (folder / "checkpoints").is_dir():
            saved = read_object(folder / "config.json")
            data = build(DataConfig, saved.get("data", {}), "data.")
            train = build(TrainConfig, saved.get("train", {}), "train.")
            return _Trained(data, train, bool(saved.get("finetune")))
    return None
