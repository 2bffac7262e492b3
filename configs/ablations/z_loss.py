"""Does a z-loss on the logits of the router help? Its weights are 0, 1e-4, 1e-3 and 1e-2.

Expect smaller logits (`logit_rms`, `gate_entropy`) and hardly any difference in loss at this size:
the z-loss is meant to keep long runs in bfloat16 stable (arXiv 2202.08906). This takes about ten
minutes.

    python -m mixtral_jax ablate --config=configs/ablations/z_loss.py --workdir=ABLATION
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
