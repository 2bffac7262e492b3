"""How well a model answers what it was not tuned on: the loss of held-out answers, and ten answers
of its own.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from mixtral_jax.runs.base import Base
from mixtral_jax.runs.chat_data import ChatData
from mixtral_jax.runs.run import Run
from mixtral_jax.runs.workdir import write_json
from mixtral_jax.data.chat.chats import Question
from mixtral_jax.generate.generator import UNSEEN
from mixtral_jax.generate.settings import Settings
from mixtral_jax.pretrained import load_pretrained

NUM_ASKED = 10
_SHOWN = 3
_MAX_NEW_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model said, and whether it ended by itself."""

    text: str
    has_ended: bool


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a model said to `pick_asked` of the held-out questions, and the loss of all held-out
    answers.

    `loss` is in nats a token, `bits_per_byte` of text.
    """

    loss: float
    bits_per_byte: float
    answers: list[Answer]

    @property
    def num_ended(self) -> int:
        """How many answers ended by themselves."""
        return sum(answer.has_ended for answer in self.answers)


def ask(folder: Path, run: Run, data: ChatData) -> Answers:
    """Loads a model, in the dtype that the run computes in, and asks it; all processes call this.

    Raises:
        ConfigError: what `load_pretrained` raises.
    """
    loaded = load_pretrained(folder, run.config.model.dtype, run.mesh)
    prompts = [question.prompt.tolist() for question in pick_asked(data)]
    settings = Settings(max_new_tokens=min(_MAX_NEW_TOKENS, run.config.train.sequence_length))
    *_, continuations = loaded.generator.stream(prompts, settings, tokens_at_once=UNSEEN, is_answer=True)
    with jax.set_mesh(run.mesh):
        figures = data.evaluate(loaded.model)
    answers = [Answer(said.text, said.finish_reason == "stop") for said in continuations]
    return Answers(figures["eval/loss"], figures["eval/bits_per_byte"], answers)


def ask_base(base: Base, run: Run, data: ChatData) -> Answers:
    """What the base says; it is asked once, and `base_answers.json` in the workdir keeps that for
    the same question.
    """
    path = run.workdir / "base_answers.json"
    # A start that never saved may have been of another base, or of other conversations.
    asked = [str(base.folder), base.weights.source, data.fingerprint, run.config.model.dtype]
    kept = json.loads(path.read_text("utf-8")) if run.is_writer and path.exists() else {}
    said = run.processes.share("base answers", kept["said"] if kept.get("asked") == asked else None)[0]
    if said is not None:
        return Answers(**said | {"answers": [Answer(**answer) for answer in said["answers"]]})
    run.console.print("asking the base ...")
    answers = ask(base.folder, run, data)
    if run.is_writer:
        write_json(path, {"asked": asked, "said": dataclasses.asdict(answers)})
    return answers


def compare_with_base(data: ChatData, base: Answers) -> ChatData:
    """The data, whose judge gives the figures of the base beside those of the model."""

    def evaluate(model: Any) -> dict[str, Any]:
        compared = {"eval/loss_base": base.loss, "eval/bits_per_byte_base": base.bits_per_byte}
        return data.evaluate(model) | compared

    return dataclasses.replace(data, evaluate=evaluate)


def report_answers(run: Run, data: ChatData, base: Answers, tuned: Answers) -> None:
    """Prints what changed, with some answers, and writes all of it as `answers.json`."""
    say, count = run.console.print, len(tuned.answers)
    decode = data.tokenizer.decode
    rows = [
        {"question": decode(question.prompt), "expected": decode(question.answer), "base": before.text,
         "tuned": after.text}
        for question, before, after in zip(pick_asked(data), base.answers, tuned.answers, strict=True)
    ]
    for row in rows[:: -(-count // _SHOWN)]:
        say(f"\n[bold]{'question':<12}[/]", end="")
        say(row["question"], markup=False)
        for who in ("expected", "base", "tuned"):
            say(f"[bold]{who:<12}[/]", end="")
            say(" ".join(row[who].split())[:200], markup=False)
    say(
        f"\nheld-out loss on answers: {base.loss:.3f} before, {tuned.loss:.3f} after, "
        f"{tuned.loss / base.loss - 1:+.0%}"
        f"\nended by themselves: {base.num_ended} of {count} answers before, {tuned.num_ended} "
        "after"
    )
    if run.is_writer:
        summary = {
            name: {"loss": said.loss, "bits_per_byte": said.bits_per_byte, "ended": said.num_ended}
            for name, said in (("base", base), ("tuned", tuned))
        }
        write_json(run.workdir / "answers.json", {"asked": count, **summary, "answers": rows})


def pick_asked(data: ChatData) -> list[Question]:
    """The questions that models are asked, spread over those held out."""
    return data.questions[:: max(1, len(data.questions) // NUM_ASKED)][:NUM_ASKED]
