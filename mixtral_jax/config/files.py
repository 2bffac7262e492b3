"""Reads config files: Python files with a function get_config(), and the config.json of a run.

Python files import their parents from a folder `configs`.
"""

import dataclasses
import json
import runpy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mixtral_jax.config.errors import ConfigError, require
from mixtral_jax.config.mapping import build, set_key
from mixtral_jax.config.paths import local_path
from mixtral_jax.config.run import Config

Read = TypeVar("Read")

# Beside the package in a clone, which is how it is installed.
SHIPPED = Path(__file__).parents[2] / "configs"
_SECTIONS = {field.name for field in dataclasses.fields(Config)}


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """The config of a file, with some keys changed.

    Args:
        path: a .py file with a function get_config(), as for `run_config_file`, or the config.json
            of a run.
        overrides: dotted keys and their values, as `{"train.num_steps": 100}`.

    Raises:
        ConfigError: there is no such file, or names the key that is wrong and what would be valid.
    """
    mapping = load_config_file(local_path(path, "the config file"))
    for key, value in (overrides or {}).items():
        set_key(mapping, key, value)
    return build(Config, mapping)


def load_config_file(path: Path) -> dict[str, Any]:
    """The nested mapping that `get_config()` of a config file returns; the file runs as Python.

    Of a .json file, such as the config.json of a run, it is the object in it.

    Raises:
        ConfigError: as `run_config_file`, or the file holds no JSON object.
    """
    return _read_json(path) if path.suffix == ".json" else run_config_file(path, _to_mapping)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        mapping = json.loads(path.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--config={path} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config={path} cannot be read: {error}") from error
    require(
        isinstance(mapping, dict) and mapping.keys() <= _SECTIONS,
        f"--config={path} is not the config.json of a run, an object with the sections "
        f"{', '.join(sorted(_SECTIONS))}: name a config file, such as configs/pretrain/tiny.py",
    )
    return mapping


def run_config_file(path: Path, read: Callable[[Any], Read]) -> Read:
    """What `read` makes of what `get_config()` of a file returns.

    `configs/...` also names a shipped file, if the current folder has none of that name.

    Raises:
        ConfigError: there is no such file or function, or one of the two fails.
    """
    shipped = SHIPPED.parent / path
    if not path.exists() and shipped.is_file():
        path = shipped
    if not path.is_file():
        is_run = (path / "config.json").is_file()
        inside = "its config.json" if is_run else "a .py file in it"
        problem = f"is a folder: name {inside}" if path.is_dir() else "there is no such file"
        raise ConfigError(f"--config={path}: {problem}; shipped ones are under configs/")
    require(
        path.suffix == ".py", f"--config={path} must be a .py file with a function get_config()"
    )
    # Config files import their parents from the `configs` folder that they live in, then from that
    # of the current folder, and then from the shipped one.
    roots = [str(folder.parent) for folder in path.resolve().parents if folder.name == "configs"]
    search_path = sys.path.copy()
    sys.path[:0] = [root for root in roots[:1] if root not in sys.path]
    sys.path += [str(Path.cwd()), str(SHIPPED.parent)]
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        if get_config is None:
            raise ConfigError(
                f"--config={path} must have a function get_config() that returns a ConfigDict"
                f"{_hint_of_json(path)}"
            )
        return read(get_config())
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"--config={path} does not run: {type(error).__name__}: {error}{_hint_of_json(path)}"
        ) from error
    finally:
        sys.path[:] = search_path


def _hint_of_json(path: Path) -> str:
    """What to do about a .py file that holds JSON; empty if it does not."""
    try:
        json.loads(path.read_bytes())
    except (OSError, ValueError):
        return ""
    return ": it holds JSON, so name it .json"


def _to_mapping(returned: Any) -> dict[str, Any]:
    from ml_collections import ConfigDict  # Slow to import, and help needs no config.

    return ConfigDict(returned).to_dict()
