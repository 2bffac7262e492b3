"""How should the logits of the router become weights?

The arms take a softmax over the chosen experts, a softmax over all experts without
renormalization, or a sigmoid with and without renormalization. A renormalized softmax over all
experts equals the softmax over the chosen ones, so it has no arm. Without renormalization, the
weights of a softmax start at 1/E each: expect this arm to start behind. This takes about ten
minutes.

    python -m mixtral_jax ablate --config=configs/ablations/scores.py --workdir=ABLATION
"""

from typing import Any

from configs.ablations import balance


def get_config() -> dict[str, Any]:
    ablation = balance.get_config()
    score, raw = "router.score", {"router.renormalize": False}
    arms = {
        "softmax-of-chosen": {},
        "softmax-of-all": {score: "softmax", **raw},
        "sigmoid": {score: "sigmoid"},
        "sigmoid-not-renormalised": {score: "sigmoid", **raw},
    }
    return {
        **ablation,
        "question": "How should the router's logits become weights?",
        "arms": arms,
        "reference": "softmax-of-chosen",
    }
