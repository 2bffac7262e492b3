r"""Mixtral 8x7B from scratch on 256 chips of TPU v6e (16x16).

A v6e chip has less memory than a v5p chip, so the weights are sharded over more of them. A step has
256 rows of 4,096 tokens, one row per chip. This config has never run on that hardware: its sizes
and mesh were checked by compiling, its learning rate and its speed were not. Run this on every
host, with the path of your text and a workdir that all hosts see:

    python train.py --config=configs/pretrain/mixtral_8x7b_v6e.py \
        --config.data.path=TEXT --workdir=RUN
"""

from ml_collections import ConfigDict

from configs.pretrain import mixtral_8x7b_v5p


def get_config() -> ConfigDict:
    config = mixtral_8x7b_v5p.get_config()
    config.update({"mesh": {"fsdp": 32}, "train": {"batch_size": 256, "num_steps": 25_000}})
    return config
