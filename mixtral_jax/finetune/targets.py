"""Which projections get adapters: translates a preset or patterns to names of projections."""

import fnmatch
from collections.abc import Sequence

from mixtral_jax.config import ConfigError, require

PRESETS = {
    "attention": ("attention.*",),
    # The * before `experts` also matches shared experts, in models that have them.
    "attention+experts": ("attention.*", "moe.*experts.*"),
    "attention+experts+router": ("attention.*", "moe.*experts.*", "moe.router.*"),
}


def match_targets(targets: str, names: Sequence[str], router_factor: float) -> list[str]:
    """The projections among `names` that get an adapter, in the order of `names`.

    Args:
        targets: a preset or patterns, separated by commas: `finetune.lora.targets`.
        router_factor: `router.learning_rate_factor`.

    Raises:
        ConfigError: a pattern matches no projection, or `router_factor` contradicts `targets`.
    """
    patterns = [
        pattern
        for part in targets.split(",")
        for pattern in PRESETS.get(part.strip(), (part.strip(),))
    ]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(
                f"finetune.lora.targets={targets}: {pattern!r} matches no projection; use patterns "
                f"that match {', '.join(names)}, or a preset: {', '.join(PRESETS)}"
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
        "adapts it: change one of the two",
    )
    require(
        has_router or factor in (0, 1),
        f"router.learning_rate_factor={factor} has no effect, since "
        f"finetune.lora.targets={targets} leaves the router frozen: add it, as in "
        "attention+experts+router",
    )
