"""Conversations about the Python library: deterministic, short, and held out by function."""

import sysconfig
from pathlib import Path

import pytest

from mixtral_jax.config import DataConfig
from mixtral_jax.data.chat.conversations import Chat, read_chats
from mixtral_jax.data.chat.stdlib_chat import make_conversations
from mixtral_jax.data.chat.template import ChatTemplate
from mixtral_jax.data.fingerprint import fingerprint_data
from mixtral_jax.data.stdlib import list_stdlib
from tests.data.chat_cases import train_tokenizer

SOURCE = '''
def shout(text, *, times, mark="!"):
    """Say it loudly.  And more."""

def quiet(text):
    """not a sentence"""

def _hidden():
    """Do what nobody should call."""

class Door:
    @property
    def colour(self):
        """Return the colour of the door."""

    def open(self, width: float = 1.0):
        """Open the door, if it can be opened."""

    @staticmethod
    def count(house):
        """Return how many doors there are."""
'''


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "house.py").write_text(SOURCE)
    (tmp_path / "_private.py").write_text(SOURCE)
    (tmp_path / "other.py").write_text("print 'of another Python'")
    files = sorted(tmp_path.glob("*.py"))
    assert list(make_conversations(tmp_path, files)) == list(make_conversations(tmp_path, files))
    return list(make_conversations(tmp_path, files))


def test_every_documented_function_is_asked_about_once_and_at_length(rows):
    assert [row["split_group"] for row in rows] == [
        name for name in ("house.shout", "house.Door.open", "house.Door.count") for _ in range(2)
    ]
    assert [len(row["messages"]) for row in rows] == [2, 6] * 3
    answers = [[message["content"] for message in row["messages"][1::2]] for row in rows]
    assert answers[1] == [
        "Say it loudly.",
        "`shout(text, *, times, mark='!')`",
        "`house.shout(text, times=times)`",
    ]
    assert answers[3] == [
        "Open the door, if it can be opened.",
        "`open(width=1.0)`",
        "`door.open()`",
    ]
    assert answers[5] == [
        "Return how many doors there are.",
        "`count(house)`",
        "`Door.count(house)`",
    ]
    for alone, together in zip(answers[::2], answers[1::2], strict=True):
        assert alone[0] in together


def test_questions_name_the_function(rows):
    assert all(row["split_group"] in row["messages"][0]["content"] for row in rows)


def test_a_few_modules_give_hundreds_of_good_rows():
    # Reads only modules whose names begin so: reading all takes seconds.
    files = [file for file in list_stdlib() if file.stem[0] in "ct"]
    rows = list(make_conversations(Path(sysconfig.get_path("stdlib")), files))
    assert len(rows) > 500
    (dedent,) = (
        row for row in rows if row["split_group"] == "textwrap.dedent" and len(row["messages"]) == 6
    )
    assert (
        dedent["messages"][1]["content"]
        == "Remove any common leading whitespace from every line in `text`."
    )
    assert dedent["messages"][3]["content"] == "`dedent(text)`"
    assert max(len(message["content"]) for row in rows for message in row["messages"]) < 160


def test_they_are_a_source(monkeypatch):
    files = [file for file in list_stdlib() if file.stem == "textwrap"]
    monkeypatch.setattr("mixtral_jax.data.sources.list_stdlib", lambda: files)
    chats = list(read_chats("python-stdlib-chat", ChatTemplate(train_tokenizer())))
    assert len(chats) > 4 and all(isinstance(chat, Chat) for chat in chats)
    assert chats[0].key == chats[1].key and chats[0].key.startswith("textwrap.")
    before = fingerprint_data(DataConfig(path="python-stdlib-chat"))
    monkeypatch.setattr("platform.python_version", lambda: "3.99")
    assert fingerprint_data(DataConfig(path="python-stdlib-chat")) != before
