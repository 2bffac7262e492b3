"""transformers loads the model, chat template and tokenizer that finetune_instruct.py exports.

Only `make test-parity` runs these tests: they need torch and transformers.
"""

import json

import pytest

from mixtral_jax.data.chat.template import ChatTemplate
from mixtral_jax.pretrained import load_pretrained
from tests.scripts import finish, start_tuning, write_chats, write_text

torch = pytest.importorskip(
    "torch", reason="parity needs torch and transformers: make test-parity installs them"
)
transformers = pytest.importorskip(
    "transformers", reason="parity needs transformers: make test-parity installs it"
)

ANIMALS = ("fox", "dog", "crow", "cat")
QUESTIONS = [
    [{"role": "user", "content": f"{number}: a {animal}?"}]
    for number in (1, 302)
    for animal in ANIMALS
]
# No message contains `</s>`: it stays text in our template, but ends a turn in transformers'.
TALKS = [
    [{"role": "system", "content": "Be  brief."}, *QUESTIONS[0]],
    [
        *QUESTIONS[1],
        {"role": "assistant", "content": "Quick dog."},
        {"role": "user", "content": " And\n\nnow?  "},
    ],
]
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The workdir of a run that has learnt enough for its answers to differ."""
    folder = tmp_path_factory.mktemp("tuning")
    write_text(folder)
    write_chats(folder)
    steps = (
        "--config.train.num_steps=80",
        "--config.finetune.pretrain.num_steps=20",
        "--config.train.eval_every=80",
    )
    code, _, errors = finish(start_tuning(folder, f"--workdir={folder / 'run'}", *steps))
    assert code == 0, errors
    return folder / "run"


@pytest.fixture(scope="module")
def theirs(workdir):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        workdir / "export", dtype=torch.float32
    )
    return model.eval(), transformers.AutoTokenizer.from_pretrained(workdir / "export")


@pytest.fixture(scope="module")
def ours(workdir):
    return load_pretrained(workdir / "export", "float32")


def test_the_chat_template_gives_our_ids(ours, theirs):
    template = ChatTemplate(ours.tokenizer)
    for talk in [*QUESTIONS, *TALKS]:
        expected = template.encode(talk, mode="serving").tokens.tolist()
        assert theirs[1].apply_chat_template(talk, tokenize=True, return_dict=False) == expected


def test_greedy_answers_agree_token_for_token(ours, theirs):
    model, tokenizer = theirs
    prompts = [
        ChatTemplate(ours.tokenizer).encode(talk, mode="serving").tokens.tolist()
        for talk in [*QUESTIONS, *TALKS]
    ]
    answers = ours.generate(prompts, max_new_tokens=NUM_TOKENS)
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            ids = model.generate(
                torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False
            )[0].tolist()
        assert [token for token in ids[len(prompt) :] if token != tokenizer.eos_token_id] == answer
    assert len({tuple(answer) for answer in answers}) > 1


def test_the_config_says_what_the_model_is(workdir):
    config = json.loads((workdir / "export" / "config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert config["num_local_experts"] == 4 and config["num_experts_per_tok"] == 2
