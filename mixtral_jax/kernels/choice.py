"""A decision between implementations, with its reason, for people to read."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was taken, and why."""

    name: Any  # of the `Literal` that the config has for it
    why: str

    def __str__(self) -> str:
        return f"{self.name} ({self.why})"
