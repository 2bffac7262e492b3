"""What is told of tokens besides their ids."""

import json

import numpy as np
import pytest

from mixtral_jax.config import DataConfig
from mixtral_jax.data.batches import spread_batches, spread_labels
from mixtral_jax.data.domains import TOP_LEVEL, Category
from mixtral_jax.data.labels import OTHER, find_labellings
from mixtral_jax.data.packing import plan_rows
from mixtral_jax.data.python_parts import PARTS, find_parts
from mixtral_jax.data.store import TokenStore
from mixtral_jax.data.text import tokenize_text
from tests.cases import RULES, mesh_of
from tests.data.chat_cases import train_tokenizer

SOURCE = '''"""Of a module, \u00e9."""
import os  # why
def f(x):
    "Of a function."
    return "no docstring" + x  # \u6f22
'''


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def cut(source, part):
    """The texts of a part of a source, end to end."""
    return (
        np.frombuffer(source.encode(), np.uint8)[find_parts(source) == PARTS.index(part)]
        .tobytes()
        .decode()
    )


def test_every_byte_of_a_source_has_its_part():
    assert cut(SOURCE, "comments") == "# why# \u6f22"
    assert cut(SOURCE, "docstrings") == '"""Of a module, \u00e9.""""Of a function."'
    assert cut(SOURCE, "other strings") == '"no docstring"'
    assert cut(SOURCE, "code").startswith("\nimport os  \ndef f(x):\n")
    assert len(find_parts(SOURCE)) == len(SOURCE.encode())


def test_a_source_that_python_cannot_read_has_no_parts():
    assert find_parts("def f(:\n  '''open") is None


def prepare(tokenizer, folder, **data):
    config = DataConfig(path=str(folder), held_out_fraction=0.5, **data)
    return tokenize_text(config, tokenizer)


def names_of_documents(store, labelling):
    """The one name that all tokens of each document have, by the document's text."""
    labels = [labelling.label(store, document) for document in range(store.num_documents)]
    return [{labelling.names[label - 1] for label in each} for each in labels]


