"""A document or a conversation as token ids."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """Token ids, and which of them are trained on.

    Attributes:
        tokens: int [num_tokens]; the first is BOS.
        loss_mask: int [num_tokens], 1 on the tokens that are trained on; None: all of them, which
            needs no room on disk.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray | None = None

    def require_mask(self) -> np.ndarray:
        """The mask of a conversation, which always has one."""
        assert self.loss_mask is not None
        return self.loss_mask
