"""Shows the tokens of every conversation in a file, and which of them are learned."""

import itertools
import json

import numpy as np
from rich.text import Text

from mixtral_jax.cli.data_rows import EncodedRow, leave_the_pipe, make_rows_parser, open_rows
from mixtral_jax.data.readers import BadRow
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.runs.console import make_console


def main(arguments: list[str]) -> int:
    """`data inspect CHATS`: prints the pieces of every row, those that are learned behind a `+`.

    With `--json` it prints one line of JSON per row.
    """
    parser = make_rows_parser("inspect", __doc__)
    parser.add_argument("--json", action="store_true", help="one line of JSON per row")
    flags = parser.parse_args(arguments)
    opened = open_rows(flags, only_supervised=flags.mode == "training")
    assert opened.tokenizer is not None, "tokens are needed"
    console = make_console()
    try:
        for index, row in enumerate(opened.rows):
            if flags.json:
                print(json.dumps(_as_json(index, row)))
            else:
                console.print(_as_text(row, opened.tokenizer))
    except BrokenPipeError:
        leave_the_pipe()
    return 0


def _as_json(index: int, row: EncodedRow | BadRow) -> dict[str, object]:
    if isinstance(row, BadRow):
        return {"index": index, "error": row.reason, "origin": row.origin}
    return {
        "index": index,
        "tokens": row.chat.tokens.tolist(),
        "loss_mask": row.chat.require_mask().tolist(),
    }


def _as_text(row: EncodedRow | BadRow, tokenizer: Tokenizer) -> Text:
    """The pieces in runs of one mask, each on a line of its own."""
    text = Text(row.origin, "bold")
    if isinstance(row, BadRow):
        return text.append(f"\n! {row.reason}", "not bold red")
    tokens, mask = row.chat.tokens, row.chat.require_mask()
    text.append(f"  {len(tokens):,} tokens, {mask.sum():,} to be learnt", "not bold")
    bounds = [0, *(np.flatnonzero(np.diff(mask)) + 1), len(tokens)]
    for first, end in itertools.pairwise(bounds):
        sign, style = ("+", "not bold green") if mask[first] else ("-", "not bold dim")
        text.append(f"\n{sign} {' '.join(tokenizer.pieces(tokens[first:end]))}", style)
    return text
