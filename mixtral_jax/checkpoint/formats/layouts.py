"""Other programs' names and shapes for our parameters: one table per layout.

The tables are used for reading and for writing; `relayout` moves the numbers. The layouts are:

- Hugging Face: one tensor per expert, as transformers 4 and 5 write them, or the experts of a layer
  fused, as transformers 5 holds them in memory; under `block_sparse_moe` or `mlp`; with or without
  the prefix `model.`.
- Mistral's own, of mistral-inference and mistral-finetune.
- megablocks, in Mistral's repositories.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping

from mixtral_jax.checkpoint.files.stored import Order
from mixtral_jax.checkpoint.formats.parameters import PARAMETERS, chunk_dimensions, dimension_sizes
from mixtral_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Place:
    """Where another program's tensors hold one of our parameters.

    Dimensions are letters; the key is in `mixtral_jax.model`.

    Attributes:
        tensor: the name of the tensor. Each index of a dimension in braces has its own tensor.
        stored: the remaining dimensions in the tensor's order. Letters without a space between
            them are flattened into one dimension: "NH D" for an "LDNH" parameter is [N * H, D],
            transposed. `2` is a dimension of size two. It stands for the halves of a rotary head,
            where H is written `2I` or `I2`, and otherwise for two parameters in one tensor.
        part: which of the two parameters in one tensor this is, 0 or 1.
    """

    parameter: str
    tensor: str
    stored: str
    part: int | None = None

    @property
    def dimensions(self) -> str:
        """The letters of the parameter's dimensions."""
        return PARAMETERS[self.parameter]

    @property
    def stacked(self) -> str:
        """The leading dimensions of the parameter, each index of which has its own tensor."""
        return "".join(letter for letter in self.dimensions if f"{{{letter}}}" in self.tensor)

    @property
    def has_halves(self) -> bool:
        """Whether `stored` splits rotary heads into halves."""
        return "I" in self.stored

    @property
    def order(self) -> str:
        """The letters of `stored` in the order of the parameter.

        If two parameters share a tensor, their dimension `2` comes first.
        """
        letters = self.dimensions.removeprefix(self.stacked)
        letters = letters.replace("H", "2I") if self.has_halves else letters
        return letters if self.part is None else "2" + letters

    @property
    def chunk_order(self) -> Order | None:
        """The memory order that a chunk of the parameter has in the tensor, if "C" or "F"."""
        letters = "".join(self.groups)
        places = [letters.find(letter) for letter in chunk_dimensions(self.parameter)]
        if self.has_halves or places not in (sorted(places), sorted(places, reverse=True)):
            return None
        return "C" if places == sorted(places) else "F"

    @property
    def groups(self) -> list[str]:
        """The letters of each dimension of the tensor."""
        return self.stored.split()

    def name(self, indices: Iterable[int]) -> str:
        """The name of the tensor at these indices of the stacked dimensions."""
        return self.tensor.format(**dict(zip(self.stacked, indices, strict=True)))

    def tensor_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of each of these tensors."""
        return tuple(math.prod(sizes[letter] for letter in group) for group in self.groups)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a layout: its shape, and which parts of which parameters it holds.

    Attributes:
        indices: the indices of the stacked dimensions.
        places: one per parameter in the tensor.
    """

    shape: tuple[int, ...]
    indices: tuple[int, ...]
    places: tuple[Place, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names and shapes of all tensors in one program's files; `name` is shown to people."""

    name: str
    places: tuple[Place, ...]

    def tensors(self, model: ModelConfig) -> dict[str, Tensor]:
        """All tensors of a model by name, layer by layer."""
        sizes, tensors = letter_sizes(model), {}
        placed = [(indices, place) for place in self.places for indices in _indices(place, sizes)]
        for indices, place in sorted(placed, key=lambda item: item[0][:1]):
            name = place.name(indices)
            others = tensors[name].places if name in tensors else ()
            tensors[name] = Tensor(place.tensor_shape(sizes), indices, (*others, place))
        return tensors

    def count_tensors(self, model: ModelConfig) -> int:
        """The number of tensors of a model, computed without listing them."""
        sizes = letter_sizes(model)
        stacked = {place.tensor: place.stacked for place in self.places}
        return sum(math.prod(sizes[letter] for letter in letters) for letters in stacked.values())


def letter_sizes(model: ModelConfig) -> dict[str, int]:
    """`dimension_sizes`, plus the letters `2` and `I` that only `Place.stored` uses."""
    return dimension_sizes(model) | {"2": 2, "I": model.head_dim // 2}


def find_layout(names: Iterable[str]) -> Layout | None:
    """The layout with the most of these names; None if no layout has any of them.

    Compares only names in layer 0 and outside of layers.
    """
    found = set(names)

    def count_known(layout: Layout) -> int:
        return len({place.name([0] * len(place.stacked)) for place in layout.places} & found)

    best = max(LAYOUTS, key=count_known)
    return best if count_known(best) else None


def _indices(place: Place, sizes: Mapping[str, int]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(sizes[letter]) for letter in place.stacked))


def _hugging_face(name: str, moe: str, experts: tuple[Place, ...]) -> Layout:
    """A layout of Hugging Face; `moe` is the name of a layer's mixture of experts.

    Rotary pairs are (h, h + H/2), as in our model, so no row moves.
    """
    layer = "model.layers.{L}."
    places = (
        Place("embedding_VD", "model.embed_tokens.weight", "V D"),
        Place("blocks/attention_norm/scale", layer + "input_layernorm.weight", "D"),
        Place("blocks/attention/query/weight", layer + "self_attn.q_proj.weight", "NH D"),
        Place("blocks/attention/key/weight", layer + "self_attn.k_proj.weight", "KH D"),
        Place("blocks/attention/value/weight", layer + "self_attn.v_proj.weight", "KH D"),
        Place("blocks/attention/out/weight", layer + "self_attn.o_proj.weight", "D NH"),
        Place("blocks/moe_norm/scale", layer + "post_attention_layernorm.weight", "D"),
        Place("blocks/moe/router/gate/weight", layer + moe + ".gate.weight", "E D"),
        *(dataclasses.replace(place, tensor=f"{layer}{moe}.{place.tensor}") for place in experts),
        Place("norm/scale", "model.norm.weight", "D"),
        Place("unembed/weight", "lm_head.weight", "V D"),
    )
    return Layout(name, places)


def _mistral(name: str, moe: str, experts: tuple[Place, ...]) -> Layout:
    """A layout of Mistral; `moe` is the name of a layer's mixture of experts.

    Rotary pairs are (2i, 2i + 1).
    """
    layer = "layers.{L}."
    places = (
        Place("embedding_VD", "tok_embeddings.weight", "V D"),
        Place("blocks/attention_norm/scale", layer + "attention_norm.weight", "D"),
        Place("blocks/attention/query/weight", layer + "attention.wq.weight", "NI2 D"),
        Place("blocks/attention/key/weight", layer + "attention.wk.weight", "KI2 D"),
        Place("blocks/attention/value/weight", layer + "attention.wv.weight", "KH D"),
        Place("blocks/attention/out/weight", layer + "attention.wo.weight", "D NH"),
        Place("blocks/moe_norm/scale", layer + "ffn_norm.weight", "D"),
        Place("blocks/moe/router/gate/weight", layer + moe + ".gate.weight", "E D"),
        *(dataclasses.replace(place, tensor=f"{layer}{moe}.{place.tensor}") for place in experts),
        Place("norm/scale", "norm.weight", "D"),
        Place("unembed/weight", "output.weight", "V D"),
    )
    return Layout(name, places)


_EXPERTS = "blocks/moe/experts/"
_SEPARATE = (
    Place(_EXPERTS + "gate/weight", "experts.{E}.w1.weight", "F D"),
    Place(_EXPERTS + "down/weight", "experts.{E}.w2.weight", "D F"),
    Place(_EXPERTS + "up/weight", "experts.{E}.w3.weight", "F D"),
)
_FUSED = (
    Place(_EXPERTS + "gate/weight", "experts.gate_up_proj", "E 2F D", part=0),
    Place(_EXPERTS + "up/weight", "experts.gate_up_proj", "E 2F D", part=1),
    Place(_EXPERTS + "down/weight", "experts.down_proj", "E D F"),
)
_FLAT = (
    Place(_EXPERTS + "gate/weight", "w1", "EF D"),
    Place(_EXPERTS + "down/weight", "w2", "EF D"),
    Place(_EXPERTS + "up/weight", "w3", "EF D"),
)

# The two layouts that we write: transformers, vLLM and SGLang read the first, mistral-inference the
# second.
HUGGING_FACE = _hugging_face("Hugging Face, one tensor per expert", "block_sparse_moe", _SEPARATE)
MISTRAL = _mistral("Mistral's own", "feed_forward", _SEPARATE)
_WITH_PREFIX = (
    HUGGING_FACE,
    _hugging_face("Hugging Face, one tensor per expert, under mlp", "mlp", _SEPARATE),
    _hugging_face("Hugging Face, experts fused", "mlp", _FUSED),
    _hugging_face(
        "Hugging Face, experts fused, under block_sparse_moe", "block_sparse_moe", _FUSED
    ),
)


def _without_prefix(layout: Layout) -> Layout:
    places = (
        dataclasses.replace(place, tensor=place.tensor.removeprefix("model."))
        for place in layout.places
    )
    return Layout(f"{layout.name}, without the prefix model.", tuple(places))


LAYOUTS = (
    *_WITH_PREFIX,
    *map(_without_prefix, _WITH_PREFIX),
    MISTRAL,
    _mistral("megablocks", "block_sparse_moe", _FLAT),
)