def test_a_document_is_of_the_folder_or_the_file_that_it_lies_in(tokenizer, tmp_path):
    for name in ("books/deep/one.txt", "books/two.txt", "three.txt", "web.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        texts = [f"{name} text {n}" for n in range(8)]
        (tmp_path / name).write_text("\n".join(json.dumps({"text": text}) for text in texts))
    text = prepare(tokenizer, tmp_path)
    stores = [text.train, text.held_out]
    labelling, _ = find_labellings(stores, DataConfig(path=str(tmp_path)), tokenizer)
    assert (labelling.title, set(labelling.names)) == ("domain", {"books", TOP_LEVEL, "web.jsonl"})
    for store in stores:
        for document, names in enumerate(names_of_documents(store, labelling)):
            read = tokenizer.decode(store.read(document).tokens)
            expected = "books" if "books" in read else TOP_LEVEL if "three" in read else "web.jsonl"
            assert names == {expected}


def test_a_document_is_of_the_type_of_its_file_and_only_python_has_parts_of_python(
    tokenizer, tmp_path
):
    for number in range(6):
        (tmp_path / f"{number}.py").write_text(f'"""Module {number}."""\nx = {number}  # py\n')
        (tmp_path / f"{number}.md").write_text(f"# Title {number}\n\n'md'\n")
        (tmp_path / f"{number}.rst").write_text(f"Not asked for {number}")
    text = prepare(tokenizer, tmp_path, suffixes=".py,.md")
    file_type, part = find_labellings(
        [text.train, text.held_out], DataConfig(path=str(tmp_path)), tokenizer
    )
    assert (file_type.title, set(file_type.names)) == ("file type", {".py", ".md"})
    assert (part.title, part.names) == ("part of the Python source", PARTS)
    assert text.train.num_documents + text.held_out.num_documents == 12
    for store in (text.train, text.held_out):
        for document, names in enumerate(names_of_documents(store, file_type)):
            is_python = "py" in tokenizer.decode(store.read(document).tokens)
            assert names == {".py" if is_python else ".md"}
            assert set(part.label(store, document).tolist()) == ({0, 1, 2, 3} if is_python else {0})


def test_a_field_of_rows_says_what_they_are_and_the_rarest_are_others(tokenizer, tmp_path):
    rows = [{"text": f"{n} " * (20 - n % 12), "lang": f"l{n % 12:02}"} for n in range(120)]
    rows += [{"text": "no field"}, {"text": "null", "lang": None}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = prepare(tokenizer, tmp_path, domain_field="lang")
    stores = [text.train, text.held_out]
    domains = {category.domain for store in stores for category in store.category_names}
    assert domains == {"", *(f"l{n:02}" for n in range(12))}
    (labelling,) = find_labellings(stores, DataConfig(path=str(tmp_path)), tokenizer)
    assert (
        len(labelling.names) == 8 and labelling.names[0] == "l00" and labelling.names[-1] == OTHER
    )
    found = set().union(
        *(names for store in stores for names in names_of_documents(store, labelling))
    )
    assert found == set(labelling.names)


def test_sources_tell_documents_apart_and_one_domain_alone_does_not(tokenizer, tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    path = f"{tmp_path / 'a.txt'},{tmp_path / 'b.txt'}"
    text = tokenize_text(DataConfig(path=path), tokenizer)
    (labelling,) = find_labellings([text.train, text.held_out], DataConfig(path=path), tokenizer)
    for store in (text.train, text.held_out):
        ((name,),) = names_of_documents(store, labelling)
        assert name.endswith("a.txt") == ("a.txt" in tokenizer.decode(store.tokens))


def encode(tokenizer, source):
    return np.array([tokenizer.bos_id, *tokenizer.encode(source), tokenizer.eos_id])


def test_a_token_of_a_python_source_is_of_the_part_that_its_last_byte_is_in(tokenizer):
    ids = encode(tokenizer, SOURCE)
    category = Category(file_type=".py")
    store = TokenStore(ids, np.array([0, len(ids)]), "one", None, (1,), np.array([0]), (category,))
    (labelling,) = find_labellings([store], DataConfig(path="module.py"), tokenizer)
    labels = labelling.label(store, 0)
    parts, end = find_parts(SOURCE), -tokenizer.prefix_bytes
    for token, label in zip(ids, labels, strict=True):
        end += int(tokenizer.bytes_per_token[token])
        has_text = tokenizer.bytes_per_token[token] and end > 0
        assert label == (1 + parts[end - 1] if has_text else 0)
    assert set(labels.tolist()) == {0, 1, 2, 3, 4}


def test_prompts_and_answers_are_told_apart(tokenizer):
    mask = np.array([0, 0, 1, 1, 0, 1], np.uint8)
    store = TokenStore(np.arange(6), np.array([0, 4, 6]), "chats", mask, (2,))
    (labelling,) = find_labellings([store], DataConfig(path="chats.jsonl"), tokenizer)
    assert labelling.names == ("prompt", "answer")
    assert labelling.label(store, 0).tolist() == [1, 1, 2, 2] and labelling.label(
        store, 1
    ).tolist() == [1, 2]


@pytest.mark.parametrize("sizes", [{}, {"expert": 4, "fsdp": 2}])
def test_labels_lie_beside_their_tokens_on_every_mesh(sizes):
    lengths = np.random.default_rng(0).integers(3, 40, 30)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    store = TokenStore(np.arange(1, offsets[-1] + 1), offsets, "counted")
    plan = plan_rows(store, 16)
    layout = {"num_sequences": 21, "batch_size": 8, "mesh": mesh_of(**sizes), "rules": RULES}
    label = [lambda d: store.read(d).tokens % 7, lambda d: np.full(lengths[d], d)]
    batches = list(spread_batches(store, plan, **layout))
    for batch, labels in zip(batches, spread_labels(label, plan, **layout), strict=True):
        tokens = np.asarray(batch.tokens[0])
        documents = np.searchsorted(offsets, tokens - 1, side="right") - 1
        is_real = np.asarray(batch.segment_ids[0]) > 0
        np.testing.assert_array_equal(labels, np.where(is_real, [tokens % 7, documents], 0))
    assert not is_real.all()
