"""Mixtral 8x7B from scratch on 64 chips of TPU v5p (4x4x4), experts over 8 of them and every weight
over the others.

64 rows of 4,096 tokens a step, one a chip; 32,000-piece tokenizer (`pip install
'mixtral_jax[mistral]'`). Never run on that hardware: the sizes and the mesh are checked, the
learning rate and the speed are not. Name your text, and a workdir that every host sees; run on
every host:

    python train.py --config=configs/pretrain/mixtral_8x7b_v5p.py --config.data.path=TEXT
    --workdir=DIR
"""

from ml_collections import ConfigDict

from configs import models


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": models.mixtral_8x7b(),
            "mesh": {"fsdp": 8, "expert": 8},
            "data": {"path": "TEXT", "tokenizer": "mixtral"},
            "optimizer": {"learning_rate": 3e-4, "warmup_fraction": 0.02},
            "train": {
                "num_steps": 100_000,
                "batch_size": 64,
                "sequence_length": 4096,
                "eval_every": 1000,
            },
            "checkpoint": {"every": 500},
        }
    )
