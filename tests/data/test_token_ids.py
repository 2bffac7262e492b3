"""Rows of token ids in place of text."""

import json

import pytest

from mixtral_jax.config import ConfigError, DataConfig
from mixtral_jax.data.text import prepare_text, tokenize_text
from tests.data.chat_cases import train_tokenizer


def test_a_row_may_hold_token_ids_in_place_of_text(tmp_path):
    tokenizer = train_tokenizer()
    texts = [f"a text of number {number}" for number in range(40)]
    ids = [tokenizer.encode(text) for text in texts]
    marked = [[tokenizer.bos_id, *ids[0], tokenizer.eos_id], *ids[1:]]
    stores = []
    for name, rows in (("texts", texts), ("ids", ids), ("marked", marked)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
        config = DataConfig(path=str(path), held_out_fraction=0.5)
        prepared = tokenize_text(config, tokenizer)
        both = (prepared.train, prepared.held_out)
        documents = [s.read(d).tokens.tolist() for s in both for d in range(s.num_documents)]
        stores.append(sorted(documents))
    assert stores[0] == stores[1] == stores[2]


def test_token_ids_that_cannot_be_are_refused(tmp_path):
    tokenizer = train_tokenizer()
    (tmp_path / "bad.jsonl").write_text('{"text": [1, -2]}\n{"text": [1, 2.5]}\n{"text": []}')
    with pytest.raises(ConfigError, match=r"3 of 3 rows are bad.*whole numbers from 0: found -2"):
        tokenize_text(DataConfig(path=str(tmp_path / "bad.jsonl")), tokenizer)
    large = tokenizer.vocab_size
    (tmp_path / "large.jsonl").write_text(f'{{"text": [1, {large}]}}\n{{"text": [1, 2]}}')
    with pytest.raises(ConfigError, match=f"token id {large} is not below the {large} pieces"):
        tokenize_text(DataConfig(path=str(tmp_path / "large.jsonl")), tokenizer)
    (tmp_path / "ids.jsonl").write_text('{"text": [1, 2]}\n{"text": [1, 3]}')
    config = DataConfig(path=str(tmp_path / "ids.jsonl"), tokenizer="train:300")
    with pytest.raises(ConfigError, match=r"set data\.tokenizer to the tokenizer that made them"):
        prepare_text(config, 300, tmp_path / "tokenizer.model")
