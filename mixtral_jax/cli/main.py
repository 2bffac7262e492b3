"""`mixtral-jax VERB ...`: finds the verb, and leaves its flags to the verb's own file.

A verb's file has `main(arguments) -> exit code`; the first line of its docstring is its help. The
list of verbs reads that line without importing the file.
"""

import ast
import importlib
from pathlib import Path
from typing import NoReturn

from mixtral_jax.cli.flags import run_command
from mixtral_jax.config import ConfigError

# Verb -> file in this folder.
VERBS = {
    "import": "import_weights",
    "export": "export",
    "generate": "generate",
    "chat": "chat",
    "evaluate": "evaluate",
    "data": "data",
    "analyze": "analyze",
    "ablate": "ablate",
    "bench": "bench",
    "plan": "plan",
    "doctor": "doctor",
}


def main() -> NoReturn:
    """Runs the verb that the command line names, and exits with its code."""
    run_command(run_verb)


def run_verb(arguments: list[str]) -> int:
    """Runs the verb `arguments[0]` with the rest; without a verb, prints the list.

    Raises:
        ConfigError: there is no such verb.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(describe_verbs())
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        raise ConfigError(f"unknown verb {verb!r}; there are: {', '.join(VERBS)}")
    return importlib.import_module(f"mixtral_jax.cli.{VERBS[verb]}").main(rest)


def describe_verbs() -> str:
    """The help text: one line per verb."""
    lines = ["usage: mixtral-jax VERB ...   (mixtral-jax VERB --help lists its flags)", ""]
    for verb, name in VERBS.items():
        source = Path(__file__).with_name(f"{name}.py").read_text()
        docstring = ast.get_docstring(ast.parse(source)) or ""
        lines.append(f"  {verb:<10} {docstring.splitlines()[0]}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
