"""Random Mixtrals generate the same text as transformers, in a batch of prompts of unequal length.

Only `make test-parity` runs these tests: they need torch and transformers.
"""

import numpy as np
import pytest

import mixtral_jax
from tests.cases import mesh_of
from tests.parity.test_transformers import MESHES, SHAPES, random_model, torch

NUM_TOKENS = 24


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_greedy_continuations_are_those_of_transformers(tmp_path, shape):
    theirs = random_model(shape)
    theirs.save_pretrained(tmp_path)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, shape["vocab_size"], length).tolist() for length in (17, 5, 1)]
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    ids = theirs.generate(
        padded, attention_mask=mask, max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None
    )
    loaded = mixtral_jax.load_pretrained(
        tmp_path, mesh=mesh_of(**MESHES[shape["num_local_experts"]])
    )
    # Each folder has an EOS in its config, where ours end, and which theirs were told to pass over.
    end = theirs.config.eos_token_id
    expected = [[*row, end][: [*row, end].index(end)] for row in ids[:, longest:].tolist()]
    assert loaded.generate(prompts, max_new_tokens=NUM_TOKENS) == expected
    assert max(map(len, expected)) == NUM_TOKENS
