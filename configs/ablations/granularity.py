"""Many small experts or few large ones? m times the experts of 1/m of the size, m times as many for
each token.

Parameters and work stay the same, but for the router's. Expect finer experts to learn a little more
(arXiv 2401.06066, 2402.07871) and to run slower on a CPU. About fifteen minutes.

    python -m mixtral_jax ablate --config=configs/ablations/granularity.py --workdir=DIR
"""

from typing import Any

from configs.ablations import balance


def get_config() -> dict[str, Any]:
    ablation = balance.get_config()
    m = "model.granularity"
    arms = {"m=1": {}, "m=2": {m: 2}, "m=4": {m: 4}}
    return {
        **ablation,
        "question": "Many small experts, or few large ones?",
        "arms": arms,
        "reference": "m=1",
    }
