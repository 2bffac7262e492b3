"""What a comparison with transformers needs: its packages, and one device for each side."""

from typing import Any

import jax

from mixtral_jax.config import Config, ConfigError, require


def require_one_device(mesh: jax.sharding.Mesh, flag: str) -> None:
    """Raises ConfigError if the mesh has more than one device; `flag` names the benchmark."""
    require(
        mesh.size == 1,
        f"bench {flag} compares one device with another: set mesh.cpu_devices=1, not {mesh.size}",
    )


def import_peer(flag: str) -> tuple[Any, Any]:
    """The modules torch and transformers.

    Raises:
        ConfigError: one of them is not installed.
    """
    try:
        import torch  # type: ignore[import-not-found]
        import transformers  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError(
            f"bench {flag} needs torch and transformers ({error}): pip install -e '.[parity]'"
        ) from None
    return torch, transformers


def make_peer(config: Config, transformers: Any, **settings: Any) -> Any:
    """A random Mixtral of transformers, as large as that of the config, with `settings`."""
    model = config.model
    theirs = transformers.MixtralConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        num_local_experts=model.num_experts,
        num_experts_per_tok=config.router.num_experts_per_token,
        **settings,
    )
    return transformers.MixtralForCausalLM(theirs)
