"""Does an expert that every token visits help? Instead of one of the two routed, or beside them.

`one-of-two` does the work of the reference with 9 experts in place of 8; `beside` does half as much
again in experts. About ten minutes.

    python -m mixtral_jax ablate --config=configs/ablations/shared_expert.py --workdir=DIR
"""

from typing import Any

from configs.ablations import balance


def get_config() -> dict[str, Any]:
    ablation = balance.get_config()
    shared, chosen = {"model.num_shared_experts": 1}, "router.num_experts_per_token"
    raw = {
        "router.score": "softmax",
        "router.renormalize": False,
    }  # One weight that is always 1 teaches nothing.
    arms = {"none": {}, "one-of-two": {**shared, chosen: 1, **raw}, "beside": shared}
    return {**ablation, "question": "Does a shared expert help?", "arms": arms, "reference": "none"}
