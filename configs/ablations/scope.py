"""Over which tokens should a balance loss make the load even?

The scopes are a sequence, a micro-batch, and the whole batch. Steps have four micro-batches of two
sequences, so that the three differ. Expect a narrower scope to make routing more even within it,
and to leave experts less room to specialize (arXiv 2501.11873). This takes about fifteen minutes,
because `global` counts routes in an extra forward pass.

    python -m mixtral_jax ablate --config=configs/ablations/scope.py --workdir=ABLATION
"""

from typing import Any

from configs.ablations import balance


def get_config() -> dict[str, Any]:
    ablation = balance.get_config()
    ablation["base"].update({"train": {"gradient_accumulation": 4}})
    scope = "router.load_balance.scope"
    arms = {name: {scope: name} for name in ("sequence", "micro", "global")}
    return {
        **ablation,
        "question": "Over which tokens should a balance loss make the load even?",
        "arms": arms,
        "reference": "micro",
    }
