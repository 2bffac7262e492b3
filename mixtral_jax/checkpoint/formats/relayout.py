"""Converts between another program's tensors and our parameters, in both directions and lazily.

Creating the result reads nothing. When a block of it is read, the numbers are read from the other
side and rearranged: dimensions are transposed, flattened ones are split, and rows of rotary heads
are moved, as the tables in `layouts` say.
"""

import functools
import itertools
from collections.abc import Iterable, Mapping

import numpy as np

from mixtral_jax.checkpoint.files.file_tensor import FileTensor
from mixtral_jax.checkpoint.files.stored import Block, StoredArray, copy_into, scratch, shape_of
from mixtral_jax.checkpoint.formats.layouts import Layout, Place, Tensor, letter_sizes
from mixtral_jax.checkpoint.formats.parameters import PARAMETERS, parameter_chunk, parameter_shape
from mixtral_jax.config import ModelConfig, require

Sizes = Mapping[str, int]


def as_parameters(
    layout: Layout, tensors: Mapping[str, FileTensor], model: ModelConfig
) -> dict[str, StoredArray]:
    """Our parameters by name, from all the tensors of `layout`.

    A parameter has the widest dtype among the tensors that hold it.
    """
    sizes, names = letter_sizes(model), {}
    for name, tensor in layout.tensors(model).items():
        for place in tensor.places:
            names.setdefault(place.parameter, []).append(name)
    places = {place.parameter: place for place in layout.places}
    parameters = {}
    for parameter in PARAMETERS:
        mine = [tensors[name] for name in names[parameter]]
        dtype = _widest(tensor.dtype for tensor in mine)
        parameters[parameter] = StoredArray(
            parameter_shape(parameter, model),
            dtype,
            parameter_chunk(parameter, model),
            functools.partial(_read_parameter, places[parameter], tensors, sizes),
            f"{mine[0].path}: {places[parameter].tensor}",
            places[parameter].chunk_order,
        )
    return parameters


def as_tensors(
    layout: Layout, parameters: Mapping[str, StoredArray], model: ModelConfig
) -> dict[str, StoredArray]:
    """The tensors of `layout` by name, layer by layer, from all our parameters.

    Raises:
        ConfigError: the layout has no place for a parameter, or has one for a missing parameter.
    """
    differing = sorted(parameters.keys() ^ {place.parameter for place in layout.places})
    require(
        not differing,
        f"{layout.name}: its places and the parameters of the model differ by "
        f"{', '.join(differing)}: add a Place for each parameter, or leave the parameter out",
    )
    sizes, tensors = letter_sizes(model), {}
    for name, tensor in layout.tensors(model).items():
        mine = [parameters[place.parameter] for place in tensor.places]
        dtype = _widest(parameter.dtype for parameter in mine)
        read = functools.partial(_read_tensor, tensor, parameters, sizes)
        tensors[name] = StoredArray(tensor.shape, dtype, tensor.shape, read, mine[0].name)
    return tensors


def _widest(dtypes: Iterable[np.dtype]) -> np.dtype:
    return functools.reduce(np.promote_types, dtypes)


def _read_parameter(
    place: Place, tensors: Mapping[str, FileTensor], sizes: Sizes, block: Block, target: np.ndarray
) -> None:
    ranges = {
        letter: range(part.start, part.stop)
        for letter, part in zip(place.dimensions, block, strict=True)
    }
    assert not place.has_halves or len(ranges["H"]) == sizes["H"], "a rotary head is never cut"
    ranges |= {"2": _part_range(place), "I": range(sizes["I"])}
    lettered = target.reshape(
        [len(ranges[letter]) for letter in place.stacked + place.order], copy=False
    )
    for at in itertools.product(*(enumerate(ranges[letter]) for letter in place.stacked)):
        tensor = tensors[place.name([index for _, index in at])]
        tensor = tensor.split(_split_shape(place, sizes)).transpose(_transposition(place))
        part = tensor.cut([ranges[letter] for letter in place.order])
        part.read_into(lettered[tuple(local for local, _ in at)])


def _read_tensor(
    tensor: Tensor,
    parameters: Mapping[str, StoredArray],
    sizes: Sizes,
    block: Block,
    target: np.ndarray,
) -> None:
    whole = target if target.shape == tensor.shape else np.empty(tensor.shape, target.dtype)
    for place in tensor.places:
        starts = dict(zip(place.stacked, tensor.indices, strict=True))
        ends = {letter: start + 1 for letter, start in starts.items()}
        part = [
            slice(starts.get(letter, 0), ends.get(letter, sizes[letter]))
            for letter in place.dimensions
        ]
        lettered = whole.reshape(list(itertools.chain(*_split_shape(place, sizes))), copy=False)
        lettered = lettered.transpose(_transposition(place))
        if place.part is not None:
            lettered = lettered[place.part : place.part + 1]
        parameter = parameters[place.parameter]
        source = scratch("parameter", shape_of(tuple(part)), parameter.dtype, parameter.order)
        parameter.read_into(tuple(part), source)
        copy_into(lettered, source.reshape(lettered.shape))
    if whole is not target:
        target[...] = whole[block]


def _part_range(place: Place) -> range:
    return range(2) if place.part is None else range(place.part, place.part + 1)


def _split_shape(place: Place, sizes: Sizes) -> list[list[int]]:
    return [[sizes[letter] for letter in group] for group in place.groups]


def _transposition(place: Place) -> list[int]:
    """The order of the tensor's letters that gives the parameter's letters."""
    letters = "".join(place.groups)
    return [letters.index(letter) for letter in place.order]
