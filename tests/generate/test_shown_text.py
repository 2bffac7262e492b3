"""Text shown piece by piece: whole characters, the whole text, nothing past a stop string."""

import itertools
import random

import pytest

from mixtral_jax.generate.text import TextStream
from tests.data.chat_cases import random_text, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def show(stream, ids, sizes):
    """The shown text after each push and at the end. `sizes` yields the number of ids per push."""
    shown = [stream.text]
    ids = list(ids)
    while ids and not stream.is_stopped:
        size = next(sizes)
        stream.push(ids[:size])
        ids = ids[size:]
        shown.append(stream.text)
    stream.finish()
    return [*shown, stream.text]


def decodable_text(rng, tokenizer):
    """A text that survives encoding and decoding. A `\u2581`, for example, becomes a space."""
    return tokenizer.decode(tokenizer.encode(random_text(rng)))


def sizes_of(rng):
    while True:
        yield rng.randint(1, 5)


def test_what_is_shown_only_grows_and_ends_as_the_whole_text(tokenizer):
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(decodable_text(rng, tokenizer) for _ in range(rng.randint(1, 20)))
        whole = tokenizer.encode(text)
        cut = rng.randint(0, len(whole))
        for context, ids in (([], whole), ([1], whole), (whole[:cut], whole[cut:])):
            shown = show(TextStream(tokenizer, context), ids, sizes_of(rng))
            assert all(longer.startswith(shorter) for shorter, longer in itertools.pairwise(shown))
            before = tokenizer.decode(context)
            if not before.endswith("\ufffd"):  # Skip cuts inside a character.
                assert before + shown[-1] == text


def test_text_goes_on_where_the_prompt_ended_with_its_space(tokenizer):
    prompt = tokenizer.encode("the parser")
    whole = tokenizer.encode("the parser takes  two  arguments")
    assert whole[: len(prompt)] == prompt
    stream = TextStream(tokenizer, [1, *prompt])
    stream.push(whole[len(prompt) :])
    assert stream.text == " takes  two  arguments"
    answer = TextStream(tokenizer)
    answer.push(whole[len(prompt) :])
    assert answer.text == "takes  two  arguments"


@pytest.mark.parametrize("character", ["é", "漢", "😀"])
def test_a_character_is_shown_when_its_last_byte_has_come(tokenizer, character):
    size = len(character.encode())
    ids = tokenizer.encode(f"a{character}b")
    assert len(ids) >= size + 2, "bytes are pieces of their own here"
    first = ids.index(next(token for token in ids if tokenizer.decode([token]) == "\ufffd"))
    stream = TextStream(tokenizer)
    for number, token in enumerate(ids[: first + size]):
        assert stream.text == "a"[:number]
        stream.push([token])
    assert stream.text == f"a{character}"


def test_bytes_that_are_no_character_are_held_back_no_longer_than_they_could_become_one(tokenizer):
    ids = tokenizer.encode("a😀")
    lone = ids[-1]
    stream = TextStream(tokenizer)
    stream.push([*tokenizer.encode("a"), *[lone] * 10])
    assert stream.text == "a" + "\ufffd" * 7
    stream.finish()
    assert stream.text == "a" + "\ufffd" * 10


def test_text_ends_before_the_first_stop_string_wherever_tokens_end(tokenizer):
    rng = random.Random(1)
    for _ in range(300):
        text = decodable_text(rng, tokenizer) * rng.randint(1, 4)
        begin = rng.randrange(len(text))
        stops = [text[begin : begin + rng.randint(1, 6)], "never there"]
        stream = TextStream(tokenizer, stop=stops)
        ids = tokenizer.encode(text)
        shown = show(stream, ids, sizes_of(rng))
        expected = text[: text.index(stops[0])]
        assert stream.is_stopped
        assert shown[-1] == expected
        assert all(expected.startswith(part) for part in shown)
        kept, longer = (tokenizer.decode(ids[: stream.num_ids + more]) for more in (0, 1))
        assert expected.startswith(kept)
        assert longer == kept or not expected.startswith(longer)


def test_what_may_begin_a_stop_string_is_shown_once_it_does_not(tokenizer):
    stream = TextStream(tokenizer, stop=["\n\nEND"])
    stream.push(tokenizer.encode("one\n\nEN"))
    assert stream.text == "one"
    stream.push(tokenizer.encode("X")[1:])
    assert (stream.text, stream.is_stopped) == ("one\n\nENX", False)
    held = TextStream(tokenizer, stop=["\n\nEND"])
    held.push(tokenizer.encode("one\n\nEN"))
    held.finish()
    assert (held.text, held.is_stopped) == ("one\n\nEN", False)


def test_the_earliest_of_several_stop_strings_counts(tokenizer):
    stream = TextStream(tokenizer, stop=["three", "two"])
    stream.push(tokenizer.encode("one two three"))
    assert stream.text == "one "
