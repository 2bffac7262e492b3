"""Paths that users name: `~` is their home, and a URL is no path."""

import re
from pathlib import Path

from mixtral_jax.config.errors import require

_URL = re.compile("[A-Za-z][A-Za-z0-9+.-]*:/")


def local_path(text: str | Path, name: str) -> Path:
    """The file or folder that `text` names, with `~` as the user's home.

    Args:
        name: the flag or key that gives it, for the message of an error.

    Raises:
        ConfigError: `find_path_problem` finds one.
    """
    problem = find_path_problem(str(text))
    require(not problem, f"{name}={text} {problem}")
    return Path(text).expanduser()


def names_existing(text: str) -> bool:
    """True if `text` is the path of an existing file or folder, with `~` as the user's home."""
    return not find_path_problem(text) and Path(text).expanduser().exists()


def find_path_problem(text: str) -> str | None:
    """What is wrong with a path whatever the disk holds, to follow its name in an error, or None.

    Without this, `gs://bucket/run` would be a folder `gs:` on this machine.
    """
    if not text:
        return "is empty: a variable that is not set?"
    if re.match("file:/", text, re.IGNORECASE):
        return "is a URL: leave out file://, and name the path alone"
    if _URL.match(text):
        return (
            "is a URL, but files are read and written only on disks of this machine: mount the "
            "storage or copy the files, and name the folder"
        )
    try:
        Path(text).expanduser()
    except RuntimeError:
        return "begins with the home of a user that this machine does not know"
    return None
