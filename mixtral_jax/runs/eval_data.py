"""From the flags of a verb that reads text with a model to that text in rows on the mesh."""

import argparse
import dataclasses
import itertools
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

import jax
from rich.console import Console
from rich.progress import track

from mixtral_jax.checkpoint.files.foreign_folder import read_object
from mixtral_jax.runs.text_data import SAME_DATA, find_tokenizer, name_data
from mixtral_jax.cli.model_flags import note
from mixtral_jax.config import DataConfig, TrainConfig, require
from mixtral_jax.config import build
from mixtral_jax.data.batches import spread_batches
from mixtral_jax.data.chat.chats import prepare_chats
from mixtral_jax.data.packing import PackPlan, plan_rows
from mixtral_jax.data.store import TokenStore
from mixtral_jax.data.text import tokenize_text
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.parallel.agreement import require_same
from mixtral_jax.parallel.batch import Batch
from mixtral_jax.parallel.processes import Processes
from mixtral_jax.pretrained import Pretrained

Part = Literal["held_out", "all"]
# Of a row, unless the run was trained on shorter ones; and of the rows that a device reads at once.
_LONGEST_ROW, _TOKENS_AT_ONCE = 2048, 2048


@dataclasses.dataclass(frozen=True)
class Task:
    """What is read: which documents of which data, cut into rows of which length, and how many of
    these.
    """

    data: DataConfig
    part: Part
    is_chat: bool
    sequence_length: int
    num_sequences: int | None


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """What a workdir says of the run that made a checkpoint."""

    workdir: Path
    data: DataConfig
    train: TrainConfig
    is_chat: bool


@dataclasses.dataclass(frozen=True)
class PackedText:
    """Stores packed into rows, of each of which some are read.

    Attributes:
        counts: how many rows of each store.
        batch_size: rows of a batch, over all devices.
    """

    tokenizer: Tokenizer
    stores: list[TokenStore]
    plans: list[PackPlan]
    counts: list[int]
    batch_size: int

    @property
    def num_batches(self) -> int:
        """Of all stores."""
        return sum(math.ceil(count / self.batch_size) for count in self.counts)


def add_task_flags(parser: argparse.ArgumentParser) -> None:
    """Adds what `plan_task` reads."""
    add_flags = parser.add_argument
    add_flags("--chat", action="store_true", help="the data are conversations; `evaluate` scores the answers alone")
    add_flags("--part", choices=get_args(Part), help="by default all; of a run's own data, what it held out")
    add_flags("--sequence_length", type=int, help="of a row; by default the run's own, or 2048")
    add_flags("--num_sequences", type=int, help="of rows, spread evenly; by default what the run evaluates on, or of "
              "other data all (`analyze`: 256)")
    parser.epilog = f"{parser.epilog}; --data.path=F and other --data.KEY=VALUE name the data, as in training"


def plan_task(flags: argparse.Namespace, data: DataConfig, loaded: Pretrained) -> Task:
    """What the flags ask for; what they leave open is as the run itself did it, if these are its
    data.
    """
    run = read_run(flags.checkpoint)
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


def open_task(loaded: Pretrained, task: Task, processes: Processes) -> PackedText:
    """Reads, tokenises and packs the text.

    Raises:
        ConfigError: there is nothing to read, or no tokenizer to read it with, or the processes
            read other data.
    """
    tokenizer = find_tokenizer(loaded.tokenizer, task.data, loaded.config.model.vocab_size)
    stores = _open_stores(task, tokenizer, is_shown=processes.index == 0)
    long_documents = task.data.chat.long_rows if task.is_chat else "split"
    plans = [plan_rows(store, task.sequence_length, long_documents=long_documents) for store in stores]
    said = " and ".join(name_data(plan.fingerprint) for plan in plans)
    require_same(processes, "data", said, SAME_DATA)
    num_rows = sum(plan.num_rows for plan in plans)
    require(num_rows, f"data.path={task.data.path} gives no row to read")
    wanted = task.num_sequences or num_rows
    counts = [min(math.ceil(wanted * plan.num_rows / num_rows), plan.num_rows) for plan in plans]
    devices = loaded.model.rules.count_row_devices(loaded.mesh)
    return PackedText(tokenizer, stores, plans, counts, devices * max(1, _TOKENS_AT_ONCE // task.sequence_length))


def iterate_batches(loaded: Pretrained, text: PackedText) -> Iterable[Batch]:
    """The rows that are read of each store, with a bar in a terminal."""
    layout = {"batch_size": text.batch_size, "mesh": loaded.mesh, "rules": loaded.model.rules}
    batches = itertools.chain.from_iterable(
        spread_batches(store, plan, num_sequences=count, **layout)
        for store, plan, count in zip(text.stores, text.plans, text.counts, strict=True)
    )
    return show_progress(batches, "scoring", text.num_batches)


def show_progress(steps, title: str, total: int):
    """The same steps, with a bar in the terminal of the first process."""
    console = Console(file=sys.stderr)
    is_shown = console.is_terminal and jax.process_index() == 0
    return track(steps, title, total, console=console, transient=True, disable=not is_shown)


def read_run(checkpoint: Path) -> TrainedRun | None:
    """What made the checkpoint, if it is a run's workdir or one of its steps."""
    # A folder of the root has one parent.
    for folder in (checkpoint, *checkpoint.absolute().parents[1:2]):
        if (folder / "config.json").is_file() and (folder / "checkpoints").is_dir():
            saved = read_object(folder / "config.json")
            data = build(DataConfig, saved.get("data", {}), "data.")
            train = build(TrainConfig, saved.get("train", {}), "train.")
            return TrainedRun(folder, data, train, bool(saved.get("finetune")))
    return None


def _open_stores(task: Task, tokenizer: Tokenizer, *, is_shown: bool) -> list[TokenStore]:
    note(f"reading {task.data.path} (tokenised the first time, then cached) ...", is_shown=is_shown)
    prepared = prepare_chats(task.data, tokenizer) if task.is_chat else tokenize_text(task.data, tokenizer)
    return [prepared.held_out] if task.part == "held_out" else [prepared.train, prepared.held_out]
