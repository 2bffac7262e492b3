"""Continuations are those of transformers, with and without a cache, in any batch and mesh."""

import contextlib
import copy
import itertools
from pathlib import Path

import jax
import numpy as np
import pytest

import mixtral_jax
from mixtral_jax.config import ConfigError
from mixtral_jax.generate.cache import Cache, bucket
from mixtral_jax.generate.generator import Generator, Speed
from mixtral_jax.generate.settings import Settings
from tests.cases import RULES, cpu_model_maker, mesh_of, small_config

GOLDEN = Path(__file__).parents[1] / "golden"
SPREAD = {"fsdp": 2, "expert": 2, "tensor": 2}
LONGER = list(range(3, 60))
CONFIG = small_config(dispatch__grouped_matmul="auto")


def generator_of(config, mesh, tokenizer=None, context=512):
    with jax.set_mesh(mesh):
        return Generator(jax.jit(cpu_model_maker(config))(), mesh, tokenizer, context)


@pytest.fixture(scope="module")
def golden():
    """The prompt of row 0, and its greedy continuation in transformers."""
    with np.load(GOLDEN / "hf_tiny" / "expected.npz") as file:
        ids, prompt = file["greedy_ids_row0"].tolist(), file["input_ids"][0].tolist()
    assert ids[: len(prompt)] == prompt
    return prompt, ids[len(prompt) :]


@pytest.fixture(scope="module")
def small():
    """A generator of a small model on one device."""
    return generator_of(CONFIG, mesh_of())


