"""Finds the weights in other programs' folders: which files hold them, and which tensors they have.

What looks like a folder of weights and is none, such as adapters alone, is named. So are files that
nothing here reads.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from mixtral_jax.checkpoint.files import safetensors, torch_pickle
from mixtral_jax.checkpoint.files.file_tensor import FileTensor
from mixtral_jax.checkpoint.files.foreign_folder import find_file, read_bytes, read_object
from mixtral_jax.config import ConfigError, require

_HUGGING_FACE_FILE, _MISTRAL_FILE = "model.safetensors", "consolidated.safetensors"
_INDEX_SUFFIX = ".index.json"
_PEFT_CONFIG, _MISTRAL_ADAPTERS = "adapter_config.json", "lora.safetensors"
_OTHER_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_WEIGHTS = (".safetensors", *_OTHER_PICKLES)
_PICKLE = re.compile(r"consolidated\.(\d\d)\.(pt|pth)")
# Buffers that old releases of transformers saved. They follow from rope_theta.
_LEFTOVER = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
# What is read beside weights and their indices: by this room, and by the reader of side files.
_READ_BESIDE = frozenset(
    (
        *("config.json", "params.json", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        *("added_tokens.json", "chat_template.json", "chat_template.jinja"),
        *("tokenizer.model", "tokenizer.model.v1", "tokenizer.model.v2", "tokenizer.model.v3"),
    )
)
# Files for people and for version control, which no program computes with.
_FOR_PEOPLE = re.compile(
    r"\..*|(README|LICEN[CS]E|NOTICE)\b.*|.*\.(md|pdf|png|jpe?g|svg|gif)", re.IGNORECASE
)
_MAX_NAMES = 20


@dataclasses.dataclass(frozen=True)
class WeightFiles:
    """The tensors of a folder.

    Attributes:
        configs: the names of the configs that may describe them, the likeliest first.
        notes: what was left unread.
    """

    tensors: dict[str, FileTensor]
    configs: tuple[str, str]
    notes: tuple[str, ...]


def enter_cache(folder: Path) -> Path:
    """The snapshot in the folder of a model in the Hugging Face cache.

    That is the one that `refs/main` names, or the only one. Other folders are returned as they are.

    Raises:
        ConfigError: there are several snapshots, or none, and `refs/main` names none of them.
    """
    snapshots, refs = folder / "snapshots", folder / "refs"
    if not (snapshots.is_dir() and refs.is_dir()):
        return folder
    names = sorted(path.name for path in snapshots.iterdir() if path.is_dir())
    main = find_file(refs, "main")
    chosen = read_bytes(main).decode(errors="replace").strip() if main else None
    if chosen not in names:
        require(
            len(names) == 1,
            f"{folder} is a model in the cache of Hugging Face with {len(names)} snapshots"
            f"{''.join(f', {name}' for name in names[:5])}: name one as {snapshots}/HASH",
        )
        chosen = names[0]
    return snapshots / chosen


def find_weights(folder: Path) -> WeightFiles:
    """The weights of a folder, without reading a number.

    Raises:
        ConfigError: there are none, there are two of one kind, or they are damaged; or adapters
            beside them would change what the model computes.
    """
    configs = ("config.json", "params.json")
    adapters = [name for name in (_PEFT_CONFIG, _MISTRAL_ADAPTERS) if find_file(folder, name)]
    tensors = _open_safetensors(folder, _HUGGING_FACE_FILE)
    if tensors is None:
        tensors = _open_mistral(folder, adapters)
        configs = ("params.json", "config.json")
    require(
        not adapters,
        f"{folder} has {' and '.join(adapters)} beside the weights, and other programs add such "
        "adapters to them: merge them into the weights, or move them to another folder",
    )
    unread = _find_unread(folder, {tensor.path.name for tensor in tensors.values()})
    notes = (f"{folder}: not read: {unread}",) if unread else ()
    kept = {name: t for name, t in tensors.items() if not _LEFTOVER.fullmatch(name)}
    return WeightFiles(kept, configs, notes)


def _find_unread(folder: Path, used: Collection[str]) -> str:
    """Names the files that nothing here reads, weights first; empty if there is none.

    Args:
        used: the names of the files with the weights.
    """
    unread = [
        path.name
        for path in folder.iterdir()
        if not (
            path.name in used
            or path.name in _READ_BESIDE
            or path.name.endswith(f".safetensors{_INDEX_SUFFIX}")
            or _FOR_PEOPLE.fullmatch(path.name)
            or path.is_dir()
        )
    ]
    unread.sort(key=lambda name: (not name.endswith(_WEIGHTS), name))
    named = [name if name.isprintable() else repr(name) for name in unread[:_MAX_NAMES]]
    num_left = len(unread) - len(named)
    return ", ".join([*named, *([f"and {num_left:,} more"] if num_left else [])])


def _open_mistral(folder: Path, adapters: list[str]) -> dict[str, FileTensor]:
    tensors = _open_safetensors(folder, _MISTRAL_FILE)
    pickles = sorted(path.name for path in folder.iterdir() if _PICKLE.fullmatch(path.name))
    if tensors is None and not pickles:
        raise ConfigError(_describe_absence(folder, adapters))
    require(
        tensors is None or not pickles,
        f"{folder} has both {_MISTRAL_FILE} and {', '.join(pickles)}: remove the one that you do "
        "not need",
    )
    if tensors is not None:
        return tensors
    numbers = [int(name.split(".")[1]) for name in pickles]
    require(
        numbers == list(range(len(numbers))),
        f"{folder} has {', '.join(pickles)}, which must be numbered from 00 without gaps: one is "
        "missing, or there is both a .pt and a .pth",
    )
    tensors = {}
    for name in pickles:
        path = find_file(folder, name)
        assert path is not None
        found = torch_pickle.open_file(path)
        repeated = sorted(tensors.keys() & found.keys())
        require(
            not repeated,
            f"{path}: {', '.join(repeated)} is in another file too: keep the files of one model",
        )
        tensors |= found
    return tensors


def _describe_absence(folder: Path, adapters: list[str]) -> str:
    """What is wrong with a folder without weights, and the fix."""
    if _PEFT_CONFIG in adapters:
        base = read_object(folder / _PEFT_CONFIG).get("base_model_name_or_path")
        return (
            f"{folder} has adapters of PEFT alone, and no model: merge them into their base "
            f"({base!r:.200}) with merge_and_unload and save_pretrained of PEFT, and name that "
            "folder; of a tuning done here, name its workdir or its export"
        )
    if adapters:
        return (
            f"{folder} has adapters of Mistral alone ({_MISTRAL_ADAPTERS}), and no model: name a "
            "folder into which they are merged; of a tuning done here, its workdir or its export"
        )
    if models := sorted(folder.glob("models--*")):
        return f"{folder} is a cache of Hugging Face: name a model in it, such as {models[0]}"
    named = sorted(path.name for path in folder.iterdir() if path.suffix in _WEIGHTS)
    others = [name for name in named if not name.endswith(".safetensors")]
    fix = "name another folder, or copy the weights there"
    if others:
        fix = f"{', '.join(others)} may run code when read, so save the weights as safetensors"
    elif named:
        fix = (
            f"{', '.join(named[:3])} belong to an index, so copy {_HUGGING_FACE_FILE}"
            f"{_INDEX_SUFFIX} there; or, if it is one whole file, name it {_HUGGING_FACE_FILE}"
        )
    return (
        f"{folder} has no weights: no {_HUGGING_FACE_FILE}, no consolidated.* and no index; {fix}"
    )


def _open_safetensors(folder: Path, name: str) -> dict[str, FileTensor] | None:
    """The tensors of one file or, if it does not exist, of the files in an index."""
    path, index = find_file(folder, name), find_file(folder, name + _INDEX_SUFFIX)
    if path and index:
        shards = _shards_of(read_object(index))
        require(
            shards <= {name},
            f"{folder} has both {name} and {index.name}, which names other files: remove the one "
            "that you do not need",
        )
    if path:
        return safetensors.open_file(path)
    return safetensors.open_shards(folder, index) if index else None


def _shards_of(index: Mapping[str, object]) -> set[str]:
    weight_map = index.get("weight_map")
    return set(map(str, weight_map.values())) if isinstance(weight_map, Mapping) else set()
