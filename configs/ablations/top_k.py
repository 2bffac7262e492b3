"""How many experts should a token visit? One, two (Mixtral) or four, of eight.

One expert's weight is its softmax over all eight, as in Switch: over the chosen it would always be
1, and the router would learn nothing. Not the same work: compare the losses against FLOPs too.
Expect more experts to learn more by token, and less by FLOP. About ten minutes.

    python -m mixtral_jax ablate --config=configs/ablations/top_k.py --workdir=DIR
"""

from typing import Any

from configs.ablations import balance


def get_config() -> dict[str, Any]:
    ablation = balance.get_config()
    chosen, raw = (
        "router.num_experts_per_token",
        {"router.score": "softmax", "router.renormalize": False},
    )
    arms = {"top-1": {chosen: 1, **raw}, "top-2": {}, "top-4": {chosen: 4}}
    return {
        **ablation,
        "question": "How many experts should a token visit?",
        "arms": arms,
        "reference": "top-2",
    }
