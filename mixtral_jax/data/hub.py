"""Data sets of the Hugging Face Hub, or of a folder that is like a repository there.

A data set may have configs, such as languages; each config has splits.
"""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

from mixtral_jax.config import ConfigError, local_path, names_existing, require
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

    A second part alone is a config if the data set has one of this name, else a split.

    Args:
        key: the setting that gives the path, for the message of an error.
        split: the split, whichever `path` names. By default it is `train` if `path` names none.

    Raises:
        ConfigError: it cannot be loaded; lists the configs and the splits that there are.
    """
    import datasets  # Slow to import, and most runs read files.

    name, *parts = _COLON.split(path.removeprefix(HUB))
    require(
        name and all(parts) and len(parts) <= 2, f"{key}={path} names no data set: write {_FORM}"
    )
    config = _Config()
    if len(parts) == 2 or (parts and parts[0] in _list_configs(name)):
        config_name = parts.pop(0)
        config = _list_configs(name).get(config_name, _Config(config_name))
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

    A folder that declares none has one for each of its folders, except those of splits.
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
            if folder.is_dir() and folder.name[0] != "." and not split_of_folder(folder.name):
                configs[folder.name] = _Config(data_dir=folder.name)
    return configs


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
