"""A decision between implementations, with its reason, for people to read."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was taken, and why."""

    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name} ({self.why})"
