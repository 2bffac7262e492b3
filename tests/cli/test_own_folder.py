"""What a folder says beside its weights reaches people who ask its model."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from mixtral_jax.checkpoint.formats.chat_templates import CHAT_TEMPLATES
from mixtral_jax.checkpoint.formats.side_files import SideFiles
from mixtral_jax.cli.model_flags import ModelFlags, open_model
from mixtral_jax.config import ChatConfig, ConfigError, DataConfig, MeshConfig
from mixtral_jax.parallel.coordinator import Launch
from mixtral_jax.parallel.processes import Processes
from mixtral_jax.pretrained import load_pretrained
from mixtral_jax.runs.eval_data import EvalTask, open_task
from tests.cases import mesh_of
from tests.data.chat_cases import good_line, train_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "hf_tiny"


@pytest.fixture
def folder(tmp_path):
    """The golden folder, with a tokenizer that fits in its vocabulary."""
    shutil.copytree(GOLDEN, tmp_path / "model")
    train_tokenizer().save(tmp_path / "model" / "tokenizer.model")
    return tmp_path / "model"


def test_a_chat_and_its_evaluation_use_the_folders_own_template_if_it_is_known(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "chats.jsonl").write_bytes(b"\n".join(map(good_line, range(3))))
    loaded = load_pretrained(folder, mesh=mesh_of())

    def having(template):
        return dataclasses.replace(loaded, side_files=SideFiles(chat_template=template))

    def chat(template):
        asked = [{"role": "user", "content": "the parser"}]
        return having(template).chat(asked, max_new_tokens=1)

    def evaluate(of_folder, **named):
        data = DataConfig(path=str(tmp_path / "chats.jsonl"), chat=ChatConfig(**named))
        task = EvalTask(data, "all", True, 64, None)
        return open_task(having(of_folder), task, Processes()).plans[0].fingerprint

    for read in (chat, evaluate):
        with pytest.raises(ConfigError, match="template v3 needs a tokenizer"):
            read(CHAT_TEMPLATES["v3"])
        assert read(CHAT_TEMPLATES["v1"]) == read("{{ ours }}") == read(None)
    assert evaluate(CHAT_TEMPLATES["v3"], template="v1") == evaluate(None)


def test_notes_on_a_folder_are_printed_once_on_standard_error(folder, capsys):
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    asked = ModelFlags(folder, None, MeshConfig(cpu_devices=8), Launch(), {})
    opened = open_model(asked, Processes())
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("temperature=0.6") == 1
    assert captured.err == "".join(f"note: {note}\n" for note in opened.notes)