def continue_without_cache(logits_of, prompt, count):
    """The greedy continuation, where each token comes from a run over all tokens before it."""
    ids = list(prompt)
    for _ in range(count):
        row = np.zeros((1, len(prompt) + count), np.int32)
        row[0, : len(ids)] = ids
        ids.append(int(logits_of(row)[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    ("folder", "sizes"),
    [
        ("mistral_tiny", {"expert": 4, "tensor": 2}),
        pytest.param("hf_tiny", {}, marks=pytest.mark.meshes),
        pytest.param("hf_tiny", {"expert": 4, "tensor": 2}, marks=pytest.mark.meshes),
    ],
)
def test_greedy_continuation_is_that_of_transformers(folder, sizes, golden):
    prompt, expected = golden
    loaded = mixtral_jax.load_pretrained(GOLDEN / folder, dtype="float32", mesh=mesh_of(**sizes))
    assert loaded.generate(prompt, max_new_tokens=len(expected)) == expected
    assert loaded.generate([LONGER, prompt, [1]], max_new_tokens=len(expected))[1] == expected
    assert continue_without_cache(loaded.logits, prompt, len(expected)) == expected


def test_cached_logits_are_those_of_a_run_over_everything():
    """Rows of different lengths get four tokens at once, then one at a time."""
    mesh = mesh_of(**SPREAD)
    rng = np.random.default_rng(0)
    lengths = np.array([9, 16, 5, 12, 16, 1, 7, 0])
    # The tokens of a row begin at column `16 - length`; the columns before it are padding.
    tokens = rng.integers(0, 96, (8, 16 + 7), dtype=np.int32)
    positions = np.arange(23)[None] - (16 - lengths[:, None])
    segments = ((positions >= 0) & (lengths[:, None] > 0)).astype(np.int32)
    positions = np.maximum(positions, 0).astype(np.int32)

    @jax.jit
    def begin(model, *rows):
        output = model.run_blocks(*rows, gives_key_values=True)
        return model.to_logits(output.x_BTD), Cache.begin(output.key_values, rows[2], 32)

    @jax.jit
    def go_on(model, cache, *rows):
        output = model.run_blocks(*rows, cache.past, gives_key_values=True)
        return model.to_logits(output.x_BTD), cache.append(output.key_values, rows[2])

    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        place = lambda x: jax.device_put(x, jax.NamedSharding(mesh, RULES.spec("batch", None)))  # noqa: E731
        model = jax.jit(cpu_model_maker(CONFIG))()
        cut = lambda begins, ends: (place(x[:, begins:ends]) for x in (tokens, positions, segments))  # noqa: E731
        expected = jax.jit(model)(*cut(0, 23)).logits_BTV
        logits, cache = begin(model, *cut(0, 16))
        parts = [logits]
        for begins, ends in itertools.pairwise([16, 20, 21, 22, 23]):
            logits, cache = go_on(model, cache, *cut(begins, ends))
            parts.append(logits)
    got = np.concatenate([np.asarray(part) for part in parts], axis=1)
    np.testing.assert_allclose(
        got[segments > 0], np.asarray(expected)[segments > 0], rtol=0, atol=2e-5
    )
    assert cache.length == 23
    assert not np.asarray(cache.past.segment_ids_BS)[:, 23:].any()
    keys = cache.past.key_values.k_BSKH
    num_row_shards, num_head_shards = mesh.size // mesh.shape["tensor"], mesh.shape["tensor"]
    shard_shape = (2, 8 // num_row_shards, 32, 2 // num_head_shards, 12)
    assert keys.addressable_shards[0].data.shape == shard_shape


def test_company_and_mesh_change_no_continuation(small):
    prompts = [[5], list(range(20)), [7, 8, 9], list(range(60, 96))]
    settings = [
        Settings(max_new_tokens=10, temperature=0.9, seed=3),
        Settings(max_new_tokens=6, temperature=1.2, top_k=20),
        Settings(max_new_tokens=9),
        Settings(max_new_tokens=10, temperature=0.7, top_p=0.8, seed=9),
    ]
    together = [row.ids for row in small.generate(prompts, settings)]
    assert [len(ids) for ids in together] == [10, 6, 9, 10]
    assert [row.ids for row in small.generate(prompts[::-1], settings[::-1])] == together[::-1]
    spread = generator_of(CONFIG, mesh_of(**SPREAD))
    assert [row.ids for row in spread.generate(prompts, settings)] == together


def test_looking_more_often_changes_nothing(small):
    settings = Settings(max_new_tokens=11, temperature=1.0)
    expected = small.generate([[1, 2, 3]], settings)[0].ids
    lengths = []
    for (row,) in small.stream([[1, 2, 3]], settings, tokens_at_once=4):
        lengths.append(len(row.ids))
    assert (row.ids, lengths) == (expected, [1, 5, 9, 11])


@contextlib.contextmanager
def compilations():
    """Counts the programs that XLA compiles in the block."""
    counted = []
    listener = lambda event, duration, **_: counted.append(event)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield lambda: counted.count("/jax/core/compile/backend_compile_duration")
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def test_each_program_is_compiled_once_for_a_bucket_of_sizes_and_not_counted_as_speed():
    # On two devices, batches of one and of two prompts have the same size.
    generator, speed = generator_of(CONFIG, mesh_of(expert=2)), Speed()
    with compilations() as count:
        generator.generate([[1] * 5, [1] * 7], Settings(max_new_tokens=6), speed)
        assert count() == 2
        assert (speed.prompt_tokens, speed.new_tokens) == (12, 10)
        assert 0 < speed.prefill_seconds + speed.decode_seconds < speed.compile_seconds
        for length, new, prompts in [(1, 2, 1), (16, 16, 2), (9, 12, 2)]:
            generator.generate([[1] * length] * prompts, Settings(max_new_tokens=new))
        assert count() == 2
        generator.generate([[1] * 17], Settings(max_new_tokens=3))
        generator.generate([[1] * 32], Settings(max_new_tokens=32))
        assert count() == 4
        for settings in (
            {"temperature": 1.0},
            {"temperature": 0.5, "top_k": 3, "top_p": 0.5, "seed": 8},
        ):
            generator.generate([[1]], Settings(max_new_tokens=3, **settings))
        assert count() == 6
    assert "12 tokens" in str(speed) and "10 tokens" in str(speed)


def test_a_cache_is_written_in_place(small):
    settings = Settings(max_new_tokens=40)
    states = []
    decode = small._decode
    small._decode = lambda state, *rest: states.append(state) or decode(state, *rest)
    try:
        small.generate([[1]], settings)
    finally:
        del small._decode
    assert len(states) == 2
    for state in states:
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.cache.past.key_values))


class Numbers:
    """A tokenizer with 50 pieces for a model with 96 ids. It writes an id as number and space."""

    vocab_size, bos_id, eos_id, unused_ids = 50, 1, -1, ()

    def decode(self, ids):
        return "".join(f"{token} " for token in ids)


@pytest.fixture(scope="module")
def numbered(small):
    """The generator of the small model with such a tokenizer; copies share compiled programs."""
    return Generator(small.model, small.mesh, Numbers(), 512)


def test_a_row_ends_at_the_end_of_text_or_a_stop_string_and_the_others_go_on(numbered):
    generator = copy.copy(numbered)
    tokenizer = generator.tokenizer = Numbers()
    prompts = [[1, 2], [3]]
    first, second = (row.ids for row in generator.generate(prompts, Settings(max_new_tokens=12)))
    assert max(first + second) < 50, "ids without a piece are never written"

    place = next(i for i in range(1, 12) if first[i] not in first[:i])
    tokenizer.eos_id = first[place]
    row, other = generator.generate(prompts, Settings(max_new_tokens=12))
    assert (row.ids, row.text, row.finish_reason) == (
        first[:place],
        tokenizer.decode(first[:place]),
        "stop",
    )
    assert other.ids == [*second, first[place]][: [*second, first[place]].index(first[place])]

    tokenizer.eos_id = -1
    place = next(i for i in range(1, 12) if second[i] not in second[:i])
    settings = [
        Settings(max_new_tokens=2),
        Settings(max_new_tokens=12, stop=(f" {second[place]} ",)),
    ]
    row, other = generator.generate(prompts, settings)
    assert (row.ids, row.finish_reason) == (first[:2], "length")
    assert (other.text, other.finish_reason) == (tokenizer.decode(second[:place])[:-1], "stop")


@pytest.mark.parametrize("name", ["small", "numbered"])
def test_a_row_ends_at_each_of_several_ids_with_and_without_a_tokenizer(name, request):
    free = request.getfixturevalue(name)
    prompts, settings = [[1, 2], [3]], Settings(max_new_tokens=12)
    ids = [row.ids for row in free.generate(prompts, settings)]
    ends = {next(token for token in row if row.index(token) >= 1) for row in ids}
    ended = Generator(free.model, free.mesh, free.tokenizer, 512, ends)
    for before, row in zip(ids, ended.generate(prompts, settings), strict=True):
        place = min(before.index(token) for token in ends if token in before)
        assert (row.ids, row.finish_reason) == (before[:place], "stop")


def test_unused_ids_are_never_written(numbered):
    def write(generator):
        rows = generator.generate([[1, 2], [3]], Settings(max_new_tokens=12))
        return {token for row in rows for token in row.ids}

    written, generator = write(numbered), copy.copy(numbered)
    generator.tokenizer = Numbers()
    generator.tokenizer.unused_ids = tuple(written)
    assert not written & write(generator)


def test_a_continuation_ends_at_the_context(small):
    short = copy.copy(small)  # It shares the compiled programs.
    short.context = 50
    row = short.generate([[1] * 10], Settings(max_new_tokens=45))[0]
    assert (len(row.ids), row.finish_reason) == (40, "length")
    with pytest.raises(ConfigError, match=r"50 tokens.*context of 50"):
        short.generate([[1] * 50], Settings())


@pytest.mark.parametrize(
    ("prompts", "settings", "words"),
    [
        ([], {}, "at least one prompt"),
        ([[]], {}, "at least one token"),
        ([[96]], {}, "id 96.*are 0 to 95"),
        ([[3, -1]], {}, "id -1"),
        ([[1]], {"stop": ("x",)}, "tokenizer"),
        ([[1]], {"stop": ("",)}, "empty"),
        ([[1]], {"temperature": -1.0}, "temperature=-1.0"),
        ([[1]], {"temperature": float("nan")}, "temperature=nan"),
        ([[1]], {"top_p": 0.0}, "top_p=0.0"),
        ([[1]], {"top_p": 1.5}, "top_p=1.5"),
        ([[1]], {"top_k": -1}, "top_k=-1"),
        ([[1]], {"top_p": 0.9}, "top_p=0.9 and top_k=0 .* set a temperature"),
        ([[1]], {"top_k": 5, "temperature": 0}, "top_p=1.0 and top_k=5 .* set a temperature"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"seed": -1}, "seed=-1"),
    ],
)
def test_what_cannot_be_continued_is_refused(small, prompts, settings, words):
    with pytest.raises(ConfigError, match=words):
        small.generate(prompts, Settings(**settings))


def test_sizes_of_buckets_are_few_and_near():
    expected = {1: 16, 16: 16, 17: 32, 1000: 1024, 1025: 1536, 2049: 2560, 32_768: 32_768}
    assert {length: bucket(length) for length in expected} == expected
    sizes = {bucket(length) for length in range(1, 65_537)}
    assert len(sizes) < 40
    assert all(length <= bucket(length) <= max(16, 2 * length) for length in range(1, 4096))
    # Attention works on blocks of 512 queries, and would compute other lengths in one piece.
    assert all(size % 512 == 0 for size in sizes if size > 512)
