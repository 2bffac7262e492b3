"""Mixtral in JAX: a sparse mixture of experts, trained with its experts sharded over a mesh of
devices.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixtral_jax.pretrained import Pretrained as Pretrained
    from mixtral_jax.pretrained import load_pretrained as load_pretrained

__version__ = "0.1.0"
__all__ = ["Pretrained", "load_pretrained"]


def __getattr__(name: str) -> Any:
    # On first use: configs and help are read through this package, and should not wait for jax.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mixtral_jax import pretrained

    return getattr(pretrained, name)
