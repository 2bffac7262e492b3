r"""Tunes adapters of Mixtral 8x7B on 8 chips: one host of TPU v6e, or two hosts of v5p.

The attention and the experts have adapters: 240,123,904 parameters learn, and the base stays in
bfloat16. A step has 8 rows of 8,192 tokens, one row per chip. Each chip holds one expert of each
layer, with room for all rows that may be routed to it, so no row is ever dropped.

This config was planned, but has never run on that hardware. `mixtral-jax plan` finds a peak of 17.0
GiB per chip on v6e:2x4 (of 29.8 GiB) and 42.9 on v5p:2x2x2 (of 95 GiB), and bounds of 7,200 and
5,100 tokens/s per chip. The learning rate is that of mistral-finetune. Run this on every host, with
your base model, your conversations, and a workdir that all hosts see:

    python finetune_instruct.py --config=configs/instruct/mixtral_8x7b_lora.py \
        --config.finetune.base=BASE --config.data.path=CHATS --workdir=RUN
"""

from ml_collections import ConfigDict

from configs import models


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": models.mixtral_8x7b(),
            "router": {
                "load_balance": {"weight": 0.02, "normalization": "hf"},
                "z_loss_weight": 0.0,
            },
            "mesh": {"fsdp": 1, "expert": 8},
            "data": {"path": "CHATS", "tokenizer": "mixtral"},
            "optimizer": {"learning_rate": 1e-4},
            "finetune": {"base": "BASE", "frozen_dtype": "bfloat16", "lora": {"rank": 16}},
            "train": {"num_steps": 300, "batch_size": 8, "sequence_length": 8192},
        }
    )
