"""The text that a model is evaluated or analysed on, in rows on the mesh."""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import jax

from mixtral_jax.checkpoint.files.foreign_folder import read_object
from mixtral_jax.config import (
    ConfigError,
    DataConfig,
    TrainConfig,
    build,
    changed_keys,
    local_path,
    names_existing,
    require,
)
from mixtral_jax.data.batches import spread_batches
from mixtral_jax.data.chat.prepare import prepare_chats
from mixtral_jax.data.field_names import describe_unread
from mixtral_jax.data.packing import PackPlan, plan_rows
from mixtral_jax.data.store import TokenStore
from mixtral_jax.data.text import PreparedText, tokenize_text
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.evaluate.perplexity import TokenBytes, make_evaluator
from mixtral_jax.parallel.agreement import require_same
from mixtral_jax.parallel.batch import Batch
from mixtral_jax.parallel.mesh import matmul_precision
from mixtral_jax.parallel.processes import Processes
from mixtral_jax.pretrained import Pretrained
from mixtral_jax.runs.console import note, show_progress
from mixtral_jax.runs.text_data import SAME_DATA, describe_reading, find_tokenizer, name_data

Part = Literal["held_out", "all"]
# Tokens of a row, unless the run was trained on shorter ones.
DEFAULT_SEQUENCE_LENGTH = 2048
# Keys of data that do not decide which documents a run holds out.
_KEEP_HELD_OUT = tuple(
    f"data.{key} " for key in ("tokenizer", "domain_field", "max_bad_fraction", "chat.long_rows")
)
# Tokens that a device reads at once.
TOKENS_PER_DEVICE = 2048


@dataclasses.dataclass(frozen=True)
class EvalTask:
    """What is read: which part of which data, cut into rows of which length, how many of them.

    Attributes:
        num_sequences: rows to read, spread evenly over the data; None reads all.
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
    """Stores packed into rows, some of which are read.

    Attributes:
        counts: the number of rows that are read of each store.
        batch_size: rows of a batch, over all devices.
    """

    tokenizer: Tokenizer
    stores: list[TokenStore]
    plans: list[PackPlan]
    counts: list[int]
    batch_size: int

    @property
    def num_batches(self) -> int:
        """The number of batches of all stores."""
        return sum(math.ceil(count / self.batch_size) for count in self.counts)

    def describe(self, task: EvalTask) -> str:
        """How many rows of how many are read, and of what."""
        num_rows, num_read = sum(plan.num_rows for plan in self.plans), sum(self.counts)
        rows = f"{num_rows:,}" if num_read == num_rows else f"{num_read:,} of {num_rows:,}"
        part = task.part if task.data.held_out is None else f"{task.part} ({task.data.held_out})"
        return f"{part} of {task.data.path}: {rows} rows of {task.sequence_length} tokens"


def plan_task(
    run: TrainedRun | None,
    data: DataConfig,
    loaded: Pretrained,
    *,
    part: Part | None,
    is_chat: bool,
    sequence_length: int | None,
    num_sequences: int | None,
) -> EvalTask:
    """The task that was asked for; None is filled in.

    If `data` are those that `run`, which made the checkpoint, was trained on, the held-out part is
    read, in as many rows as the run reads; else all of the data are.

    Raises:
        ConfigError: a number is out of range, or a held-out part is asked for that may hold
            documents which the model was trained on: that of other data than the run's own, or of
            those by other settings.
    """
    length, count = sequence_length, num_sequences
    require(length is None or length >= 2, f"--sequence_length={length} must be at least 2")
    require(count is None or count >= 1, f"--num_sequences={count} must be at least 1")
    length = length or min(loaded.config.train.sequence_length, DEFAULT_SEQUENCE_LENGTH)
    if run is None or run.data.path != data.path:
        _require_known_held_out(run, data, part)
        return EvalTask(data, part or "all", is_chat, length, count)
    part = part or "held_out"
    if part == "held_out":
        _require_same_held_out(run.data, data)
    count = count or (run.train.eval_sequences if part == "held_out" else None)
    return EvalTask(data, part, is_chat or run.is_chat, length, count)


def names_same_data(one: str, other: str) -> bool:
    """True if two values of `data.path` are equal, or name the same file or folder."""
    if one == other:
        return True
    if not (names_existing(one) and names_existing(other)):
        return False
    return local_path(one, "data.path").samefile(local_path(other, "data.path"))


def _require_known_held_out(run: TrainedRun | None, data: DataConfig, part: Part | None) -> None:
    """Refuses to call a part of other data than the run's own held out: who knows from what?"""
    if part != "held_out" or (run is None and data.held_out is not None):
        return
    who = "the checkpoint is no run's" if run is None else f"the run read data.path={run.data.path}"
    fix = "name data.held_out, or set --part=all"
    if run is not None:
        fix = "set --part=all, or leave out --data.path, with --data.held_out for data of their own"
    raise ConfigError(
        f"--part=held_out: nothing says that part of data.path={data.path} was held out, since "
        f"{who}: {fix}"
    )


def _require_same_held_out(own: DataConfig, data: DataConfig) -> None:
    if data.held_out is not None:  # All of it is read, whatever the run has held out.
        return
    changed = changed_keys(dataclasses.asdict(own), dataclasses.asdict(data), "data.")
    changed = [change for change in changed if not change.startswith(_KEEP_HELD_OUT)]
    require(
        not changed,
        f"{', '.join(changed)}: with this change, what the run held out is another part, with "
        "documents that it was trained on. Leave it out, or set --part=all",
    )


