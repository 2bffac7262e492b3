r"""Mixtral 8x22B from scratch on 128 chips of TPU v5p (4x4x8, a v5p-256).

A step has 128 rows of 4,096 tokens, one row per chip. This config has never run on that hardware:
its sizes and mesh were checked by compiling, its learning rate and its speed were not. Run this on
every host, with the path of your text and a workdir that all hosts see:

    python train.py --config=configs/pretrain/mixtral_8x22b_v5p.py \
        --config.data.path=TEXT --workdir=RUN
"""

from ml_collections import ConfigDict

from configs import models
from configs.pretrain import mixtral_8x7b_v5p


def get_config() -> ConfigDict:
    config = mixtral_8x7b_v5p.get_config()
    config.update(
        {
            "model": models.mixtral_8x22b(),
            "mesh": {"fsdp": 16},
            "optimizer": {"learning_rate": 2e-4},
            "train": {"batch_size": 128, "num_steps": 100_000},
        }
    )
    return config
