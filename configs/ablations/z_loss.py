"""Does a z-loss on the router's logits help? Weights of 0, 1e-4, 1e-3 and 1e-2.

Expect smaller logits (logit RMS, gate entropy) and hardly another loss at this size: it is there
for the stability of long runs in bfloat16 (arXiv 2202.08906). About ten minutes.

    python -m mixtral_jax ablate --config=configs/ablations/z_loss.py --workdir=DIR
"""

from typing import Any

from configs.ablations import balance


def get_config() -> dict[str, Any]:
    ablation = balance.get_config()
    weight = "router.z_loss_weight"
    arms = {
        "none": {weight: 0.0},
        "1e-4": {weight: 1e-4},
        "1e-3": {weight: 1e-3},
        "1e-2": {weight: 1e-2},
    }
    return {
        **ablation,
        "question": "Does a z-loss on the router's logits help?",
        "arms": arms,
        "reference": "none",
    }
