"""Stub replaced on merge."""

import json
import os
import secrets
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: bytes | str) -> None:
    """Writes whole."""
    data = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
