r"""Mixtral 8x7B from scratch on 64 chips of TPU v5p (4x4x4).

The experts are sharded over 8 chips, and every weight over the 8 chips of the other axis. A step
has 64 rows of 4,096 tokens, one row per chip. The tokenizer is Mixtral's, with 32,000 pieces, and
needs `pip install -e '.[mistral]'`. This config has never run on that hardware: its sizes and mesh
were checked by compiling, its learning rate and its speed were not. Run this on every host, with
the path of your text and a workdir that all hosts see:

    python train.py --config=configs/pretrain/mixtral_8x7b_v5p.py \
        --config.data.path=TEXT --workdir=RUN
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
