"""The pieces of a SentencePiece model and its settings: what another program needs in order to
tokenize in the same way. Also adds control pieces to a model.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from sentencepiece import sentencepiece_model_pb2

from mixtral_jax.data.tokenizer import Tokenizer

PieceKind = Literal["text", "control", "unknown", "byte", "unused"]
# SentencePiece's type numbers. User-defined pieces are matched before all others, but are text.
_KINDS: dict[int, PieceKind] = {
    1: "text",
    2: "unknown",
    3: "control",
    4: "text",
    5: "unused",
    6: "byte",
}
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
_BPE = 2


@dataclasses.dataclass(frozen=True)
class Piece:
    """An entry of a vocabulary.

    Attributes:
        text: the spelling in the model, with `\u2581` for a space.
        score: BPE merges the two neighbours whose joint piece has the highest score.
        kind: `control` pieces stand for no text, `byte` pieces for one byte that no other covers,
            `unused` pieces only keep an id free.
    """

    text: str
    score: float
    kind: PieceKind


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """All pieces, by id.

    Attributes:
        is_like_mixtral: whether the model is BPE with byte fallback that adds a space before a text
            and does not change it otherwise. User-defined pieces must be names in brackets, such as
            Mixtral's `[REFERENCE_DOC_0]`.
    """

    pieces: tuple[Piece, ...]
    is_like_mixtral: bool

    def find(self, kind: PieceKind) -> list[str]:
        """Finds the texts of all pieces of a kind."""
        return [piece.text for piece in self.pieces if piece.kind == kind]


def read_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Reads the vocabulary of a tokenizer."""
    spec = _parse(tokenizer)
    user_defined = [piece.piece for piece in spec.pieces if piece.type == _USER_DEFINED]
    keeps_text = (
        spec.normalizer_spec.name == "identity"
        and not spec.normalizer_spec.remove_extra_whitespaces
    )
    is_like_mixtral = (
        spec.trainer_spec.model_type == _BPE
        and spec.trainer_spec.byte_fallback
        and not spec.trainer_spec.treat_whitespace_as_suffix
        and keeps_text
        and spec.normalizer_spec.add_dummy_prefix
        and spec.normalizer_spec.escape_whitespaces
        and all(name.startswith("[") and name.endswith("]") for name in user_defined)
    )
    return Vocabulary(
        tuple(Piece(p.piece, p.score, _KINDS[p.type]) for p in spec.pieces), is_like_mixtral
    )


def add_control_pieces(tokenizer: Tokenizer, added: Mapping[int, str]) -> Tokenizer:
    """The tokenizer with a control piece at each of some ids after its last; others keep theirs.

    Ids between them that nobody names get unused pieces.

    Raises:
        ValueError: a name is that of another piece.
    """
    spec, first = _parse(tokenizer), tokenizer.vocab_size
    assert min(added, default=first) >= first, added
    taken = {piece.piece for piece in spec.pieces}
    for id_ in range(first, max(added, default=first - 1) + 1):
        name = added.get(id_, f"<unused_{id_}>")
        if name in taken:
            raise ValueError(f"{name!r} with id {id_} is a piece with another id already")
        taken.add(name)
        kind = _CONTROL if id_ in added else _UNUSED
        spec.pieces.add(piece=name, score=0.0, type=kind)
    return Tokenizer(spec.SerializeToString())


def _parse(tokenizer: Tokenizer) -> Any:
    model_proto = sentencepiece_model_pb2.ModelProto  # pyright: ignore[reportAttributeAccessIssue]
    return model_proto.FromString(tokenizer.model)
