"""From a config to packed batches of conversations on the mesh, telling people what was found."""

import dataclasses
import hashlib
import time

from mixtral_jax.runs.text_data import SAME_DATA, PackedStores, TrainingData, name_data, pack_stores
from mixtral_jax.runs.run import Run
from mixtral_jax.data.chat.template import ChatTemplate
from mixtral_jax.data.chat.chats import PreparedChats, Question, pick_questions, prepare_chats
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.evaluate.perplexity import TokenBytes, make_evaluator
from mixtral_jax.parallel.agreement import require_same

_NUM_QUESTIONS = 64


@dataclasses.dataclass(frozen=True)
class ChatData(TrainingData):
    """What an instruct tuning reads: rows of whole conversations, whose loss mask is 1 on answers
    and their EOS.

    Attributes:
        questions: held-out questions and the answers there should be, at most 64, as ids.
        template: for more questions.
        tokenizer: of the model that is tuned.
    """

    questions: list[Question]
    template: ChatTemplate
    tokenizer: Tokenizer


def open_chat(run: Run, tokenizer: Tokenizer) -> ChatData:
    """Reads, tokenises and packs the conversations that the config names; prints what there is and
    what was left out.

    Args:
        tokenizer: of the model that is tuned; it is written into the workdir.

    Raises:
        ConfigError: nothing to read, too many bad rows, or settings that do not fit; or the
            processes read other data.
    """
    data, say = run.config.data, run.console.print
    say(f"reading {data.path} (tokenised the first time, then cached) ...")
    start = time.monotonic()
    if run.is_writer:
        tokenizer.save(run.workdir / "tokenizer.model")
    chats = prepare_chats(data, tokenizer)
    packed = pack_stores(run, chats.train, chats.held_out, long_documents=data.chat.long_rows)
    for line in _describe(chats, packed, data.chat.long_rows):
        say(line)
    say(
        f"[bold]held out[/]    {chats.held_out.num_documents:,} conversations, "
        f"{len(chats.held_out.tokens):,} tokens; "
        f"read in {time.monotonic() - start:.0f} s"
    )
    parts = (packed.fingerprint, tokenizer.fingerprint, chats.template.version)
    fingerprint = hashlib.sha256(" ".join(parts).encode()).hexdigest()
    # The base is asked about them before training compares where it stands.
    require_same(run.processes, "conversations", name_data(fingerprint), SAME_DATA)
    return ChatData(
        packed.train_batches,
        make_evaluator(packed.held_out, TokenBytes.of(tokenizer)),
        fingerprint,
        pick_questions(chats.held_out, _NUM_QUESTIONS),
        chats.template,
        tokenizer,
    )


def _describe(chats: PreparedChats, packed: PackedStores, long_rows: str) -> list[str]:
    """A line on what there is to train on, and one on what was left out of it."""
    plan = packed.plan
    lines = [
        f"[bold]chats[/]       {chats.train.num_documents:,} conversations in template "
        f"{chats.template.version}: "
        f"{plan.lengths.sum():,} tokens, {plan.num_supervised.sum():,} of them to be learnt, "
        f"in {plan.num_rows:,} rows, {packed.num_epochs:.2f} epochs"
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
    return lines
