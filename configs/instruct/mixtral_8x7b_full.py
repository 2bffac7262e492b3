r"""Tunes every weight of Mixtral 8x7B, on 8 H200 GPUs, 16 H100 GPUs, or 16 chips of TPU v5p.

The weights and the moments of AdamW are float32 and sharded over all devices: 523 GiB. A step has
16 rows of 8,192 tokens. This config was planned, but has never run on that hardware. `mixtral-jax
plan` finds a peak of 49 GiB per chip on v5p:2x2x4 (of 95 GiB), and a bound of 3,900 tokens/s per
chip. It estimates 112 GiB per GPU on h200:8 (of 131 GiB) and 58 GiB on h100:16 (of 75 GiB), from a
program for CPUs, whose arrays are wider. The learning rate was not tried. Run this on every host,
with your base model, your conversations, and a workdir that all hosts see:

    python finetune_instruct.py --config=configs/instruct/mixtral_8x7b_full.py \
        --config.finetune.base=BASE --config.data.path=CHATS --workdir=RUN
"""

from ml_collections import ConfigDict

from configs.instruct import mixtral_8x7b_lora


def get_config() -> ConfigDict:
    config = mixtral_8x7b_lora.get_config()
    config.update(
        {"mesh": {"fsdp": -1}, "optimizer": {"learning_rate": 1e-5}, "train": {"batch_size": 16}}
    )
    config.finetune = {"base": "BASE", "lora": {"rank": 0}}
    return config
