"""Balance by a loss, by a bias without a loss, or by both? The bias moves choices alone and has no
gradient.

Expect both to keep the load even; the bias moves by 1e-3 a step, so it needs some hundred steps.
About ten minutes.

    python -m mixtral_jax ablate --config=configs/ablations/bias.py --workdir=DIR
"""

from typing import Any

from configs.ablations import balance


def get_config() -> dict[str, Any]:
    ablation = balance.get_config()
    weight, rate = "router.load_balance.weight", "router.bias.update_rate"
    arms = {
        "loss": {weight: 1e-2},
        "bias": {weight: 0.0, rate: 1e-3},
        "both": {weight: 1e-2, rate: 1e-3},
        "neither": {weight: 0.0},
    }
    return {
        **ablation,
        "question": "Does a bias without a loss keep routing as even as a balance loss, and does the model learn more?",
        "arms": arms,
        "reference": "loss",
    }
