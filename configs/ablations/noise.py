"""Does noise on the input or the logits of the router help it to explore?

The arms add jitter of 1% to the input of the router, normal noise of 1/E to its logits (V-MoE), or
Gumbel noise to its logits, which samples the experts. Expect Gumbel noise to be the most even and
to learn the least. This takes about ten minutes.

    python -m mixtral_jax ablate --config=configs/ablations/noise.py --workdir=ABLATION
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
