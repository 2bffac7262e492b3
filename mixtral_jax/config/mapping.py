"""Builds config dataclasses from nested mappings, and compares the configs of two starts of a run.

The mappings come from a config file and the command line (`config.files`, `cli.flags`). The config
classes know what the values mean.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, Literal, TypeVar

from mixtral_jax.config.errors import ConfigError, require
from mixtral_jax.config.model import ModelConfig
from mixtral_jax.config.router import RouterConfig
from mixtral_jax.config.run import Config

Built = TypeVar("Built")
_KINDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}

# These keys may change between two starts of one run: none of them changes the batches or the
# shapes of the parameters. The data may lie elsewhere; their content is compared later.
RESUMABLE_KEYS = (
    "data.path",
    "data.held_out",
    "train.num_steps",
    "train.eval_every",
    "train.log_every",
    "mesh",
    "model.remat",
    "dispatch.transport",
    "log",
    "checkpoint",
)


def changed_keys(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    prefix: str = "",
    also_fixed: Collection[str] = (),
) -> list[str]:
    """Lists the keys that differ between two configs and must not, each with both values.

    Args:
        prefix: the dotted path of the sections compared, with a dot at its end.
        also_fixed: keys of `RESUMABLE_KEYS` that must not differ either.
    """
    changed = []
    for name in sorted(old.keys() | new.keys()):
        key, before, after = prefix + name, old.get(name), new.get(name)
        if before == after or (_may_change(key, before, after) and key not in also_fixed):
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changed += changed_keys(before, after, key + ".", also_fixed)
        else:
            changed.append(f"{key} ({before!r} -> {after!r})")
    return changed


def _may_change(key: str, before: Any, after: Any) -> bool:
    # Data that are held out are trained on, or no longer, where none are drawn from data.path.
    is_other_draw = key == "data.held_out" and None in (before, after)
    return key in RESUMABLE_KEYS and not is_other_draw


def set_key(mapping: dict[str, Any], dotted_key: str, value: Any) -> None:
    """Sets `SECTION.KEY` in nested mappings, and adds sections that are missing.

    Raises:
        ConfigError: a part of the key before its last one is a value, or the key is a section.
    """
    *sections, last = keys = dotted_key.split(".")
    for depth, section in enumerate(sections):
        if mapping.get(section) is None:  # So is a section that a run does not have.
            mapping[section] = {}
        mapping = mapping[section]
        require(
            isinstance(mapping, dict),
            f"config key {'.'.join(keys[: depth + 1])} is a value, not a section",
        )
    require(
        not isinstance(mapping.get(last), dict),
        f"config key {dotted_key} is a section: set a key in it",
    )
    mapping[last] = value


def build(cls: type[Built], mapping: Mapping[str, Any], prefix: str = "") -> Built:
    """Makes the dataclass `cls` from nested mappings. Values may be text, as on a command line.

    For a whole `Config`, the shorthand `model.granularity` is replaced by the keys that it stands
    for, and set to 1. So a config that is saved and built again stays the same.

    Args:
        prefix: the dotted path of `mapping` in the whole config, for error messages.

    Raises:
        ConfigError: a key is unknown, missing or of the wrong type. The message names the key, its
            value, and what would be valid.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls))}
    for key in mapping:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f" (did you mean {prefix}{close[0]}?)" if close else ""
            raise ConfigError(
                f"unknown config key {prefix}{key}{hint}; valid here: {', '.join(fields)}"
            )
    no_default = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    missing = [prefix + name for name in no_default if name not in mapping]
    require(
        not missing,
        f"the config lacks {', '.join(missing)}: set it in the config file or as "
        "--config.KEY=VALUE",
    )
    values = {key: _convert(value, hints[key], prefix + key) for key, value in mapping.items()}
    return cls(**_write_out_granularity(values) if cls is Config else values)


def _write_out_granularity(sections: dict[str, Any]) -> dict[str, Any]:
    """Replaces `granularity` m by m times as many experts, each 1/m as large.

    A token then chooses m times as many experts (DeepSeekMoE, arXiv 2401.06066, section 3.1).
    """
    model: ModelConfig = sections["model"]
    m, hidden = model.granularity, model.intermediate_size
    if m == 1:
        return sections
    require(
        hidden % m == 0,
        f"model.granularity={m} splits each expert into {m}, so it must divide "
        f"model.intermediate_size={hidden}",
    )
    router: RouterConfig = sections.get("router", RouterConfig())
    cut = {"num_experts": m * model.num_experts, "intermediate_size": hidden // m, "granularity": 1}
    written: dict[str, Any] = {
        "model": dataclasses.replace(model, **cut),
        "router": dataclasses.replace(
            router, num_experts_per_token=m * router.num_experts_per_token
        ),
    }
    if upcycle := sections.get("upcycle"):
        written["upcycle"] = dataclasses.replace(upcycle, granularity=m * upcycle.granularity)
    return sections | written


def _convert(value: Any, hint: Any, key: str) -> Any:
    """Converts `value` to the type `hint`. Text is parsed, so a command line needs no quotes."""
    if dataclasses.is_dataclass(hint):
        require(
            isinstance(value, Mapping),
            f"config key {key} is a section, not a value: set {key}.NAME instead",
        )
        return build(typing.cast(type, hint), value, key + ".")
    options = typing.get_args(hint)
    if types.NoneType in options:
        (hint,) = (option for option in options if option is not types.NoneType)
        return None if value in (None, "None", "none") else _convert(value, hint, key)
    if typing.get_origin(hint) is Literal:
        require(
            value in options,
            f"config key {key}={value!r} must be one of {', '.join(map(repr, options))}",
        )
        return value
    try:
        converted = _parse(value, hint)
    except (ValueError, TypeError, OverflowError):
        raise ConfigError(f"config key {key}={value!r} must be {_KINDS[hint]}") from None
    return converted


def _parse(value: Any, kind: type) -> Any:
    if kind is bool and isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower(), value)
    if kind is int and isinstance(value, str):
        return int(value)
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        number = float(value)
        if not math.isfinite(number):
            raise ValueError
        return number
    if type(value) is not kind:
        raise TypeError
    return value
