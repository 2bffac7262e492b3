"""Fields that change what a row, a message or a chunk means, and that no format can express.

A row that fills one of them is bad. All other fields that no format reads change nothing that is
learnt: they are counted, and named to whoever reads the data.
"""

import dataclasses
import itertools
from collections.abc import Collection, Mapping
from typing import Any

from mixtral_jax.data.field_names import fold_name, is_filled
from mixtral_jax.data.marks import TOKEN_MARKS

_MEDIA = " ".join(
    map(
        "_".join,
        itertools.product(
            ("image", "img", "audio", "video"), ("url", "path", "file", "bytes", "base64")
        ),
    )
)
_NO_TOOLS = "tools are not supported by any template"
# The rule that they break -> fields of rows, messages and chunks.
_REFUSED = {
    _NO_TOOLS: (
        "tools available_tools tool_calls tool_call_id tool_choice tool_results tool_responses "
        "functions function_call"
    ),
    "only text is read, not what is attached to it": (
        f"image images img imgs picture pictures audio audios video videos {_MEDIA} "
        "input_audio input_image pixel_values media file_ids files attachments documents"
    ),
    "preference data are not supported, because all answers of a row are learnt": (
        "chosen rejected chosen_response rejected_response chosen_messages rejected_messages "
        "preferred_output non_preferred_output preference preferred is_preferred desirable "
        "is_desirable kto_tag label"
    ),
    "no template has a place for reasoning beside an answer": (
        "reasoning reasoning_content reasoning_details thinking thoughts channel"
    ),
    "messages are learnt whole or not at all": (
        f"{' '.join(TOKEN_MARKS)} labels train_detail training_detail"
    ),
    "a system prompt must be in the field system or system_prompt": (
        "system_message system_msg system_text system_instruction system_instructions "
        "instructions preamble"
    ),
    "an answer must be in its content": "refusal",
}
# Field -> the rule that a row of any format breaks by it.
REFUSED = {name: rule for rule, names in _REFUSED.items() for name in names.split()}
# The same for fields that belong to a question, where the question is a field beside them.
_OF_QUESTIONS = (
    "context contexts passage passages knowledge background history input choices options prefix "
    "suffix"
)
QUESTION_PARTS: dict[str, str] = dict.fromkeys(
    _OF_QUESTIONS.split(), "this field may belong to the question, but it is not read"
)
# The same rules, as `find_refused` takes them.
ROW_RULES = {fold_name(name): rule for name, rule in REFUSED.items()}
QUESTION_RULES = {fold_name(name): rule for name, rule in QUESTION_PARTS.items()}


@dataclasses.dataclass(frozen=True)
class Refused:
    """A field that breaks a rule; `is_of_tools`: whether it is the rule about tools."""

    name: str
    rule: str
    is_of_tools: bool


def find_refused(
    fields: Mapping[Any, Any],
    rules: Mapping[str, str],
    read: Collection[str] = (),
    *,
    allows_classes: bool = False,
) -> Refused | None:
    """The first filled field that breaks one of `rules` and is not in `read`; None if none does.

    Args:
        rules: what all spellings of a name have in common (`fold_name`) -> its rule.
        allows_classes: whether a label that is no boolean is the class of a text. Beside an answer
            it may be a judgement of it.
    """
    for name, value in fields.items():
        rule = rules.get(fold_name(name))
        if rule is None or name in read or not is_filled(value):
            continue
        is_class = fold_name(name) == "label" and str(value).lower() not in ("true", "false")
        if not (allows_classes and is_class):
            return Refused(str(name), rule, rule == _NO_TOOLS)
    return None
