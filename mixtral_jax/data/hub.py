"""Data sets of the Hugging Face Hub, or of a folder that is like a repository there.

A data set may have configs, such as languages; each config has splits.
"""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

from mixtral_jax.config import ConfigError, local_path, names_existing, require
from mixtral_jax.data.compression import find_suffix
from mixtral_jax.data.readers import READERS
from mixtral_jax.data.splits import TRAIN, split_of_folder

HUB = "hub:"
_FORM = f"{HUB}NAME[:CONFIG][:SPLIT]"
# A colon, but not in a part of a split, such as `train[:10%]`.
_COLON = re.compile(r":(?![^\[]*\])")


@dataclasses.dataclass(frozen=True)
class _Config:
    """What chooses a config: its name, or a folder of a data set that declares no configs."""

    name: str | None = None
    data_dir: str | None = None


def load_hub(path: str, key: str, split: str | None = None) -> Any:
    """Loads a split of the data set that `hub:NAME[:CONFIG][:SPLIT]` names.

    A second part alone is a config if the data set has one of this name, else a split. Of several
    configs, one must be named, unless the data set says which one is the default.

    Args:
        key: the setting that gives the path, for the message of an error.
        split: the split, whichever `path` names. By default it is `train` if `path` names none.

    Raises:
        ConfigError: it cannot be loaded, or has several configs; lists these and the splits.
    """
    import datasets  # Slow to import, and most runs read files.

    name, *parts = _COLON.split(path.removeprefix(HUB))
    require(
        name and all(parts) and len(parts) <= 2, f"{key}={path} names no data set: write {_FORM}"
    )
    config = _Config()
    if names_existing(name):
        _refuse_saved(Path(_find_place(name)), key, path)
    if len(parts) == 2 or (parts and parts[0] in _list_configs(name)):
        config_name = parts.pop(0)
        config = _list_configs(name).get(config_name, _Config(config_name))
    elif names_existing(name) or parts:
        _require_one_config(name, parts, key, path)
    wanted = split or (parts or [TRAIN])[0]
    try:
        return datasets.load_dataset(
            _find_place(name),
            config.name,
            data_dir=config.data_dir,
            split=wanted,
            keep_in_memory=False,  # From files, by which its rows are known again.
        )
    except Exception as error:  # Its libraries for files and networks have errors of many kinds.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        choices = "" if isinstance(error, ConnectionError) else _describe_choices(name, config)
        raise ConfigError(
            f"{key}={path} cannot be loaded ({reason}): {choices}check NAME, CONFIG and SPLIT of "
            f"{_FORM} and the network, or name local files"
        ) from error


@functools.cache  # It may ask the network, and a run loads its data several times.
def _list_configs(name: str) -> dict[str, _Config]:
    """The configs of a data set; empty if they are not known.

    A folder that declares none has one for each of its folders with data, except those of splits,
    and `default` for all of them together.
    """
    import datasets

    place = _find_place(name)
    try:
        declared = datasets.get_dataset_config_names(place)
    except Exception:
        declared = []
    configs = {config: _Config(config) for config in declared}
    if names_existing(name) and declared == ["default"]:
        for folder in sorted(Path(place).iterdir()):
            if _holds_data(folder) and not split_of_folder(folder.name):
                configs[folder.name] = _Config(data_dir=folder.name)
    return configs


def _holds_data(folder: Path) -> bool:
    if folder.name.startswith(".") or not folder.is_dir():
        return False
    return any(find_suffix(file) in (".txt", *READERS) for file in folder.rglob("*"))


def _refuse_saved(folder: Path, key: str, path: str) -> None:
    is_saved = any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
    require(
        not is_saved,
        f"{key}={path} is what save_to_disk of datasets wrote: leave out {HUB}, as in {key}="
        f"{path.removeprefix(HUB).partition(':')[0]}",
    )


def _require_one_config(name: str, parts: list[str], key: str, path: str) -> None:
    """Makes sure that it is clear which config to read where none is named.

    Args:
        parts: what follows the name: nothing, or what is no config.

    Raises:
        ConfigError: there are several configs, and none of them is said to be the default.
    """
    import datasets

    configs = _list_configs(name)
    folders = [config for config in configs if configs[config].data_dir]
    if len(configs) < 2 or len(folders) == 1:
        return
    if not folders and datasets.get_dataset_default_config_name(_find_place(name)):
        return
    fault = f"{parts[0]} is none of its configs," if parts else "it has several configs:"
    described = ", ".join(
        f"{config} (all together)" if folders and not configs[config].data_dir else config
        for config in configs
    )
    first = f"{HUB}{name}:{(folders or [*configs])[0]}"
    raise ConfigError(
        f"{key}={path}: {fault} {described}: write one, as in {first} or {first}:SPLIT"
    )


def _find_place(name: str) -> str:
    """The folder of a data set that is on this machine, else its name on the Hub."""
    return str(local_path(name, "data.path")) if names_existing(name) else name


def _describe_choices(name: str, config: _Config) -> str:
    """The configs of a data set, and the splits of one, to stand before the advice of an error."""
    import datasets

    configs = _list_configs(name)
    if not configs:
        return ""
    chosen = next((other for other in configs if configs[other] == config), next(iter(configs)))
    described = f"it has the configs {', '.join(configs)}; "
    try:
        splits = datasets.get_dataset_split_names(
            _find_place(name), configs[chosen].name, data_dir=configs[chosen].data_dir
        )
    except Exception:
        return described
    return f"{described}{chosen} has the splits {', '.join(splits)}; "
