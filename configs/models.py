"""The sizes of the models. No other file has them."""

from ml_collections import ConfigDict


def mixtral_8x7b() -> ConfigDict:
    """Mixtral 8x7B v0.1: 46,702,792,704 parameters, 12,879,925,248 active.

    Source: arXiv 2401.04088, Table 1.
    """
    return ConfigDict(
        {
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_layers": 32,
            "num_heads": 32,
            "num_kv_heads": 8,
            "head_dim": 128,
            "num_experts": 8,
            "rope_theta": 1e6,
            "norm_eps": 1e-5,
        }
    )


def mixtral_8x22b() -> ConfigDict:
    """Mixtral 8x22B v0.1: 140,620,634,112 parameters, 39,152,031,744 active."""
    model = mixtral_8x7b()
    model.hidden_size = 6144
    model.intermediate_size = 16_384
    model.num_layers = 56
    model.num_heads = 48
    return model


def tiny() -> ConfigDict:
    """The same architecture for a laptop. float32, because a CPU has no fast bfloat16."""
    model = mixtral_8x7b()
    model.vocab_size = 2048
    model.hidden_size = 128
    model.intermediate_size = 256
    model.num_layers = 4
    model.num_heads = 4
    model.num_kv_heads = 2
    model.head_dim = 32
    model.dtype = "float32"
    return model
