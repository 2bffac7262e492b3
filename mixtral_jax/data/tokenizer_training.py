"""Trains SentencePiece models like Mixtral's."""

import io
from collections.abc import Callable, Iterable, Iterator

import sentencepiece

from mixtral_jax.config import ConfigError

# SentencePiece skips training texts of more than 4192 bytes; 1000 characters have at most 4000.
_TRAINING_CHUNK_CHARACTERS = 1000
_MAX_TRAINING_CHARACTERS = 10_000_000


def train_model(num_pieces: int, texts: Callable[[], Iterable[str]]) -> bytes:
    """Trains a SentencePiece model of the same kind as Mixtral's: BPE, byte fallback, split digits.

    Args:
        texts: gives the same texts at every call.

    Raises:
        ConfigError: `num_pieces` is too small or too large for the text.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sample_chunks(texts),
            model_writer=model,
            vocab_size=num_pieces,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].partition(" Increase")[0]
        raise ConfigError(
            f"data.tokenizer=train:{num_pieces}: {num_pieces} pieces are too few or too many for "
            f"this text ({reason}): choose another N, or give more text"
        ) from error
    return model.getvalue()


def _sample_chunks(texts: Callable[[], Iterable[str]]) -> Iterator[str]:
    """Cuts texts into chunks; if they are long, it takes some, spread evenly.

    Chunks keep their newlines, so that pieces may contain them.
    """
    share = min(1.0, _MAX_TRAINING_CHARACTERS / max(1, sum(map(len, texts()))))
    chunks = (chunk for text in texts() for chunk in _cut_chunks(text))
    for number, chunk in enumerate(chunks):
        if int((number + 1) * share) > int(number * share):
            yield chunk


def _cut_chunks(text: str) -> Iterator[str]:
    """Cuts at the ends of lines where possible."""
    start = 0
    while start < len(text):
        end = start + _TRAINING_CHUNK_CHARACTERS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end
