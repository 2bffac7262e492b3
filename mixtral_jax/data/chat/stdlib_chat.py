"""Conversations about Python's standard library, made from its docstrings, which need no download.

For each public function and method with a docstring there is one question (what it does, its
signature, or an example) and one conversation with all three. Answers are short, so that a tiny
model can learn their form and when to stop. Rows are in the format `messages`. `split_group` is the
name of the function, so that held-out questions are about functions that are not trained on.
"""

import ast
import dataclasses
import hashlib
import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_Function = ast.FunctionDef | ast.AsyncFunctionDef

_MAX_ANSWER_CHARACTERS = 100
# Packages that are programs or demonstrations rather than a library.
_SKIPPED_PACKAGES = {
    "idlelib",
    "lib2to3",
    "turtledemo",
    "ensurepip",
    "this",
    "antigravity",
    "pydoc",
}
# Decorators of functions that are used as attributes and not called.
_ATTRIBUTES = {"property", "cached_property", "getter", "setter", "deleter"}
_WHAT = ("What does `{0}` do?", "Explain `{0}` in one sentence.", "What is `{0}` for?")
_HOW = (
    "Write the signature of `{0}`.",
    "How is `{0}` called?",
    "What are the parameters of `{0}`?",
)
_EXAMPLE = ("Give an example of `{0}`.", "Show me a call of `{0}`.")
_HOW_THEN, _EXAMPLE_THEN = "And its signature?", "Now an example."


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A function, such as `textwrap.dedent`, and the answers to questions about it."""

    name: str
    purpose: str
    signature: str
    example: str


def make_conversations(root: Path, files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Makes two rows for every function, in the order of files and lines; equal files give equal
    rows.

    Args:
        root: the folder that the module names of the files are relative to.
    """
    for file in files:
        module = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        package, *_ = parts = module.split(".")
        if package not in _SKIPPED_PACKAGES and all(
            part.isidentifier() and not part.startswith("_") for part in parts
        ):
            for entry in _read_module(module, file):
                yield from _ask_about(entry)


def _ask_about(entry: _Entry) -> Iterator[dict[str, Any]]:
    chosen = hashlib.sha256(entry.name.encode()).digest()
    what, how, example = (
        wordings[chosen[number] % len(wordings)].format(entry.name)
        for number, wordings in enumerate((_WHAT, _HOW, _EXAMPLE))
    )
    pairs = [(what, entry.purpose), (how, entry.signature), (example, entry.example)]
    alone = pairs[chosen[-1] % 3]
    together = [(what, entry.purpose), (_HOW_THEN, entry.signature), (_EXAMPLE_THEN, entry.example)]
    for turns in ([alone], together):
        messages = []
        for question, answer in turns:
            messages += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        yield {"messages": messages, "split_group": entry.name}


def _read_module(module: str, file: Path) -> Iterator[_Entry]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return  # Some distributions ship files for other versions of Python.
    seen = set()
    for prefix, node in _find_functions(tree):
        name = f"{module}.{prefix}{node.name}"
        entry = _describe(name, node, is_method=bool(prefix))
        # A name may be defined once per platform: the first definition counts.
        if entry and name not in seen:
            seen.add(name)
            yield entry


def _find_functions(tree: ast.Module) -> Iterator[tuple[str, _Function]]:
    """Finds functions, and methods of public classes with the prefix `Class.`."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from (
                (f"{node.name}.", inner) for inner in node.body if isinstance(inner, _Function)
            )
        elif isinstance(node, _Function):
            yield "", node


def _describe(name: str, node: _Function, *, is_method: bool) -> _Entry | None:
    """Describes a function; None if its docstring is missing, too long, or not a sentence."""
    purpose = _first_sentence(ast.get_docstring(node) or "")
    marks = {ast.unparse(mark).split(".")[-1] for mark in node.decorator_list}
    if node.name.startswith("_") or not purpose or marks & _ATTRIBUTES:
        return None
    is_bound = is_method and "staticmethod" not in marks
    arguments = node.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        argument.annotation = None
    if is_bound:
        del (arguments.posonlyargs or arguments.args)[:1]  # self or cls.
    signature = f"{node.name}({ast.unparse(arguments)})"
    example = f"{_place(name, is_bound=is_bound)}({', '.join(_required(arguments))})"
    if max(len(signature), len(example)) > _MAX_ANSWER_CHARACTERS:
        return None
    return _Entry(name, purpose, f"`{signature}`", f"`{example}`")


def _place(name: str, *, is_bound: bool) -> str:
    """The expression that is called: `module.function`, or `object.method`."""
    *owner, function = name.split(".")
    return f"{owner[-1].lower() if is_bound else owner[-1]}.{function}"


def _required(arguments: ast.arguments) -> list[str]:
    """The arguments that a call must have."""
    positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    named = [
        f"{argument.arg}={argument.arg}"
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        if default is None
    ]
    return [*positional[: len(positional) - len(arguments.defaults)], *named]


def _first_sentence(docstring: str) -> str:
    """Finds the first sentence, on one line; empty if it is too long or not like a sentence."""
    paragraph = " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())
    match = re.match(r"[A-Z][^()\[\]]+?[\w`'\"](?<!e\.g)(?<!i\.e)(?<!etc)\.(?= |$)", paragraph)
    sentence = match.group() if match else ""
    return sentence if 10 <= len(sentence) <= _MAX_ANSWER_CHARACTERS else ""
