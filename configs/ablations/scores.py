"""How should logits become weights? Softmax after or before top-k, renormalised or not, or a
sigmoid.

Softmax before top-k and renormalised is softmax over the chosen, so that is one arm. Without
renormalising, weights start at 1/E each: expect it to begin behind. About ten minutes.

    python -m mixtral_jax ablate --config=configs/ablations/scores.py --workdir=DIR
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
