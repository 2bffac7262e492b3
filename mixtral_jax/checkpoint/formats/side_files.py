"""`SideFiles`: what a model's folder says beside its weights, config and tokenizer.

`reading_side_files` reads it from other programs' folders; `checkpoint.export` writes it back. A
run keeps it in `side_files.json` of its workdir, so that an export of the run has it too.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mixtral_jax.checkpoint.files.foreign_folder import find_file, read_object
from mixtral_jax.checkpoint.formats.chat_templates import CHAT_TEMPLATES, find_version
from mixtral_jax.config import ConfigError, TemplateName
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.data.vocabulary import add_control_pieces
from mixtral_jax.whole_files import write_json

SIDE_FILES = "side_files.json"
# Settings of a generation that say nothing of how tokens are chosen, or when a text ends.
_QUIET_DEFAULTS = ("use_cache", "cache_implementation", "return_dict_in_generate")


@dataclasses.dataclass(frozen=True)
class SideFiles:
    """What other programs do with a model, as its folder says.

    Attributes:
        eos_ids: each of them ends a text, besides the tokenizer's own.
        bos_id: the id with which a text begins; a tokenizer's own comes before it.
        pad_id: the id that fills rows up.
        eos_token, pad_token: what the folder's tokenizer puts at the end of a text, and what it
            fills rows up with; None is the tokenizer's own, and none.
        added_tokens: from texts to ids, for those that tokenizer.model does not have.
        tokenizer_settings: what other programs do with the tokenizer, beside the ids of texts, as
            tokenizer_config.json has it.
        generation: defaults of a generation, as generation_config.json has them.
        chat_template: the text of a Jinja template, which is never run.
    """

    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    added_tokens: Mapping[str, int] = dataclasses.field(default_factory=dict)
    tokenizer_settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    chat_template: str | None = None

    @property
    def defaults(self) -> tuple[str, ...]:
        """The defaults of a generation that decide how tokens are chosen, or when a text ends."""
        return tuple(
            f"{key}={value!r}"
            for key, value in self.generation.items()
            if not (key in _QUIET_DEFAULTS or key.startswith("output_"))
        )

    @property
    def described_settings(self) -> tuple[str, ...]:
        """The settings of the tokenizer in words; long values are cut."""
        return tuple(f"{key}={value!r:.60}" for key, value in self.tokenizer_settings.items())

    @property
    def template(self) -> TemplateName:
        """The chat template by our name; `auto` if the folder has none, or none that we know."""
        for version, text in CHAT_TEMPLATES.items():
            if self.chat_template is not None and self.chat_template.strip() == text.strip():
                return version
        return "auto"

    def add_tokens(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer with a control piece for each added token and end of text it lacks.

        Raises:
            ConfigError: an added token has the text of a piece.
        """
        first = tokenizer.vocab_size
        added = {id_: f"<end_{id_}>" for id_ in self.eos_ids if id_ >= first}
        added |= {id_: text for text, id_ in self.added_tokens.items() if id_ >= first}
        if not added:
            return tokenizer
        try:
            return add_control_pieces(tokenizer, added)
        except ValueError as error:
            raise ConfigError(
                f"an added token does not fit tokenizer.model: {error}; use the files of one model"
            ) from None

    def after_training(
        self, tokenizer: Tokenizer, template: Literal["v1", "v3"] | None = None
    ) -> "SideFiles":
        """What is true of the model after a run with our tokenizer's end of text.

        Args:
            template: the version of the chat template that it was tuned with; None keeps what the
                folder has.
        """
        eos_ids = tuple(dict.fromkeys((*self.eos_ids, tokenizer.eos_id)))
        if template is None:
            return dataclasses.replace(self, eos_ids=eos_ids)
        # The template ends answers with the EOS token, which must be the one that was learnt.
        return dataclasses.replace(
            self, eos_ids=eos_ids, eos_token=None, chat_template=CHAT_TEMPLATES[template]
        )

    def notes(self, tokenizer: Tokenizer | None) -> tuple[str, ...]:
        """What is not followed here, one line each."""
        notes = []
        if self.added_tokens and tokenizer is not None:
            listed = ", ".join(f"{text} ({id_})" for text, id_ in self.added_tokens.items())
            notes.append(
                f"added tokens {listed}: no text encodes to them, as none does to </s>, and they "
                "are not shown where the model writes them; only a prompt of ids can have them"
            )
        if self.defaults:
            notes.append(
                "generation_config.json: not used here, but kept for exports to Hugging Face: "
                f"{', '.join(self.defaults)}; flags and settings decide"
            )
        if self.tokenizer_settings:
            kept = "but kept for exports to Hugging Face"
            kept = kept if tokenizer else "nor in an export, which has no tokenizer"
            notes.append(
                f"tokenizer_config.json: not used here, {kept}: "
                f"{', '.join(self.described_settings)}"
            )
        if self.chat_template is not None and self.template == "auto":
            version = f"{find_version(tokenizer)}, by its tokenizer" if tokenizer else "v1 or v3"
            notes.append(
                "its chat template is none that is known here: chats and tuning use template "
                f"{version}; an export to Hugging Face keeps it unless the model is tuned"
            )
        return tuple(notes)

    def save(self, workdir: Path) -> None:
        """Keeps it in a run's workdir; an earlier one is replaced."""
        write_json(workdir / SIDE_FILES, dataclasses.asdict(self))


def open_side_files(workdir: Path) -> SideFiles:
    """What `SideFiles.save` kept in a workdir; empty if nothing was.

    Raises:
        ConfigError: the file is damaged.
    """
    path = find_file(workdir, SIDE_FILES)
    if path is None:
        return SideFiles()
    kept = read_object(path)
    try:
        kept["eos_ids"] = tuple(kept["eos_ids"])
        return SideFiles(**kept)
    except (KeyError, TypeError):
        raise ConfigError(
            f"{path} is not what a run keeps there: put back the file that the run wrote"
        ) from None