def open_task(loaded: Pretrained, task: EvalTask, processes: Processes) -> PackedText:
    """Reads, tokenizes and packs the text.

    Raises:
        ConfigError: there is nothing to read, or no tokenizer to read it with, or the processes
            read different data.
    """
    length = task.sequence_length
    vocab_size = loaded.config.model.vocab_size
    tokenizer = loaded.tokenizer or find_tokenizer(loaded.side_files, task.data, vocab_size)
    stores = _open_stores(loaded, task, tokenizer, is_shown=processes.index == 0)
    long_documents = task.data.chat.long_rows if task.is_chat else "split"
    plans = [
        plan_rows(store, length, long_documents=long_documents, key="--sequence_length")
        for store in stores
    ]
    names = " and ".join(name_data(plan.fingerprint) for plan in plans)
    require_same(processes, "data", names, SAME_DATA)
    num_rows = sum(plan.num_rows for plan in plans)
    require(num_rows, f"data.path={task.data.path} gives no row to read")
    wanted = task.num_sequences or num_rows
    counts = [min(math.ceil(wanted * plan.num_rows / num_rows), plan.num_rows) for plan in plans]
    num_row_devices = loaded.model.rules.count_row_devices(loaded.mesh)
    batch_size = num_row_devices * max(1, TOKENS_PER_DEVICE // length)
    return PackedText(tokenizer, stores, plans, counts, batch_size)


def iterate_batches(loaded: Pretrained, text: PackedText) -> Iterable[Batch]:
    """The rows that are read of each store, with a bar in a terminal."""
    batches = itertools.chain.from_iterable(
        spread_batches(
            store,
            plan,
            num_sequences=count,
            batch_size=text.batch_size,
            mesh=loaded.mesh,
            rules=loaded.model.rules,
        )
        for store, plan, count in zip(text.stores, text.plans, text.counts, strict=True)
    )
    return show_progress(batches, "scoring", text.num_batches, jax.process_index() == 0)


def score(loaded: Pretrained, task: EvalTask, processes: Processes) -> dict[str, Any]:
    """Loss in nats per token, perplexity, bits per byte and routing, and of what.

    Raises:
        ConfigError: as `open_task`.
    """
    text = open_task(loaded, task, processes)
    is_shown = processes.index == 0
    note(f"scoring {text.describe(task)}", is_shown=is_shown)
    start = time.monotonic()
    evaluate = make_evaluator(iterate_batches(loaded, text), TokenBytes.of(text.tokenizer))
    precision = jax.default_matmul_precision(matmul_precision(loaded.config.model.dtype))
    with jax.set_mesh(loaded.mesh), precision:
        figures = evaluate(loaded.model)
    seconds = time.monotonic() - start
    note(f"scored {figures['eval/tokens']:,} tokens in {seconds:.1f} s", is_shown=is_shown)
    return {
        **{name.removeprefix("eval/"): value for name, value in figures.items()},
        "data": task.data.path,
        "part": task.part,
        **({} if task.data.held_out is None else {"held_out": task.data.held_out}),
        "sequence_length": task.sequence_length,
    }


def read_run(checkpoint: Path) -> TrainedRun | None:
    """The run that made a checkpoint, if that is a run's workdir or one of its steps.

    Raises:
        ConfigError: there is no such folder.
    """
    fix = "name a run, a step of it, or a folder with weights"
    require(checkpoint.is_dir(), f"--checkpoint={checkpoint} is not a folder: {fix}")
    # A step lies two folders below the workdir; a folder of the root has only one parent.
    for folder in (checkpoint, *checkpoint.absolute().parents[1:2]):
        if (folder / "config.json").is_file() and (folder / "checkpoints").is_dir():
            saved = read_object(folder / "config.json")
            data = build(DataConfig, saved.get("data", {}), "data.")
            train = build(TrainConfig, saved.get("train", {}), "train.")
            return TrainedRun(folder, data, train, bool(saved.get("finetune")))
    return None


def _read_text(data: DataConfig, tokenizer: Tokenizer) -> PreparedText:
    try:
        return tokenize_text(data, tokenizer)
    except ConfigError as error:
        if "data.text_field" not in str(error):
            raise
        raise ConfigError(f"{error}; if these are conversations, give --chat") from None


def _open_stores(
    loaded: Pretrained, task: EvalTask, tokenizer: Tokenizer, *, is_shown: bool
) -> list[TokenStore]:
    for line in describe_reading(task.data) if is_shown else ():
        note(line)
    data, chat = task.data, task.data.chat
    if chat.template == "auto":  # As chats with the model do.
        chat = dataclasses.replace(chat, template=loaded.side_files.template)
        data = dataclasses.replace(data, chat=chat)
    prepared = prepare_chats(data, tokenizer) if task.is_chat else _read_text(data, tokenizer)
    if prepared.num_shared:
        note(
            f"{prepared.num_shared:,} of {prepared.held_out.num_documents:,} documents of "
            f"data.held_out={data.held_out} are in data.path={data.path} too: their loss says "
            "little about new text",
            is_shown=is_shown,
        )
    if prepared.unread:
        note(f"not read: {describe_unread(prepared.unread)}", is_shown=is_shown)
    if task.part == "held_out":
        return [prepared.held_out]
    return [prepared.train, prepared.held_out]
