"""Writes the README.md of an exported folder: what the model is, and how to load it."""

import math

from mixtral_jax.checkpoint.weights import Weights

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- mixtral
- moe
- mixtral_jax
---

# A Mixtral of {total} parameters

A sparse mixture of experts: {layers} layers, each with {experts} experts, of which each token
uses {chosen}, so that {active} parameters are active per token. Exported by mixtral_jax from
{source}{tokens}.

| | |
| --- | --- |
| hidden size | {hidden:,} |
| hidden size of an expert | {intermediate:,} |
| query heads, key-value heads, head size | {heads}, {kv_heads}, {head_dim} |
| vocabulary size | {vocab:,} |
| context length | {context:,} |
| base of rotary positions | {theta:,.0f} |
| dtype of the weights | {dtype} |

```python
from transformers import AutoModelForCausalLM{tokenizer_import}

model = AutoModelForCausalLM.from_pretrained(FOLDER){tokenizer_line}
```

vLLM and SGLang load the same folder.
"""


def make_model_card(weights: Weights) -> str:
    """The text of the model card."""
    model, router = weights.architecture.model, weights.architecture.router
    total = weights.num_parameters
    in_experts = sum(
        math.prod(stored.shape)
        for name, stored in weights.parameters.items()
        if "/experts/" in name
    )
    num_unused = model.num_experts - router.num_experts_per_token
    tokens = weights.record.get("tokens")
    return _CARD.format(
        total=_round(total),
        active=_round(total - in_experts * num_unused // model.num_experts),
        layers=model.num_layers,
        experts=model.num_experts,
        chosen=router.num_experts_per_token,
        source=weights.source,
        tokens=f", after {tokens:,} tokens" if tokens else "",
        hidden=model.hidden_size,
        intermediate=model.intermediate_size,
        heads=model.num_heads,
        kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        vocab=model.vocab_size,
        context=weights.architecture.context_length,
        theta=model.rope_theta,
        dtype=model.param_dtype,
        tokenizer_import=", AutoTokenizer" if weights.tokenizer else "",
        tokenizer_line="\ntokenizer = AutoTokenizer.from_pretrained(FOLDER)"
        if weights.tokenizer
        else "",
    )


def _round(number: int) -> str:
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number:,}"
