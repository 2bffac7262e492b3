"""Is a balance bias without a loss as good as a balance loss, or are both together better?

The bias changes which experts are chosen, not their weights, and has no gradient. Expect both the
loss and the bias to keep the load even. The bias moves by 1e-3 per step, so it needs a few hundred
steps. This takes about ten minutes.

    python -m mixtral_jax ablate --config=configs/ablations/bias.py --workdir=ABLATION
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
        "question": "Does a bias keep routing as even as a balance loss, and learn more?",
        "arms": arms,
        "reference": "loss",
    }
