"""What in a folder is not read, and why. `folders` decides which splits of a data set are read."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mixtral_jax.config import ConfigError, require
from mixtral_jax.data.compression import find_suffix, have_same_content, without_compression

# Files of metadata that `datasets` writes beside its data.
_METADATA_FILES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_MAP_CACHE = re.compile(r"cache-.*\.arrow")
# Formats in which a file without a byte is a file without rows, and no damaged one.
_LINES = (".jsonl", ".ndjson", ".csv")
# How many names a reason has: so many, or one for each suffix if there are more of these.
_NUM_NAMES, _MAX_SUFFIXES = 3, 12

# Why something is not read -> the files or folders.
NotRead = dict[str, list[Path]]


def describe(not_read: Mapping[str, Sequence[Path]], root: Path) -> str:
    """How many are not read for each reason, splits first, and the first names below `root`."""
    phrases = []
    for reason in sorted(not_read, key=lambda reason: (not reason.startswith("split "), reason)):
        names = sorted(path.relative_to(root).as_posix() for path in not_read[reason])
        shown = _choose_names(names)
        more = ", ..." if len(names) > len(shown) else ""
        phrases.append(f"{reason}: {len(names):,} ({', '.join(shown)}{more})")
    # A name that is not UTF-8 could not be printed.
    return "; ".join(phrases).encode(errors="backslashreplace").decode()


def _choose_names(names: Sequence[str]) -> list[str]:
    """The first names, and the first of each suffix: data may lie behind many files of notes."""
    firsts = {Path(name).suffix.lower(): name for name in reversed(names)}
    chosen = sorted(firsts.values())[:_MAX_SUFFIXES]
    others = [name for name in names if name not in chosen]
    return sorted(chosen + others[: max(0, _NUM_NAMES - len(chosen))])


def is_readable(file: Path, suffixes: Sequence[str]) -> bool:
    """Whether one of `suffixes`, in lower case, names the format of a file, or its compression."""
    return find_suffix(file) in suffixes or file.suffix.lower() in suffixes


def find_reasons(
    folder: Path, names: Sequence[str], readable: Sequence[str]
) -> dict[str, str | None]:
    """Why each of some names in a folder is not read; None for those that are read.

    Raises:
        ConfigError: files that `state.json` lists are missing.
    """
    listed = _read_state(folder) if "state.json" in names else None
    reasons: dict[str, str | None] = {}
    read: dict[str, list[Path]] = {}  # By their names without the suffix of a compression.
    for name in sorted(names):
        file = folder / name
        same_name = read.setdefault(without_compression(file).name, [])
        if name.startswith("."):
            reason = "hidden"
        elif not file.is_file():
            reason = "links to nothing" if file.is_symlink() else "no plain files"
        elif name in _METADATA_FILES:
            reason = "metadata"
        elif not is_readable(file, readable):
            reason = "other suffixes"
        elif find_suffix(file) in _LINES and not file.stat().st_size:
            reason = "empty"
        elif _MAP_CACHE.fullmatch(name):
            reason = "caches of datasets' map"
        elif listed is not None and file.suffix == ".arrow" and name not in listed:
            reason = "not in state.json"
        elif any(have_same_content(other, file) for other in same_name):
            reason = "compressed copies"
        else:
            reason = None
            same_name.append(file)
        reasons[name] = reason
    return reasons


def _read_state(folder: Path) -> set[str] | None:
    """The files that `save_to_disk` of `datasets` lists; None if it did not write the folder.

    Raises:
        ConfigError: one is missing.
    """
    try:
        state = json.loads((folder / "state.json").read_bytes())
        listed = {str(file["filename"]) for file in state["_data_files"]}
    except (OSError, ValueError, TypeError, KeyError):
        return None
    missing = sorted(name for name in listed if not (folder / name).exists())
    require(
        not missing,
        f"{folder}/state.json lists {', '.join(missing)}, which is not there: copy the whole data "
        "set, or name the files that are there with a glob",
    )
    return listed


def refuse_hub_cache(folder: Path, folders: Sequence[str], name: str) -> None:
    """Refuses the Hub's cache of a data set, which may hold several versions of each file.

    Args:
        folders: what is in `folder`.
        name: the setting that led here, for the message.

    Raises:
        ConfigError: `folder` is one; names what to name instead.
    """
    folder = folder.absolute()
    if not folder.name.startswith("datasets--") or "snapshots" not in folders:
        return
    versions = sorted((folder / "snapshots").iterdir(), key=lambda version: version.stat().st_mtime)
    hub_name = "/".join(folder.name.split("--")[1:])
    newest = f"name one version of it, such as {versions[-1]}, or " if versions else "name "
    raise ConfigError(f"{name}: {folder} is a cache of the Hub: {newest}hub:{hub_name}")
