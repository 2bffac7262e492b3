"""How many experts should a token visit? One, two (Mixtral) or four, of eight.

Not the same work: compare the losses against FLOPs too. Expect more experts to learn more by token, and less by FLOP.
About ten minutes.

    python -m mixtral_jax ablate --config=configs/ablations/top_k.py --workdir=DIR
"""

from typing import Any

from configs.ablations import balance


def get_config() -> dict[str, Any]:
    ablation = balance.get_config()
    chosen = "router.num_experts_per_token"
    arms = {"top-1": {chosen: 1}, "top-2": {}, "top-4": {chosen: 4}}
    return {**ablation, "question": "How many experts should a token visit?", "arms": arms, "reference": "top-2"}
