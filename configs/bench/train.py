"""The model with which `bench --train` compares our train step with that of transformers.

95 million parameters, 4 layers of 8 experts, top-2, float32, 2,048 tokens a step, one device. As in
transformers, the backward pass computes nothing again.

    python -m mixtral_jax bench --train --config=configs/bench/train.py
"""

from ml_collections import ConfigDict

from configs.bench import generate


def get_config() -> ConfigDict:
    config = generate.get_config()
    config.update({"model": {"vocab_size": 4096, "remat": "none"}, "train": {"batch_size": 4}})
    return config
