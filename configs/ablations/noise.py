"""Does noise on the router's input or logits help it to explore?

Jitter of 1% on its input, normal noise of 1/E on its logits (V-MoE), or Gumbel noise, which samples
the experts. Expect the last to be evener and to learn less. About ten minutes.

    python -m mixtral_jax ablate --config=configs/ablations/noise.py --workdir=DIR
"""

from typing import Any

from configs.ablations import balance


def get_config() -> dict[str, Any]:
    ablation = balance.get_config()
    noise = "router.noise."
    arms = {
        "none": {},
        "jitter": {noise + "jitter": 1e-2},
        "noisy-top-k": {noise + "noisy_top_k": 1.0},
        "gumbel": {noise + "gumbel": 1.0},
    }
    return {
        **ablation,
        "question": "Does noise in the router help?",
        "arms": arms,
        "reference": "none",
    }
