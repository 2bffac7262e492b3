"""The programs of generation, compiled for TPUs that are not here: `make test-tpu`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.generate.programs import Rule, decode, prefill
from mixtral_jax.generate.sampler import Sampling
from mixtral_jax.kernels.choose import choose_kernels
from mixtral_jax.model.transformer import model_maker
from mixtral_jax.parallel.mesh import make_mesh, resolve_mesh
from mixtral_jax.plan.topology import open_target, parse_topology
from tests.cases import RULES, small_config

pytest.importorskip("libtpu")
B, T, SLOTS = 4, 256, 1024
D, F = 512, 1024


@functools.cache
def compiled() -> dict[str, Any]:
    """Prefill, greedy decode and sampled decode, compiled for four chips with two experts each."""
    sizes = {
        "hidden_size": D,
        "intermediate_size": F,
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 128,
    }
    sizes |= {"vocab_size": 2048, "dtype": "bfloat16", "param_dtype": "bfloat16"}
    train = {"train__sequence_length": SLOTS}
    config = small_config(
        mesh__expert=4, **train, **{f"model__{name}": size for name, size in sizes.items()}
    )
    config = resolve_mesh(config, 4)
    mesh = make_mesh(
        config.mesh, open_target(parse_topology("v5p:2x2x1"), cpu_fallback=False).devices
    )

    def on_mesh(leaf):
        spec = leaf.sharding.spec if leaf.sharding else jax.P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, spec))

    def row(shape, dtype):
        spec = RULES.spec("batch", *(None,) * (len(shape) - 1))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        make_model = model_maker(config, choose_kernels(config, "tpu"))
        model = jax.tree.map(on_mesh, jax.eval_shape(make_model))
        draws = Sampling(
            *(row((B,), dtype) for dtype in (jnp.float32, jnp.float32, jnp.int32, jnp.uint32))
        )
        rules = {
            name: Rule(how, np.array([2, 7], np.int32), 2048)
            for name, how in (("greedy", None), ("drawn", draws))
        }
        prompts = (model, row((B, T), jnp.int32), row((B,), jnp.int32), rules["greedy"])
        read = functools.partial(prefill, num_slots=SLOTS)
        state = jax.tree.map(on_mesh, jax.eval_shape(read, *prompts).state)
        write = jax.jit(functools.partial(decode, room=32), donate_argnames="state")
        programs = {
            name: write.lower(model, state, row((B,), jnp.bool_), rule, np.int32(32))
            for name, rule in rules.items()
        } | {"prefill": jax.jit(read).lower(*prompts)}
        return {name: program.compile() for name, program in programs.items()}


@pytest.mark.parametrize("name", ["greedy", "drawn"])
def test_decoding_writes_the_cache_in_place_and_copies_no_layers_experts(name):
    program = compiled()[name]
    # Keys and values, two layers, two heads of size 128, bfloat16.
    cache = 2 * 2 * (B // 4) * SLOTS * 2 * 128 * 2
    assert program.memory_analysis().alias_size_in_bytes >= cache
    text = program.as_text()
    # A chip has two layers of two experts, which the kernel sees as one layer of four.
    assert f"bf16[4,{D},{F}]" in text
    assert f"dynamic_slice_sizes={{1,2,{D},{F}}}" not in text


def test_prompts_are_read_by_flash_attention():
    assert "splash" in compiled()["prefill"].as_text()
