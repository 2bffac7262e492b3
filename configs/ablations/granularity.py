"""Are many small experts better than few large ones?

Granularity m means m times the experts, each 1/m of the size, and m times the experts per token.
Parameters and FLOPs stay the same, except for those of the router. Expect finer experts to learn a
little more (arXiv 2401.06066, 2402.07871) and to run slower on a CPU. This takes about fifteen
minutes.

    python -m mixtral_jax ablate --config=configs/ablations/granularity.py --workdir=ABLATION
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
