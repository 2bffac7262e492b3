"""Which projections of a block adapters go to: from a preset or patterns to names."""

import fnmatch
from collections.abc import Sequence

from mixtral_jax.config import ConfigError, require

PRESETS = {
    "attention": ("attention.*",),
    # Of a model that has shared experts, those too.
    "attention+experts": ("attention.*", "moe.*experts.*"),
    "attention+experts+router": ("attention.*", "moe.*experts.*", "moe.router.*"),
}


def match_targets(targets: str, names: Sequence[str], router_factor: float = 1.0) -> list[str]:
    """Those of the projections `names` that get an adapter, in their order; the router learns so
    fast.

    Raises:
        ConfigError: a pattern matches nothing, or what the config says of the router contradicts
            it.
    """
    patterns = [
        pattern
        for part in targets.split(",")
        for pattern in PRESETS.get(part.strip(), (part.strip(),))
    ]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(
                f"finetune.lora.targets={targets}: {pattern!r} matches no projection; patterns "
                "match "
                f"{', '.join(names)}, and presets are {', '.join(PRESETS)}"
            )
    matched = [
        name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]
    _check_router(targets, router_factor, has_router=any("router" in name for name in matched))
    return matched


def _check_router(targets: str, factor: float, *, has_router: bool) -> None:
    require(
        factor or not has_router,
        f"router.learning_rate_factor=0 freezes the router, but finetune.lora.targets={targets} "
        "adapts it: "
        "change either",
    )
    require(
        has_router or factor in (0, 1),
        f"router.learning_rate_factor={factor} has no effect, since "
        f"finetune.lora.targets={targets} leaves the "
        "router frozen: add it, as in attention+experts+router",
    )
