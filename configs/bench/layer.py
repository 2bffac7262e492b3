"""The MoE layer with which `bench --layer` compares ours with that of transformers.

2,048 tokens, 8 experts, top-2, float32, one device.

    python -m mixtral_jax bench --layer --config=configs/bench/layer.py
"""

from ml_collections import ConfigDict

from configs import models


def get_config() -> ConfigDict:
    model = models.tiny()
    model.update(hidden_size=512, intermediate_size=1792)
    return ConfigDict(
        {"model": model, "train": {"num_steps": 1, "batch_size": 4, "sequence_length": 512}}
    )
