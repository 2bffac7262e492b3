"""Fields that change what a row, a message or a chunk means, and that no format can express.

A row that fills one of them is bad. All other fields that no format reads change nothing that is
learnt: they are counted, and named to whoever reads the data.
"""

from collections.abc import Collection, Mapping
from typing import Any

from mixtral_jax.data.marks import TOKEN_MARKS
from mixtral_jax.data.readers import is_filled

_NO_TOOLS = "tools are not supported by any template"
# The rule that they break -> fields of rows, messages and chunks.
_REFUSED = {
    _NO_TOOLS: (
        "tools available_tools tool_calls tool_call_id tool_choice tool_results tool_responses "
        "functions function_call"
    ),
    "only text is read, not what is attached to it": (
        "image images image_url audio audios input_audio video videos media file_ids files "
        "attachments documents"
    ),
    "preference data are not supported, because all answers of a row are learnt": (
        "chosen rejected chosen_response rejected_response chosen_messages rejected_messages "
        "preferred_output non_preferred_output kto_tag label"
    ),
    "no template has a place for reasoning beside an answer": (
        "reasoning reasoning_content reasoning_details thinking thoughts channel"
    ),
    "messages are learnt whole or not at all": (
        f"{' '.join(TOKEN_MARKS)} labels train_detail training_detail"
    ),
    "a system prompt must be in the field system or system_prompt": (
        "system_message system_instruction system_instructions preamble"
    ),
    "an answer must be in its content": "refusal",
}
# Field -> the rule that a row of any format breaks by it.
REFUSED = {name: rule for rule, names in _REFUSED.items() for name in names.split()}
TOOLS = frozenset(_REFUSED[_NO_TOOLS].split())
# The same for fields that belong to a question, where the question is a field beside them.
_OF_QUESTIONS = (
    "context contexts passage passages knowledge background history input choices options prefix "
    "suffix"
)
QUESTION_PARTS: dict[str, str] = dict.fromkeys(
    _OF_QUESTIONS.split(), "this field may belong to the question, but it is not read"
)


def find_refused(
    fields: Mapping[Any, Any], rules: Mapping[str, str], read: Collection[str] = ()
) -> str | None:
    """The first filled field that breaks one of `rules` and is not in `read`; None if none does."""
    for name, value in fields.items():
        is_known = name not in rules or name in read or not is_filled(value)
        # A label that is no boolean is the class of a text, not a judgement of an answer.
        if not is_known and (name != "label" or str(value).lower() in ("true", "false")):
            return name
    return None


def list_unread(fields: Mapping[Any, Any], read: Collection[str]) -> list[str]:
    """The names of filled fields that are not in `read`."""
    return [str(name) for name, value in fields.items() if name not in read and is_filled(value)]


def describe_unread(unread: Mapping[str, int], max_names: int | None = 20) -> str:
    """Names fields with the number of rows that fill them: `id (10,000 rows), source (9,988)`.

    Args:
        max_names: how many are named, the most frequent first; None names all.
    """
    # A name may not be UTF-8, or be empty, as that of the index that pandas writes into CSV.
    named = {
        name.encode(errors="backslashreplace").decode() or "''": count
        for name, count in unread.items()
    }
    ordered = sorted(named.items(), key=lambda item: (-item[1], item[0]))
    described = [f"{name} ({count:,})" for name, count in ordered[:max_names]]
    described[:1] = [
        f"{name} ({count:,} {'row' if count == 1 else 'rows'})" for name, count in ordered[:1]
    ]
    num_left = len(ordered) - len(described)
    return ", ".join([*described, *([f"and {num_left:,} more"] if num_left else [])])
