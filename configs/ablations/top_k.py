"""How many experts should a token visit: one, two (as in Mixtral) or four, out of eight?

With one expert, its weight is its softmax over all eight experts, as in Switch Transformer. A
softmax over the chosen expert alone would always be 1, and the router would learn nothing. Arms do
not need the same FLOPs, so compare the losses against FLOPs too. Expect more experts to learn more
per token and less per FLOP. This takes about ten minutes.

    python -m mixtral_jax ablate --config=configs/ablations/top_k.py --workdir=ABLATION
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
