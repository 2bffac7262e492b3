"""Other programs' names and shapes for the parameters: a table for each layout, followed in both
directions.

What the tables mean is here, and which of them a set of tensors is in; `relayout` moves the
numbers.

- Hugging Face: a tensor an expert, as transformers 4 wrote and 5 still writes, or the experts of a
layer fused, as 5
  holds them; under `block_sparse_moe` or `mlp`; with or without the prefix `model.`.
- Mistral's own, of mistral-inference and mistral-finetune, and that of megablocks in Mistral's
repositories.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping

from mixtral_jax.checkpoint.files.stored import Order
from mixtral_jax.checkpoint.parameters import PARAMETERS, chunk_dimensions, dimension_sizes
from mixtral_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Place:
    """The tensors that hold a parameter.

    Dimensions are letters (the key is in `mixtral_jax.model`). Those in braces in `tensor` have a
    tensor for each index; `stored` has the others as that tensor has them, letters that are
    flattened into one dimension written together: "NH D" of an "LDNH" is a transposed [N * H, D].
    `2` is a dimension of size two: where H is written `2I` or `I2`, the halves of a rotary head;
    else two parameters in one tensor, of which this is number `part`.
    """

    parameter: str
    tensor: str
    stored: str
    part: int | None = None

    @property
    def dimensions(self) -> str:
        """The letters of the parameter."""
        return PARAMETERS[self.parameter]

    @property
    def stacked(self) -> str:
        """The leading dimensions of the parameter, which have a tensor for each index."""
        return "".join(letter for letter in self.dimensions if f"{{{letter}}}" in self.tensor)

    @property
    def has_halves(self) -> bool:
        """Whether `stored` tells the halves of rotary heads apart."""
        return "I" in self.stored

    @property
    def order(self) -> str:
        """The letters of `stored` in the order of the parameter; those of two parameters in one
        tensor come first.
        """
        letters = self.dimensions.removeprefix(self.stacked)
        letters = letters.replace("H", "2I") if self.has_halves else letters
        return letters if self.part is None else "2" + letters

    @property
    def chunk_order(self) -> Order | None:
        """How the numbers of a chunk of the parameter follow each other in a tensor, if that has a
        name.
        """
        letters = "".join(self.groups)
        places = [letters.find(letter) for letter in chunk_dimensions(self.parameter)]
        if self.has_halves or places not in (sorted(places), sorted(places, reverse=True)):
            return None
        return "C" if places == sorted(places) else "F"

    @property
    def groups(self) -> list[str]:
        """The letters of each dimension of a tensor."""
        return self.stored.split()

    def name(self, indices: Iterable[int]) -> str:
        """The tensor at these indices of the stacked dimensions."""
        return self.tensor.format(**dict(zip(self.stacked, indices, strict=True)))

    def tensor_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of each of its tensors."""
        return tuple(math.prod(sizes[letter] for letter in group) for group in self.groups)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a layout: its shape, and what is in it, at `indices` of the stacked dimensions."""

    shape: tuple[int, ...]
    indices: tuple[int, ...]
    places: tuple[Place, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A way of naming and shaping all the parameters; `name` is for people."""

    name: str
    places: tuple[Place, ...]

    def tensors(self, model: ModelConfig) -> dict[str, Tensor]:
        """All the tensors of a model by name, layer by layer."""
        sizes, tensors = letter_sizes(model), {}
        placed = [(indices, place) for place in self.places for indices in _indices(place, sizes)]
        for indices, place in sorted(placed, key=lambda item: item[0][:1]):
            name = place.name(indices)
            others = tensors[name].places if name in tensors else ()
            tensors[name] = Tensor(place.tensor_shape(sizes), indices, (*others, place))
        return tensors

    def count_tensors(self, model: ModelConfig) -> int:
        """How many tensors a model has, without naming them."""
        sizes = letter_sizes(model)
        stacked = {place.tensor: place.stacked for place in self.places}
        return sum(math.prod(sizes[letter] for letter in letters) for letters in stacked.values())


def letter_sizes(model: ModelConfig) -> dict[str, int]:
    """`dimension_sizes`, and those of the parts that `Place.stored` cuts dimensions into."""
    return dimension_sizes(model) | {"2": 2, "I": model.head_dim // 2}


def find_layout(names: Iterable[str]) -> Layout | None:
    """The layout that knows most of these tensors in layer 0 and outside of layers;

    None if none knows any.
    """
    found = set(names)

    def count_known(layout: Layout) -> int:
        return len({place.name([0] * len(place.stacked)) for place in layout.places} & found)

    best = max(LAYOUTS, key=count_known)
    return best if count_known(best) else None


def _indices(place: Place, sizes: Mapping[str, int]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(sizes[letter]) for letter in place.stacked))


def _hugging_face(name: str, moe: str, experts: tuple[Place, ...]) -> Layout:
    """`moe` names a layer's mixture of experts.

    Rotary pairs are (h, h + H/2), as ours: no row moves.
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
    """Rotary pairs are (2i, 2i + 1)."""
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

# What transformers, vLLM and SGLang read, and what mistral-inference reads: the two that are
# written.
HUGGING_FACE = _hugging_face("Hugging Face, a tensor an expert", "block_sparse_moe", _SEPARATE)
MISTRAL = _mistral("Mistral's own", "feed_forward", _SEPARATE)
_WITH_PREFIX = (
    HUGGING_FACE,
    _hugging_face("Hugging Face, a tensor an expert, under mlp", "mlp", _SEPARATE),
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
