"""The pieces of a SentencePiece model, and how it finds them: what another program needs to
tokenise alike.
"""

import dataclasses
from typing import Literal

from sentencepiece import sentencepiece_model_pb2

from mixtral_jax.data.tokenizer import Tokenizer

PieceKind = Literal["text", "control", "unknown", "byte"]
# By the numbers of SentencePiece's format. A piece that its maker named is found before all others,
# but is text.
_KINDS: dict[int, PieceKind] = {
    1: "text",
    2: "unknown",
    3: "control",
    4: "text",
    5: "text",
    6: "byte",
}
_NAMED_BY_MAKER = 4
_BPE = 2


@dataclasses.dataclass(frozen=True)
class Piece:
    """An entry of a vocabulary.

    Attributes:
        text: as the model spells it, with `\u2581` for a space.
        score: of the pieces that two neighbours could form, that of the highest score is formed.
        kind: `control` stands for no text, `byte` for one that no other piece covers.
    """

    text: str
    score: float
    kind: PieceKind


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """All pieces, by id.

    Attributes:
        is_like_mixtral: whether the model is BPE with byte fallback that puts a space before a
            text, and leaves it as it is otherwise. Pieces that are found before all others may only
            be names in brackets, as Mixtral's `[REFERENCE_DOC_0]`.
    """

    pieces: tuple[Piece, ...]
    is_like_mixtral: bool

    def find(self, kind: PieceKind) -> list[str]:
        """The texts of all pieces of a kind."""
        return [piece.text for piece in self.pieces if piece.kind == kind]


def read_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """The vocabulary of a tokenizer."""
    model_proto = sentencepiece_model_pb2.ModelProto  # pyright: ignore[reportAttributeAccessIssue]
    spec = model_proto.FromString(tokenizer.model)
    first = [piece.piece for piece in spec.pieces if piece.type == _NAMED_BY_MAKER]
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
        and all(name.startswith("[") and name.endswith("]") for name in first)
    )
    return Vocabulary(
        tuple(Piece(p.piece, p.score, _KINDS[p.type]) for p in spec.pieces), is_like_mixtral
    )
