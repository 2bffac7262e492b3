"""How well a model answers what it was not tuned on: held-out loss, and answers of its own."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from mixtral_jax.data.chat.prepare import Question
from mixtral_jax.generate.generator import MAX_TOKENS_AT_ONCE
from mixtral_jax.generate.settings import Settings
from mixtral_jax.pretrained import load_pretrained
from mixtral_jax.runs.base import Base
from mixtral_jax.runs.chat_data import ChatData
from mixtral_jax.runs.run import Run
from mixtral_jax.whole_files import write_json

NUM_QUESTIONS = 10
NUM_PRINTED_ANSWERS = 3
MAX_PRINTED_CHARACTERS = 200
MAX_NEW_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model answered, and whether it ended the answer itself."""

    text: str
    has_ended: bool


@dataclasses.dataclass(frozen=True)
class Answers:
    """A model's answers to `pick_asked`, and its loss on all held-out answers.

    Attributes:
        loss: in nats per token.
        bits_per_byte: per byte of text.
    """

    loss: float
    bits_per_byte: float
    answers: list[Answer]

    @property
    def num_ended(self) -> int:
        """The number of answers that the model ended itself."""
        return sum(answer.has_ended for answer in self.answers)


def ask(folder: Path, run: Run, data: ChatData) -> Answers:
    """Loads a model, in the dtype that the run computes in, and asks it; all processes call this.

    Raises:
        ConfigError: what `load_pretrained` raises.
    """
    loaded = load_pretrained(folder, run.config.model.dtype, run.mesh)
    # A base that came without a tokenizer is asked with the one that the config names.
    loaded = dataclasses.replace(loaded, tokenizer=data.tokenizer)
    prompts = [question.prompt.tolist() for question in pick_asked(data)]
    max_new_tokens = min(MAX_NEW_TOKENS, run.config.train.sequence_length)
    *_, continuations = loaded.generator.stream(
        prompts,
        Settings(max_new_tokens=max_new_tokens),
        tokens_at_once=MAX_TOKENS_AT_ONCE,
        is_answer=True,
    )
    with jax.set_mesh(run.mesh):
        figures = data.evaluate(loaded.model)
    answers = [Answer(each.text, each.finish_reason == "stop") for each in continuations]
    return Answers(figures["eval/loss"], figures["eval/bits_per_byte"], answers)


def ask_base(base: Base, run: Run, data: ChatData) -> Answers:
    """The base's answers, kept in `base_answers.json` of the workdir, so that it is asked once."""
    path = run.workdir / "base_answers.json"
    # An earlier start that saved no step may have had another base, or other conversations.
    read = [data.fingerprint, data.held_out_fingerprint]
    key = [str(base.folder), base.weights.source, *read, run.config.model.dtype]
    kept = json.loads(path.read_text("utf-8")) if run.is_writer and path.exists() else {}
    is_same = kept.get("asked") == key
    answers = run.processes.share("base answers", kept["said"] if is_same else None)[0]
    if answers is not None:
        return Answers(**answers | {"answers": [Answer(**each) for each in answers["answers"]]})
    run.console.print("asking the base ...")
    answers = ask(base.folder, run, data)
    if run.is_writer:
        write_json(path, {"asked": key, "said": dataclasses.asdict(answers)})
    return answers


def compare_with_base(data: ChatData, base: Answers) -> ChatData:
    """The same data, whose evaluation gives the figures of the base beside those of the model."""

    def evaluate(model: Any) -> dict[str, Any]:
        figures = {"eval/loss_base": base.loss, "eval/bits_per_byte_base": base.bits_per_byte}
        return data.evaluate(model) | figures

    return dataclasses.replace(data, evaluate=evaluate)


def report_answers(run: Run, data: ChatData, base: Answers, tuned: Answers) -> None:
    """Prints what changed, with some answers, and writes all of them to `answers.json`."""
    say, count = run.console.print, len(tuned.answers)
    decode = data.tokenizer.decode
    questions = pick_asked(data)
    rows = [
        {
            "question": decode(question.prompt),
            "expected": decode(question.answer),
            "base": before.text,
            "tuned": after.text,
        }
        for question, before, after in zip(questions, base.answers, tuned.answers, strict=True)
    ]
    for row in rows[:: -(-count // NUM_PRINTED_ANSWERS)]:
        say(f"\n[bold]{'question':<12}[/]", end="")
        say(row["question"], markup=False)
        for who in ("expected", "base", "tuned"):
            say(f"[bold]{who:<12}[/]", end="")
            say(" ".join(row[who].split())[:MAX_PRINTED_CHARACTERS], markup=False)
    say(
        f"\nheld-out loss on answers: {base.loss:.3f} before, {tuned.loss:.3f} after, "
        f"{tuned.loss / base.loss - 1:+.0%}\n"
        f"ended by themselves: {base.num_ended} of {count} answers before, {tuned.num_ended} after"
    )
    if run.is_writer:
        summary = {
            name: {
                "loss": answers.loss,
                "bits_per_byte": answers.bits_per_byte,
                "ended": answers.num_ended,
            }
            for name, answers in (("base", base), ("tuned", tuned))
        }
        write_json(run.workdir / "answers.json", {"asked": count, **summary, "answers": rows})


def pick_asked(data: ChatData) -> list[Question]:
    """The questions that models are asked, spread over those held out."""
    return data.questions[:: max(1, len(data.questions) // NUM_QUESTIONS)][:NUM_QUESTIONS]
