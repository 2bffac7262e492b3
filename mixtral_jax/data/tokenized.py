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
        text_bytes: int [num_tokens], the bytes of text behind each token; None if they are those of
            its piece (`Tokenizer.bytes_per_token`), and `prefix_bytes` less after BOS.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray | None = None
    text_bytes: np.ndarray | None = None

    def require_mask(self) -> np.ndarray:
        """The mask of a conversation, which always has one."""
        assert self.loss_mask is not None
        return self.loss_mask
