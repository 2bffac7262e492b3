"""The model with which `bench --generate` compares our generation with that of transformers.

4 layers of 8 experts, top-2, float32, prompts of 512 tokens, one device.

    python -m mixtral_jax bench --generate --config=configs/bench/generate.py
"""

from ml_collections import ConfigDict

from configs import models


def get_config() -> ConfigDict:
    model = models.tiny()
    model.update(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1792,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
    )
    return ConfigDict(
        {"model": model, "train": {"num_steps": 1, "batch_size": 1, "sequence_length": 512}}
    )
