"""Does a shared expert help, which every token visits?

`one-of-two` has a shared expert in place of one of the two routed ones: the work of the reference,
with 9 experts instead of 8. `beside` has it in addition, and does half as much again in experts.
This takes about ten minutes.

    python -m mixtral_jax ablate --config=configs/ablations/shared_expert.py --workdir=ABLATION
"""

from typing import Any

from configs.ablations import balance


def get_config() -> dict[str, Any]:
    ablation = balance.get_config()
    shared, chosen = {"model.num_shared_experts": 1}, "router.num_experts_per_token"
    # The single routed expert needs a weight that is not always 1, or the router learns nothing.
    raw = {"router.score": "softmax", "router.renormalize": False}
    arms = {"none": {}, "one-of-two": {**shared, chosen: 1, **raw}, "beside": shared}
    return {**ablation, "question": "Does a shared expert help?", "arms": arms, "reference": "none"}
