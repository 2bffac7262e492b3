"""The settings of a continuation, with their checks."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from mixtral_jax.config import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to continue one prompt.

    `temperature=0` always takes the most likely token. Otherwise tokens are sampled with the random
    numbers of `seed`, from the `top_k` most likely tokens (0: all), and of these from the fewest
    whose probabilities sum to `top_p`. The text ends before the first of the `stop` strings, at the
    model's end of text, or after `max_new_tokens`.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        require(
            self.max_new_tokens >= 1, f"max_new_tokens={self.max_new_tokens} must be at least 1"
        )
        require(
            0 <= self.temperature < math.inf,
            f"temperature={self.temperature} must be 0 (the most likely token) or positive",
        )
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must lie in (0, 1]; 1 keeps all tokens")
        require(self.top_k >= 0, f"top_k={self.top_k} must be at least 1, or 0 to keep all tokens")
        require(
            self.temperature or (self.top_p, self.top_k) == (1, 0),
            f"top_p={self.top_p} and top_k={self.top_k} choose from what is sampled, and "
            "temperature=0 takes the most likely token: set a temperature, such as 0.7",
        )
        require(0 <= self.seed < 2**32, f"seed={self.seed} must lie in [0, 2**32)")
        require(
            all(self.stop), "stop strings must not be empty: an empty one ends every text at once"
        )

    @classmethod
    def of(cls, *, stop: str | Iterable[str] = (), **others: Any) -> "Settings":
        """Makes settings from keywords. `stop` may also be a single string or a list."""
        return cls(stop=(stop,) if isinstance(stop, str) else tuple(stop), **others)

    def within(self, room: int) -> "Settings":
        """The same settings with at most `room` new tokens."""
        return dataclasses.replace(self, max_new_tokens=min(self.max_new_tokens, room))
