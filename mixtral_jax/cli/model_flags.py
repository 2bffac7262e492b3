"""Flags of the verbs that load a model: which one, in which dtype, on which mesh."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixtral_jax.checkpoint.files.stored import DTYPES
from mixtral_jax.cli.flags import (
    add_process_flags,
    parse_path,
    parse_sections,
    read_process_flags,
)
from mixtral_jax.config import MeshConfig, require
from mixtral_jax.generate.settings import Settings
from mixtral_jax.parallel.coordinator import Launch

if TYPE_CHECKING:
    from mixtral_jax.parallel.processes import Processes
    from mixtral_jax.pretrained import Dtype, Pretrained


@dataclasses.dataclass(frozen=True)
class ModelFlags:
    """Which model, in which dtype, on which devices.

    Attributes:
        all_flags: every flag as text, for processes to compare.
    """

    checkpoint: Path
    dtype: "Dtype | None"
    mesh: MeshConfig
    launch: Launch
    all_flags: dict[str, str]


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds what `parse_model_flags` reads."""
    parser.add_argument(
        "--checkpoint",
        type=parse_path,
        required=True,
        help="a run's workdir (its newest checkpoint), one step of it, or a folder of Hugging Face "
        "or of Mistral",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of weights and computation; by default that of the checkpoint",
    )
    add_process_flags(parser)
    parser.epilog = (
        "--mesh.KEY=VALUE lays the model out over devices, as --mesh.expert=4; keys: "
        "mixtral_jax/config/mesh.py"
    )


def parse_model_flags(
    parser: argparse.ArgumentParser, arguments: Sequence[str], **sections: type
) -> tuple[argparse.Namespace, ModelFlags, dict[str, Any]]:
    """The parser's flags, those about the model, and further sections from `--NAME.KEY=VALUE`.

    Raises:
        ConfigError: names the flag and what would be right.
    """
    flags, built = parse_sections(parser, arguments, mesh=MeshConfig, **sections)
    arm = min(flags.checkpoint.glob("arms/*/seed-*"), default=None)
    require(
        arm is None,
        f"--checkpoint={flags.checkpoint} is an ablation: name a run of it (arms/NAME/seed-N), "
        f"as {arm}",
    )
    every = vars(flags) | built
    all_flags = {name: str(value) for name, value in every.items() if name != "process_id"}
    mesh, launch = built.pop("mesh"), read_process_flags(flags)
    return flags, ModelFlags(flags.checkpoint, flags.dtype, mesh, launch, all_flags), built


def open_model(flags: ModelFlags, processes: "Processes") -> "Pretrained":
    """Loads the model, with its notes on standard error; call before jax first touches a device.

    Raises:
        ConfigError: the processes were started with different flags or have unequal devices, or
            what loading raises.
    """
    from mixtral_jax.parallel.connections import connect_processes
    from mixtral_jax.parallel.mesh import use_virtual_cpu_devices
    from mixtral_jax.pretrained import load_pretrained
    from mixtral_jax.runs.console import print_notes
    from mixtral_jax.runs.run import keep_programs, require_equal_devices

    everywhere = processes.share("flags", flags.all_flags)
    differing = [index for index, other in enumerate(everywhere) if other != everywhere[0]]
    require(
        not differing,
        f"process {', '.join(map(str, differing))} has other flags than process 0: start all with "
        "the same",
    )
    use_virtual_cpu_devices(flags.mesh.cpu_devices)
    keep_programs(processes)
    require_equal_devices(processes)
    loaded = load_pretrained(flags.checkpoint, flags.dtype, flags.mesh)
    connect_processes(loaded.mesh, processes)
    print_notes(loaded.notes, is_shown=processes.index == 0)
    return loaded


def add_settings_flags(parser: argparse.ArgumentParser, defaults: Settings) -> None:
    """Adds a flag for each field of `Settings`."""
    descriptions = {
        "max_new_tokens": "the max number of tokens to write",
        "temperature": "0 takes the likeliest token, 1 samples as learned",
        "top_p": "sample from the likeliest tokens that have this probability together",
        "top_k": "sample from this number of likeliest tokens; 0: all",
        "seed": "of the sampling",
    }
    for name, description in descriptions.items():
        default = getattr(defaults, name)
        help_text = f"{description} (default: {default})"
        parser.add_argument(f"--{name}", type=type(default), default=default, help=help_text)
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        help="a text to end before; may be given several times",
    )


def read_settings(flags: argparse.Namespace) -> Settings:
    """Reads what `add_settings_flags` added; raises ConfigError if a value is out of range."""
    fields = dataclasses.fields(Settings)
    return Settings.of(**{field.name: getattr(flags, field.name) for field in fields})
