"""The tables of layouts are complete, work in both directions, and match other programs' files."""

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mixtral_jax.checkpoint.files import safetensors
from mixtral_jax.checkpoint.files.stored import blocks_of
from mixtral_jax.checkpoint.formats.layouts import (
    HUGGING_FACE,
    LAYOUTS,
    MISTRAL,
    Layout,
    find_layout,
)
from mixtral_jax.checkpoint.formats.parameters import PARAMETERS, parameter_chunk, parameter_shape
from mixtral_jax.checkpoint.formats.relayout import as_parameters
from mixtral_jax.checkpoint.on_devices import parameter_name
from mixtral_jax.checkpoint.weights import open_weights
from mixtral_jax.config import ConfigError
from tests.cases import cpu_model_maker, mesh_of
from tests.checkpoint.folders import SMALL, architecture_of, random_parameters, tensors_of

GOLDEN = Path(__file__).parents[1] / "golden"


def test_the_parameters_are_those_of_the_model():
    with jax.set_mesh(mesh_of()):
        shapes = jax.eval_shape(cpu_model_maker(architecture_of(SMALL).config()))
    found = {
        parameter_name(path): leaf.shape for path, leaf in jax.tree.flatten_with_path(shapes)[0]
    }
    assert found == {name: parameter_shape(name, SMALL) for name in PARAMETERS}


def test_a_chunk_is_what_one_layer_and_one_expert_have():
    assert parameter_chunk("blocks/moe/experts/down/weight", SMALL) == (1, 1, 10, 12)
    assert parameter_chunk("blocks/moe/router/gate/weight", SMALL) == (1, 12, 5)
    assert parameter_chunk("unembed/weight", SMALL) == (12, 21)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_layout_places_every_parameter_once_and_is_told_by_its_names(layout):
    assert sorted(place.parameter for place in layout.places) == sorted(PARAMETERS)
    tensors = layout.tensors(SMALL)
    assert layout.count_tensors(SMALL) == len(tensors)
    assert find_layout(tensors) is layout


@pytest.mark.parametrize(
    ("layout", "file"),
    [
        (HUGGING_FACE, "hf_tiny/model.safetensors"),
        (MISTRAL, "mistral_tiny/consolidated.safetensors"),
    ],
)
def test_names_and_shapes_are_those_of_files_that_other_programs_wrote(layout, file):
    model = open_weights(GOLDEN / "hf_tiny").architecture.model
    theirs = {name: tensor.shape for name, tensor in load_file(GOLDEN / file).items()}
    assert {name: tensor.shape for name, tensor in layout.tensors(model).items()} == theirs


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_parameters_come_back_from_every_layout_whole_and_in_blocks(layout, tmp_path):
    parameters = random_parameters(SMALL)
    save_file(tensors_of(layout, parameters, SMALL), tmp_path / "weights.safetensors")
    found = as_parameters(layout, safetensors.open_file(tmp_path / "weights.safetensors"), SMALL)
    assert list(found) == list(PARAMETERS)
    for name, expected in parameters.items():
        stored = found[name]
        np.testing.assert_array_equal(stored.read(stored.whole), expected, err_msg=name)
        # Blocks like those that a device holds: heads are never cut.
        parts = [
            2 if letter in "DFVE" else size
            for letter, size in zip(PARAMETERS[name], expected.shape, strict=True)
        ]
        for block in blocks_of(stored.shape, tuple(parts)):
            np.testing.assert_array_equal(stored.read(block), expected[block], err_msg=name)


def test_a_parameter_without_a_place_is_not_dropped():
    parameters = random_parameters(SMALL)
    del parameters["norm/scale"]
    with pytest.raises(ConfigError, match="differ by norm/scale: add a Place"):
        tensors_of(MISTRAL, parameters, SMALL)
    parameters = random_parameters(SMALL)
    places = [place for place in MISTRAL.places if place.parameter != "norm/scale"]
    with pytest.raises(ConfigError, match="differ by norm/scale: add a Place"):
        tensors_of(Layout("short", tuple(places)), parameters, SMALL)


def test_rows_of_rotary_heads_are_interleaved_for_mistral():
    """The pair (h, h + H/2) of a head becomes (2h, 2h + 1)."""
    query_LDNH = random_parameters(SMALL)["blocks/attention/query/weight"]
    tensor = tensors_of(MISTRAL, random_parameters(SMALL), SMALL)["layers.1.attention.wq.weight"]
    H = SMALL.head_dim
    for head in range(SMALL.num_heads):
        for h in range(H // 2):
            np.testing.assert_array_equal(tensor[head * H + 2 * h], query_LDNH[1, :, head, h])
            np.testing.assert_array_equal(
                tensor[head * H + 2 * h + 1], query_LDNH[1, :, head, h + H // 2]
            )


def test_fused_experts_have_their_gate_first():
    """As in the memory of transformers 5."""
    parameters = random_parameters(SMALL)
    fused = next(
        layout for layout in LAYOUTS if "mlp.experts.gate_up_proj" in layout.places[8].tensor
    )
    tensor_EFD = tensors_of(fused, parameters, SMALL)["model.layers.0.mlp.experts.gate_up_proj"]
    gate_EFD, up_EFD = np.split(tensor_EFD, 2, axis=1)
    np.testing.assert_array_equal(
        gate_EFD, parameters["blocks/moe/experts/gate/weight"][0].swapaxes(1, 2)
    )
    np.testing.assert_array_equal(
        up_EFD, parameters["blocks/moe/experts/up/weight"][0].swapaxes(1, 2)
    )
