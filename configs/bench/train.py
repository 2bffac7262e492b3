"""The model with which `bench --train` compares our train step with that of transformers.

95 million parameters, 4 layers of 8 experts, top-2, float32, 2,048 tokens a step, one device. As in
transformers, the backward pass computes nothing again.

    python -m mixtral_jax bench --train --config=configs/bench/train.py
"""

from ml_collections import ConfigDict

from configs import models


def get_config() -> ConfigDict:
    model = models.tiny()
    model.update(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1792,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        remat="none",
    )
    return ConfigDict(
        {"model": model, "train": {"num_steps": 1, "batch_size": 4, "sequence_length": 512}}
    )
