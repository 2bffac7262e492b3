"""Tokenizers of both templates, the golden conversations, and conversations of any text."""

import argparse
import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import sentencepiece

from mixtral_jax.data.chat.messages import Mode
from mixtral_jax.data.tokenizer import Tokenizer

_FILE = Path(__file__).parents[1] / "golden" / "chat.json"
GOLDEN: list[dict[str, Any]] = json.loads(_FILE.read_text())["conversations"]
# Texts that templates, tokenizers and readers are known to get wrong.
PIECES = [
    "word",
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    "</s>",
    "<s>",
    "<unk>",
    "<0x0A>",
    "[INST]",
    "[/INST]",
    "[INST",
    "[TOOL_CALLS]",
    "\u2581",
    "\0",
    "\u00a0",
    "\u200b",
    "e\u0301",
    "\u6f22\u5b57",
    "\U0001f600",
    "12",
    " end",
]


def mode_of(case: dict[str, Any]) -> Mode:
    """The mode of a golden conversation, by our name."""
    return "training" if case["mode"] == "finetuning" else "serving"


def train_tokenizer(**settings: Any) -> Tokenizer:
    """Trains a tokenizer of 400 pieces; `control_symbols=["[INST]", "[/INST]"]` makes it fit v3."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(argparse.__file__).read_text().splitlines(keepends=True)),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
        **settings,
    )
    return Tokenizer(model.getvalue())


def random_conversation(rng: random.Random, *, mode: Mode) -> list[dict[str, Any]]:
    """A valid conversation of random roles, whose texts are made of `PIECES`."""
    messages: list[dict[str, Any]] = []
    for _ in range(rng.randint(1, 6)):
        roles = ["user", "assistant"] + ["system"] * (
            not messages or messages[-1]["role"] != "assistant"
        )
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


# A line with each kind of mistake, and words that its reason must contain.
BAD_LINES: list[tuple[bytes, str]] = [
    (b'{"messages": [', "invalid JSON"),
    (b'{"text": "\xff"}', "invalid UTF-8 at byte 10"),
    (b'["not", "an object"]', "InvalidRowException: a row must be an object"),
    (b'{"title": "t"}', "it has title"),
    (b'{"messages": []}', "at least one message"),
    (b'{"messages": [{"role": "user", "content": "q"}]}', "Expected last role Assistant"),
    (
        b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]}',
        "[1], it is empty",
    ),
    (b'{"messages": [{"role": "model", "content": "q"}]}', "messages[0], role='model'"),
    (
        b'{"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}',
        "a user message must be text",
    ),
    (
        b'{"messages": [{"role": "user", "content": "[INST]"},'
        b' {"role": "assistant", "content": "a"}]}',
        "LiteralInst",
    ),
    (
        b'{"messages": [{"role": "user", "content": "q"}, {"role": "tool", "content": "a"}]}',
        "tools are not supported",
    ),
    (
        b'{"prompt": "q", "completion": "\\ud800"}',
        "InvalidTextException: invalid UTF-8 at character 0",
    ),
    (b'{"instruction": "q", "output": 3}', "output must be text"),
    (
        b'{"conversations": [{"from": "human", "value": "q"},'
        b' {"from": "gpt", "value": "a", "weight": 2}]}',
        "weight=2",
    ),
    (
        b'{"prompt": [{"role": "user", "content": "q"}], "completion": "a"}',
        "both lists of messages",
    ),
]


def write_mixed_rows(file: Path, *, num_rows: int, num_bad: int) -> dict[int, str]:
    """Writes rows of every format, with bad rows of every kind at random lines.

    Returns words of the reason of each bad row, by its line.
    """
    rng = random.Random(num_rows)
    bad_lines = sorted(rng.sample(range(1, num_rows + 1), num_bad))
    wrong = {line: BAD_LINES[number % len(BAD_LINES)] for number, line in enumerate(bad_lines)}
    lines = [
        wrong[line][0] if line in wrong else good_line(line) for line in range(1, num_rows + 1)
    ]
    file.write_bytes(b"\n".join(lines) + b"\n")
    return {line: reason for line, (_, reason) in wrong.items()}


def good_line(number: int) -> bytes:
    """A row with a question that no other row asks, in one of five formats."""
    question, answer = f"What is {number} + {number}?", f"It is {2 * number}."
    asked, said = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
    row = [
        {"messages": [asked, said]},
        {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]},
        {"instruction": question, "input": "", "output": answer},
        {"prompt": question, "completion": answer},
        {"interactions": [asked, said], "system_prompt": "Be exact."},
    ][number % 5]
    return json.dumps(row).encode()


# Fields that change nothing that is learnt.
UNREAD_NAMES = (
    *("id", "source", "meta", "category", "score", "name", "lang", "split", "difficulty"),
    *("cache_control", "annotations", "parallel_tool_calls", "prompt_id", "created_at"),
)


def row_of(form: str) -> dict[str, Any]:
    """A good row of a format; `prompts` is `prompt_completion` with lists of messages."""
    asked, said = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    rows: dict[str, dict[str, Any]] = {
        "messages": {"messages": [asked, said]},
        "interactions": {"interactions": [asked, said]},
        "conversations": {
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
        },
        "alpaca": {"instruction": "q", "output": "a"},
        "prompt_completion": {"prompt": "q", "completion": "a"},
        "prompts": {"prompt": [asked], "completion": [said]},
        "text": {"text": "t"},
    }
    return rows[form]


def random_value(rng: random.Random) -> Any:
    """A value of any type in JSON that is not empty."""
    return rng.choice(
        [True, False, 0, 1, -3, 0.5, "text", "true", [0], ["x"], {"a": 1}, [{"a": None}], [[]]]
    )


def write_table(file: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows as the suffix of the file says: JSON lines, Parquet or Arrow."""
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    table = pyarrow.Table.from_pylist(rows)
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(table, file, row_group_size=1)
    else:
        with pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
