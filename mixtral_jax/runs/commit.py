"""The git commit of the sources, if they are in a repository."""

import shutil
import subprocess

from mixtral_jax.config import SHIPPED


def find_commit() -> str | None:
    """The commit of the clone that this package runs from; None without a clone.

    It ends in `+changes` if files differ from the commit.
    """
    root = SHIPPED.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None

    def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )

    commit, changes = (
        ask("rev-parse", "--short=12", "HEAD"),
        ask("status", "--porcelain", "--untracked-files=no"),
    )
    # Such as a clone of another user, which git does not trust.
    if commit.returncode or changes.returncode:
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout else "")
