"""A message names only flags that the verb which prints it takes, so its hint can be followed."""

import ast
import contextlib
import dataclasses
import io
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mixtral_jax
from mixtral_jax.cli.flags import parse_run_flags
from mixtral_jax.cli.main import VERBS, run_verb
from mixtral_jax.cli.tune_flags import parse_tuning_flags
from mixtral_jax.config import Config, ConfigError
from tests.data.chat_cases import train_tokenizer

ROOT = Path(mixtral_jax.__file__).parent
SCRIPTS = {"train": parse_run_flags, "tune": parse_tuning_flags}
RUNS = [*SCRIPTS, "ablate"]
WITH_CONFIG = [*RUNS, "plan", "doctor", "bench"]
WITH_DATA = ["evaluate", "analyze"]
WITH_MODEL = ["generate", "chat", *WITH_DATA]
ROWS = ["data validate", "data inspect"]
JOINED = [*RUNS, "doctor", "import", *WITH_MODEL]
# The verbs that can print the messages of a module that several of them use.
PRINTED_BY = {
    "bench/generate": ["bench"],
    "bench/layer": ["bench"],
    "bench/train": ["bench"],
    "checkpoint/export": ["export"],
    "checkpoint/formats/tokenizer_json": ["export"],  # The message names this verb.
    "cli/data_inspect": ["data inspect"],
    "cli/data_rows": ROWS,
    "cli/data_validate": ["data validate"],
    "cli/model_flags": ["generate", "chat"],
    "cli/plan_tables": ["plan"],
    "cli/task_flags": WITH_DATA,
    "cli/tune_flags": ["tune"],
    "config/files": WITH_CONFIG,
    "config/mapping": WITH_CONFIG,
    "data/packing": ["data validate"],  # The message names this verb.
    "data/tokenizer": WITH_CONFIG,
    "lab/ablation/definition": ["ablate"],
    "parallel/coordinator": JOINED,
    "parallel/processes": JOINED,
    "parallel/schedulers": JOINED,
    "plan/estimate": ["plan"],
    "plan/topology": ["plan"],
    "runs/ablation": ["ablate"],
    "runs/eval_data": WITH_DATA,
    "runs/examine": ["doctor"],
    "runs/resume": RUNS,
    "runs/workdir": [*RUNS, "doctor"],
    "training/loop": RUNS,
    "training/metrics": RUNS,
}
OF_ONE_VERB = {f"cli/{file}": [verb] for verb, file in VERBS.items()}
# They make parsers for several verbs; git, and styles of a page, have flags of their own.
OTHERS = {"cli/flags", "cli/main", "runs/commit", "lab/report/page"}
SECTIONS = "|".join(field.name for field in dataclasses.fields(Config))
# A key of a config without the flag that sets it.
BARE_KEY = re.compile(rf"(?<![\w.\-/])(?:{SECTIONS})\.[a-z_.]*[a-z]")
FLAG = re.compile(r"--[a-z][a-z_]*(?:\.[a-zA-Z_.]*)?")


def find_flags(source: str) -> Iterator[str]:
    """The flags in the texts of a module, but for its docstrings."""
    nodes = list(ast.walk(ast.parse(source)))
    alone = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield from FLAG.findall(node.value)


NAMED = {
    module: flags
    for path in ROOT.rglob("*.py")
    if (flags := set(find_flags(path.read_text("utf-8"))))
    and (module := str(path.relative_to(ROOT).with_suffix(""))) not in OTHERS
}


def help_of(verb: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        if verb in SCRIPTS:
            parse: Callable[..., Any] = SCRIPTS[verb]
            parse(["--help"], description="", default_config="")
        else:
            run_verb([*verb.split(), "--help"])
    return printed.getvalue()


def has_key(kind: Any, key: str) -> bool:
    """Whether a dotted key is one of a config class, or of an optional one; `KEY` is any."""
    if not dataclasses.is_dataclass(kind):
        return any(has_key(part, key) for part in typing.get_args(kind))
    name, _, rest = key.partition(".")
    hints = typing.get_type_hints(kind)
    return name in ("", "KEY") or (name in hints and (not rest or has_key(hints[name], rest)))


def takes(text: str, flag: str) -> bool:
    """Whether a verb with this help takes the flag."""
    name, dot, key = flag.partition(".")
    if dot:
        section = "" if name == "--config" else name.removeprefix("--") + "."
        return f"{name}.KEY" in text and has_key(Config, section + key)
    return flag in FLAG.findall(text)


@pytest.mark.parametrize("module", NAMED)
def test_each_verb_that_prints_a_message_takes_the_flags_in_it(module):
    for verb in (PRINTED_BY | OF_ONE_VERB)[module]:
        text = help_of(verb)
        assert [flag for flag in sorted(NAMED[module]) if not takes(text, flag)] == [], verb


def test_the_table_lists_the_modules_that_name_flags_and_tells_flags_apart():
    assert PRINTED_BY.keys() == NAMED.keys() - OF_ONE_VERB.keys()
    text = help_of("evaluate")
    for flag in ("--part", "--data.path", "--data.chat.format", "--mesh.expert", "--data."):
        assert takes(text, flag), flag
    for flag in ("--workdir", "--par", "--config.data.path", "--data.paths", "--mesh.path"):
        assert not takes(text, flag), flag


@pytest.mark.parametrize("verb", ROWS)
@pytest.mark.parametrize(
    "asked",
    [
        ["nowhere"],
        ["empty"],
        ["only_test"],
        ["text.md"],
        ["*.zip"],
        ["text.md:0"],
        ["empty,empty"],
        ["gs://bucket/x"],
        [""],
        ["rows.jsonl", "--fields=question:users"],
        ["rows.jsonl", "--fields=question:user", "--format=alpaca"],
        ["rows.jsonl", "--tokenizer=nowhere"],
    ],
)
def test_an_error_of_a_verb_without_a_config_names_its_arguments(
    tmp_path, monkeypatch, verb, asked
):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "only_test"):
        (tmp_path / folder).mkdir()
    for file in ("only_test/test.jsonl", "rows.jsonl", "text.md"):
        (tmp_path / file).write_text('{"messages": []}')
    tokenizer = [] if len(asked) > 1 else ["--tokenizer=tokenizer.model"]
    train_tokenizer().save(tmp_path / "tokenizer.model")
    with pytest.raises(ConfigError) as error:
        run_verb([*verb.split(), *asked, *tokenizer])
    assert BARE_KEY.findall(str(error.value)) == []
    assert BARE_KEY.findall("data.path=x; set data.suffixes, or --data.suffixes") == [
        "data.path",
        "data.suffixes",
    ]
