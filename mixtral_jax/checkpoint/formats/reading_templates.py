"""Reads the chat templates of another program's folder as texts, which are never run."""

import dataclasses
from pathlib import Path
from typing import Any

from mixtral_jax.checkpoint.files.foreign_folder import (
    find_file,
    read_bytes,
    read_object,
    require_kind,
)
from mixtral_jax.config import ConfigError, require

_JINJA, _MORE = "chat_template.jinja", "additional_chat_templates"


@dataclasses.dataclass(frozen=True)
class FoundTemplate:
    """The chat template of a folder.

    Attributes:
        text: None if there is none.
        notes: on templates with other names, which are not read.
    """

    text: str | None
    notes: tuple[str, ...]


def read_template(folder: Path) -> FoundTemplate:
    """Reads the template, of three files that may have it.

    Raises:
        ConfigError: files disagree, or a template is no text.
    """
    found: dict[str, str] = {}
    others = {_MORE: {path.stem for path in (folder / _MORE).glob("*.jinja")}}
    for file in ("tokenizer_config.json", "chat_template.json"):
        if (path := find_file(folder, file)) is None:
            continue
        template = read_object(path).get("chat_template")
        if isinstance(template, list):
            named = _by_name(path, template)
            template, others[file] = named.get("default"), named.keys() - {"default"}
        if template is not None:
            require_kind(path, "chat_template", template, str)
            found[file] = template
    if path := find_file(folder, _JINJA):
        try:
            found[_JINJA] = read_bytes(path).decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 ({error}): copy it again") from None
    require(
        len({template.strip() for template in found.values()}) <= 1,
        f"{folder}: the chat templates in {' and '.join(found)} differ: remove the wrong one",
    )
    notes = (_describe(file, sorted(names)) for file, names in others.items() if names)
    return FoundTemplate(next(iter(found.values()), None), tuple(notes))


def _by_name(path: Path, templates: list[Any]) -> dict[str, Any]:
    for template in templates:
        require_kind(path, "each entry of chat_template", template, dict)
    return {str(template.get("name")): template.get("template") for template in templates}


def _describe(file: str, names: list[str]) -> str:
    listed = ", ".join(name if name.isprintable() else repr(name) for name in names)
    return (
        f"{file}: the chat templates {listed} are not read and not kept for exports; only the one "
        "that is named default is, by exports to Hugging Face"
    )
