"""Tokenizers of both templates, the golden conversations, and conversations of any text."""

import argparse
import io
import json
import random
from pathlib import Path
from typing import Any

import sentencepiece

from mixtral_jax.data.messages import Mode
from mixtral_jax.data.tokenizer import Tokenizer

_FILE = Path(__file__).parents[1] / "golden" / "chat.json"
GOLDEN: list[dict[str, Any]] = json.loads(_FILE.read_text())["conversations"]
# What templates, tokenizers and readers are known to stumble over.
PIECES = [
    "word", " ", "  ", "\n", "\t", "\r\n", "</s>", "<s>", "<unk>", "<0x0A>", "[INST]", "[/INST]", "[INST",
    "[TOOL_CALLS]", "\u2581", "\0", "\u00a0", "\u200b", "e\u0301", "\u6f22\u5b57", "\U0001f600", "12", " end",
]  # fmt: skip


def mode_of(case: dict[str, Any]) -> Mode:
    """The mode of a golden conversation, by our name."""
    return "training" if case["mode"] == "finetuning" else "serving"


def train_tokenizer(**settings: Any) -> Tokenizer:
    """One of 400 pieces; `control_symbols=["[INST]", "[/INST]"]` makes it one for v3."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(argparse.__file__).read_text().splitlines(keepends=True)), model_writer=model,
        vocab_size=400, model_type="bpe", byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2, **settings,
    )  # fmt: skip
    return Tokenizer(model.getvalue())


def random_conversation(rng: random.Random, *, mode: Mode) -> list[dict[str, Any]]:
    """A valid conversation of any roles in any order, whose texts are made of `PIECES`."""
    messages: list[dict[str, Any]] = []
    for _ in range(rng.randint(1, 6)):
        roles = ["user", "assistant"] + ["system"] * (not messages or messages[-1]["role"] != "assistant")
        messages.append({"role": rng.choice(roles), "content": random_text(rng)})
    if mode == "training":
        messages.append({"role": "assistant", "content": random_text(rng)})
    elif messages[-1]["role"] == "assistant":
        messages.append({"role": "user", "content": random_text(rng)})
    for message in messages:
        if message["role"] == "assistant" and rng.random() < 0.3:
            message["weight"] = rng.choice([0, 1])
    return messages


def random_text(rng: random.Random) -> str:
    """Text that is not empty."""
    return "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 8)))
