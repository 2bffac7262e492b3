"""Results of lm-evaluation-harness tasks equal scores computed from the logits.

Needs lm-eval, so only `make test-eval` runs these tests.
"""

import dataclasses
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import mixtral_jax
from mixtral_jax.config import ConfigError
from tests.cases import mesh_of
from tests.data.chat_cases import train_tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # The warnings of lm-eval are not our concern.
    lm_eval = pytest.importorskip("lm_eval", reason="make test-eval installs it")
    from lm_eval.api.instance import Instance
    from lm_eval.tasks import TaskManager

    from mixtral_jax.evaluate.harness import HarnessModel

pytestmark = pytest.mark.filterwarnings("ignore")
HF = Path(__file__).parents[1] / "golden" / "hf_tiny"

DOCS = [
    {"question": "the parser takes", "choices": ["two arguments", "a list", "no"], "answer": 1},
    {
        "question": "each option has a",
        "choices": ["default", "name and a help text that is long"],
        "answer": 0,
    },
    {"question": "", "choices": ["first", "second one"], "answer": 1},
]
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
ROLLING = """
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}} {{{{choices[0]}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
WRITING = """
task: local_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}} now"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 8}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def loaded():
    """The golden model on a mesh, with a tokenizer that fits in its vocabulary."""
    model = mixtral_jax.load_pretrained(HF, dtype="float32", mesh=mesh_of(expert=2, tensor=2))
    return dataclasses.replace(model, tokenizer=train_tokenizer())


@pytest.fixture(scope="module")
def results(loaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, DOCS)))
    for name, text in {"choice": CHOICE, "rolling": ROLLING, "writing": WRITING}.items():
        (folder / f"{name}.yaml").write_text(text.format(file=folder / "docs.jsonl"))
    return lm_eval.simple_evaluate(
        HarnessModel(loaded, max_length=64),
        tasks=["local_choice", "local_text", "local_writing"],
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )


def log_probabilities(loaded, ids):
    """The log-probability of each id after the first, given those before it, in float64."""
    logits = loaded.logits(np.pad([ids], ((0, 0), (0, 64 - len(ids)))))[0, : len(ids) - 1].astype(
        np.float64
    )
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return logits[np.arange(len(ids) - 1), ids[1:]]


def score(loaded, context, continuation):
    """The log-probability of `continuation` after `context`, by the tokens of both together."""
    first, whole = loaded.encode(context), loaded.encode(context + continuation)
    return log_probabilities(loaded, whole)[len(first) - 1 :].sum()


def test_multiple_choice_picks_the_likeliest_answer(loaded, results):
    right = []
    for doc, sample in zip(DOCS, results["samples"]["local_choice"], strict=True):
        delimiter = " "
        expected = [score(loaded, doc["question"], delimiter + choice) for choice in doc["choices"]]
        got = [float(answer[0]) for answer in sample["filtered_resps"]]
        np.testing.assert_allclose(got, expected, atol=2e-4)
        right.append(np.argmax(expected) == doc["answer"])
    assert results["results"]["local_choice"]["acc,none"] == pytest.approx(np.mean(right))


def test_rolling_text_is_scored_whole(loaded, results):
    texts = [f"{doc['question']} {doc['choices'][0]}" for doc in DOCS]
    nats = -sum(log_probabilities(loaded, loaded.encode(text)).sum() for text in texts)
    expected = nats / np.log(2) / sum(len(text.encode()) for text in texts)
    assert results["results"]["local_text"]["bits_per_byte,none"] == pytest.approx(
        expected, rel=1e-5
    )


def test_windows_of_a_long_text_see_as_much_as_they_can(loaded):
    text = "each option has a name and a default that is shown in the help text"
    ids = loaded.encode(text)
    size = 10
    expected = 0.0
    for first in range(1, len(ids), size):
        end = min(first + size, len(ids))
        begin = max(0, end - 1 - size)  # The last window also has earlier tokens.
        expected += log_probabilities(loaded, ids[begin:end])[-(end - first) :].sum()
    assert len(ids) > 2 * size and (len(ids) - 1) % size
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    got = HarnessModel(loaded, max_length=size).loglikelihood_rolling([request], disable_tqdm=True)
    assert got == [pytest.approx(expected, abs=2e-4)]


def test_writing_ends_before_the_strings_of_the_task(loaded, results):
    for doc, sample in zip(DOCS, results["samples"]["local_writing"], strict=True):
        expected = loaded.generate(f"{doc['question']} now", max_new_tokens=8, stop="e")
        assert sample["resps"] == [[expected]]


def test_repeats_differ_and_settings_without_a_meaning_are_refused(loaded):
    def ask(count, **asked):
        requests = [
            Instance("generate_until", {}, ("the", {"max_gen_toks": 8, **asked}), i)
            for i in range(count)
        ]
        return HarnessModel(loaded, max_length=64, batch_size=2).generate_until(
            requests, disable_tqdm=True
        )

    answers = ask(3, do_sample=True, temperature=1.5)
    assert len(set(answers)) == 3
    assert ask(3, do_sample=True, temperature=1.5) == answers
    # Tasks say how to sample also where they do not.
    assert ask(1, do_sample=False, top_p=0.9, top_k=5) == ask(1)
    with pytest.raises(ConfigError, match="num_beams"):
        ask(1, num_beams=2)


def test_a_long_context_loses_its_beginning_but_not_bos(loaded):
    context, continuation = "one two three four five six seven", " eight"
    request = Instance("loglikelihood", {}, (context, continuation), 0)
    ((got, _),) = HarnessModel(loaded, max_length=12).loglikelihood([request], disable_tqdm=True)
    first, whole = loaded.encode(context), loaded.encode(context + continuation)
    kept = [whole[0], *whole[-12:]]
    assert len(kept) < len(whole)
    assert got == pytest.approx(
        log_probabilities(loaded, kept)[-(len(whole) - len(first)) :].sum(), abs=2e-4
    )


@pytest.mark.parametrize(
    ("max_length", "max_new", "num_kept", "num_new"),
    [
        (64, 8, 24, 8),  # Both fit.
        (64, 256, 24, 40),  # The default of the harness.
        (25, 256, 24, 1),
        (24, 4, 20, 4),  # A context as long as the window is cut.
        (16, 256, 8, 8),
        (16, 4, 12, 4),
        (1, 1, 1, 0),
    ],
)
def test_a_context_is_kept_before_new_tokens_and_always_begins_with_bos(
    loaded, capsys, max_length, max_new, num_kept, num_new
):
    asked = []

    class Recorder:
        def generate(self, prompts, settings):
            asked.extend(zip(prompts, settings, strict=True))
            return [SimpleNamespace(text="") for _ in prompts]

    recording = dataclasses.replace(loaded)
    recording.__dict__["generator"] = Recorder()  # In place of the cached property.
    context = "one two three four five six"
    ids = loaded.encode(context)
    assert len(ids) == 24
    request = Instance("generate_until", {}, (context, {"max_gen_toks": max_new}), 0)
    model = HarnessModel(recording, max_length=max_length)
    if num_new == 0:
        with pytest.raises(ConfigError, match="max_length=1 "):
            model.generate_until([request], disable_tqdm=True)
        return
    assert model.generate_until([request], disable_tqdm=True) == [""]
    ((prompt, settings),) = asked
    assert prompt == [ids[0], *ids[len(ids) - num_kept + 1 :]]
    assert settings.max_new_tokens == num_new
    is_changed = (num_kept, num_new) != (24, max_new)
    assert ("1 of 1 contexts do not fit" in capsys.readouterr().err) == is_changed
