"""From a config to packed batches of conversations on the mesh; prints what was found."""

import dataclasses
import hashlib
import time
from typing import Literal

from mixtral_jax.data.chat.prepare import PreparedChats, Question, pick_questions, prepare_chats
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.evaluate.perplexity import TokenBytes, make_evaluator
from mixtral_jax.parallel.agreement import require_same
from mixtral_jax.runs.base import saved_steps
from mixtral_jax.runs.run import Run
from mixtral_jax.runs.text_data import (
    SAME_DATA,
    PackedStores,
    TrainingData,
    announce_reading,
    describe_shared,
    name_data,
    name_unread,
    pack_stores,
)

MAX_QUESTIONS = 64


@dataclasses.dataclass(frozen=True)
class ChatData(TrainingData):
    """What an instruct tuning reads: rows of whole conversations.

    The loss mask is 1 on answers and their EOS.

    Attributes:
        questions: at most `MAX_QUESTIONS` held-out questions with their answers, as ids.
        tokenizer: of the model that is tuned.
        template: the version of the chat template, `v1` or `v3`.
    """

    questions: list[Question]
    tokenizer: Tokenizer
    template: Literal["v1", "v3"]


def open_chat(run: Run, tokenizer: Tokenizer) -> ChatData:
    """Reads, tokenizes and packs the conversations that the config names.

    Prints what there is to train on and what was left out.

    Args:
        tokenizer: of the model that is tuned; it is written into the workdir, unless that has a
            checkpoint, whose tokenizer stays.

    Raises:
        ConfigError: there is nothing to read, too many rows are bad, settings do not fit, or the
            processes read different data.
    """
    data, say = run.config.data, run.console.print
    announce_reading(run)
    start = time.monotonic()
    if not saved_steps(run) and run.is_writer:
        tokenizer.save(run.workdir / "tokenizer.model")
    chats = prepare_chats(data, tokenizer)
    packed = pack_stores(run, chats.train, chats.held_out, long_documents=data.chat.long_rows)
    for line in _describe(chats, packed, data.chat.long_rows):
        say(line)
    say(
        f"[bold]held out[/]    {chats.held_out.num_documents:,} conversations, "
        f"{len(chats.held_out.tokens):,} tokens; read in {time.monotonic() - start:.0f} s"
    )
    if chats.num_shared:
        say(describe_shared(chats.num_shared, chats.held_out, "conversations"))
    parts = (packed.fingerprint, tokenizer.fingerprint, chats.template.version)
    fingerprint = hashlib.sha256(" ".join(parts).encode()).hexdigest()
    # Checked now, since the base is asked about these conversations before training starts.
    require_same(run.processes, "conversations", name_data(fingerprint), SAME_DATA)
    return ChatData(
        train_batches=packed.train_batches,
        evaluate=make_evaluator(packed.held_out, TokenBytes.of(tokenizer)),
        fingerprint=fingerprint,
        held_out_fingerprint=packed.held_out_fingerprint,
        questions=pick_questions(chats.held_out, MAX_QUESTIONS),
        tokenizer=tokenizer,
        template=chats.template.version,
    )


def _describe(chats: PreparedChats, packed: PackedStores, long_rows: str) -> list[str]:
    """Describes what there is to train on, what was left out, and which fields were not read."""
    plan = packed.plan
    lines = [
        f"[bold]chats[/]       {chats.train.num_documents:,} conversations in template "
        f"{chats.template.version}: {plan.lengths.sum():,} tokens, "
        f"{plan.num_supervised.sum():,} of them to be learnt, in {plan.num_rows:,} rows, "
        f"{packed.num_epochs:.2f} epochs"
    ]
    long = "cut" if long_rows == "cut" else "dropped"
    left_out = {
        "bad rows": chats.num_bad,
        f"conversations longer than a row ({long})": plan.num_long,
        "without an answer to learn in a row's length": plan.num_unsupervised,
    }
    if any(left_out.values()):
        described = ", ".join(f"{count:,} {what}" for what, count in left_out.items() if count)
        lines.append(f"[bold]left out[/]    {described}")
    if chats.unread:
        lines.append(name_unread(chats.unread))
    return lines
