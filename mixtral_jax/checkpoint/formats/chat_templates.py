"""The chat templates of Mixtral Instruct in Jinja, for tokenizer_config.json.

With the tokenizer.json that `tokenizer_json` writes, they give the same ids as the templates of
mistral-common: v1 (8x7B) and v3 (8x22B). One difference remains: control pieces written out in a
message, such as `</s>`, become control ids, as in every tokenizer of transformers. We never run
these templates; transformers does, in exported folders.
"""

from typing import Literal

from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.data.vocabulary import read_vocabulary

# Joins system messages, merges adjacent messages of one role, and puts an empty question before a
# chat that begins with an answer.
_TURNS = r"""
{%- set system = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') -%}
{%- set system = system | select | join('\n\n') -%}
{%- set chat = namespace(turns=[]) -%}
{%- for message in messages if message['role'] != 'system' -%}
    {%- set role, text = message['role'], message['content'] -%}
    {%- if role not in ('user', 'assistant') -%}
        {{- raise_exception('the roles are system, user and assistant, not ' + role) -}}
    {%- endif -%}
    {%- if chat.turns and chat.turns[-1][0] == role -%}
        {%- set text = [chat.turns[-1][1], text] | select | join('\n\n') -%}
        {%- set chat.turns = chat.turns[:-1] + [(role, text)] -%}
    {%- else -%}
        {%- if not chat.turns and role == 'assistant' -%}
            {%- set chat.turns = [('user', '')] -%}
        {%- endif -%}
        {%- set chat.turns = chat.turns + [(role, text)] -%}
    {%- endif -%}
{%- endfor -%}
{{- bos_token -}}
{%- for role, text in chat.turns -%}
"""
# In v1 [INST] is text, so a space separates it from the texts around it.
_V1 = r"""
    {%- if role == 'user' -%}
        {{- '[INST] ' + (system + '\n\n' if system and loop.first else '') + text + ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + text + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""
# In v3 [INST] is a control piece, and the tokenizer puts a space after it. The system text goes
# into the last question.
_V3 = r"""
    {%- if role == 'user' -%}
        {%- set is_last = loop.last or loop.revindex == 2 -%}
        {{- '[INST]' + (system + '\n\n' if system and is_last else '') + text + '[/INST]' -}}
    {%- else -%}
        {{- text + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""
CHAT_TEMPLATES: dict[Literal["v1", "v3"], str] = {"v1": _TURNS + _V1, "v3": _TURNS + _V3}


def find_version(tokenizer: Tokenizer) -> Literal["v1", "v3"]:
    """The version of the chat template: v3 if the tokenizer has its control pieces, else v1."""
    control_pieces = set(read_vocabulary(tokenizer).find("control"))
    return "v3" if {"[INST]", "[/INST]"} <= control_pieces else "v1"
