"""Mixtral 8x7B from scratch on 256 chips of TPU v6e (16x16): a smaller memory a chip, so weights
are cut finer.

256 rows of 4,096 tokens a step, one a chip. Never run on that hardware: the sizes and the mesh are
checked, the learning rate and the speed are not. Name your text, and a workdir that every host
sees; run on every host:

    python train.py --config=configs/pretrain/mixtral_8x7b_v6e.py --config.data.path=TEXT
    --workdir=DIR
"""

from ml_collections import ConfigDict

from configs.pretrain import mixtral_8x7b_v5p


def get_config() -> ConfigDict:
    config = mixtral_8x7b_v5p.get_config()
    config.update({"mesh": {"fsdp": 32}, "train": {"batch_size": 256, "num_steps": 25_000}})
    return config
