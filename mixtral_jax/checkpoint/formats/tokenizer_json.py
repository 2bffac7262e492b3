"""Converts a SentencePiece model to the tokenizer.json that transformers reads.

Without this file transformers 5 converts tokenizer.model itself, with two errors. It orders merges
by id, but Mixtral's pieces of several spaces have low scores and not high ids. And it omits the
space before a text.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from mixtral_jax.config import require
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.data.vocabulary import Piece, read_vocabulary

_SPACE = "\u2581"
# The pre-tokenizer Metaspace would add no space before a text that begins with one.
_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": _SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
    ],
}
_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}


def make_tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer.json with which `tokenizers` encodes text as `tokenizer` does, after BOS.

    One difference remains: control pieces written out in a text, such as `</s>`, become control
    ids in `tokenizers`.

    Raises:
        ConfigError: the SentencePiece model is not like Mixtral's, a BPE that does not change the
            text.
    """
    vocabulary = read_vocabulary(tokenizer)
    require(
        vocabulary.is_like_mixtral,
        "the tokenizer cannot be written for Hugging Face: it is not a SentencePiece model of type "
        "BPE with byte fallback that puts a space before a text and does not change it otherwise; "
        "`export --format=mistral` can write it, and a tuning, which is exported for Hugging Face, "
        "needs another tokenizer",
    )
    pieces = vocabulary.pieces
    bos = pieces[tokenizer.bos_id].text
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(id_, piece)
            for id_, piece in enumerate(pieces)
            if piece.kind in ("control", "unknown")
        ],
        "normalizer": _NORMALIZER,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": _after_bos(bos, "A", 0),
            "pair": [*_after_bos(bos, "A", 0), *_after_bos(bos, "B", 1)],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": _DECODER,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": vocabulary.find("unknown")[0],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.text: id_ for id_, piece in enumerate(pieces)},
            "merges": find_merges(pieces),
        },
    }


# What transformers makes of a tokenizer.model. "Precompiled" is the normalizer in it.
_KNOWN_STEPS: Mapping[str, tuple[str, ...]] = {
    "normalizer": ("Prepend", "Replace", "Precompiled"),
    "pre_tokenizer": ("Metaspace", "WhitespaceSplit"),
}


def find_other_steps(theirs: Mapping[str, Any]) -> list[str]:
    """What in a tokenizer.json turns texts into other ids than a tokenizer.model can, in words."""
    found = [
        f"{name} {step!r}"
        for name, known in _KNOWN_STEPS.items()
        for step in _list_steps(theirs.get(name))
        if step not in known
    ]
    model = theirs.get("model")
    dropout = model.get("dropout") if isinstance(model, Mapping) else None
    return [*found, f"model.dropout={dropout!r}"] if dropout else found


def _list_steps(step: Any) -> Iterator[str]:
    """The types of a step, which may be a sequence of steps."""
    if not isinstance(step, Mapping):
        if step is not None:
            yield repr(step)
    elif step.get("type") == "Sequence":
        steps = step.get("normalizers") or step.get("pretokenizers") or []
        for part in steps if isinstance(steps, list) else [steps]:
            yield from _list_steps(part)
    else:
        yield str(step.get("type"))


def _added_token(id_: int, piece: Piece) -> dict[str, Any]:
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return {"id": id_, "content": piece.text, **flags}


def _after_bos(bos: str, sequence: str, type_id: int) -> list[dict[str, Any]]:
    return [
        {"SpecialToken": {"id": bos, "type_id": type_id}},
        {"Sequence": {"id": sequence, "type_id": type_id}},
    ]


def find_merges(pieces: Sequence[Piece]) -> list[list[str]]:
    """All pairs of pieces that form another piece, in the order in which BPE tries them.

    SentencePiece merges the neighbours that form the piece with the highest score; `tokenizers`
    merges those that come first in this list.
    """
    scores = {piece.text: piece.score for piece in pieces if piece.kind == "text"}
    pairs = [
        (text[:cut], text[cut:])
        for text in scores
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    pairs.sort(key=lambda pair: (-scores["".join(pair)], -len(pair[0]), -len(pair[1])))
    return [list(pair) for pair in pairs]


def make_tokenizer_config(
    tokenizer: Tokenizer,
    chat_template: str,
    context_length: int,
    *,
    eos_token: str | None = None,
    pad_token: str | None = None,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """The tokenizer_config.json, with the special pieces and the chat template.

    Args:
        eos_token: what ends an answer; None is the tokenizer's own.
        pad_token: None is none.
        settings: further keys; they replace those that are written anyway.
    """
    vocabulary = read_vocabulary(tokenizer)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": vocabulary.pieces[tokenizer.bos_id].text,
        "eos_token": eos_token or vocabulary.pieces[tokenizer.eos_id].text,
        "unk_token": vocabulary.find("unknown")[0],
        **({} if pad_token is None else {"pad_token": pad_token}),
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        "chat_template": chat_template,
        **settings,
    }
