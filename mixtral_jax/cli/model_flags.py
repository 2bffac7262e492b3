"""From the flags of a verb that asks a model to that model on its mesh; and what such verbs have in
common.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixtral_jax.checkpoint.files.stored import DTYPES
from mixtral_jax.cli.flags import add_process_flags, parse_path, parse_sections, read_process_flags
from mixtral_jax.config import MeshConfig, require
from mixtral_jax.generate.settings import Settings
from mixtral_jax.parallel.coordinator import Launch
from mixtral_jax.parallel.mesh import use_virtual_cpu_devices
from mixtral_jax.parallel.processes import Processes
from mixtral_jax.pretrained import Dtype, Pretrained, load_pretrained
from mixtral_jax.runs.run import require_equal_devices


@dataclasses.dataclass(frozen=True)
class ModelFlags:
    """Which model, in which dtype, on which devices;

    `asked` is all that was, for processes to compare.
    """

    checkpoint: Path
    dtype: Dtype | None
    mesh: MeshConfig
    launch: Launch
    asked: dict[str, str]


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds what `parse_model_flags` reads."""
    parser.add_argument(
        "--checkpoint",
        type=parse_path,
        required=True,
        help="a run's workdir (its newest checkpoint), one step of it, or a folder of Hugging Face or of Mistral",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of weights and computation; by default that of the checkpoint",
    )
    add_process_flags(parser)
    parser.epilog = "--mesh.KEY=VALUE lays the model out over devices, as --mesh.expert=4; keys: mixtral_jax/config.py"


def parse_model_flags(
    parser: argparse.ArgumentParser, arguments: Sequence[str], **sections: type
) -> tuple[argparse.Namespace, ModelFlags, dict[str, Any]]:
    """The parser's flags; those about the model; and the dataclass of each further section, from
    `--NAME.KEY=VALUE`.

    Raises:
        ConfigError: names the flag and what would be right.
    """
    flags, built = parse_sections(parser, arguments, mesh=MeshConfig, **sections)
    arm = min(flags.checkpoint.glob("arms/*/seed-*"), default=None)
    require(
        arm is None,
        f"--checkpoint={flags.checkpoint} is an ablation: name a run of it (arms/NAME/seed-N), as "
        f"{arm}",
    )
    asked = {
        name: str(value) for name, value in (vars(flags) | built).items() if name != "process_id"
    }
    mesh = built.pop("mesh")
    return (
        flags,
        ModelFlags(flags.checkpoint, flags.dtype, mesh, read_process_flags(flags), asked),
        built,
    )


def open_model(flags: ModelFlags, processes: Processes) -> Pretrained:
    """The model, loaded; call before jax first touches a device.

    Raises:
        ConfigError: the processes were started with different flags or have unequal devices, or
            what loading raises.
    """
    told = processes.share("flags", flags.asked)
    differing = [index for index, there in enumerate(told) if there != told[0]]
    require(
        not differing,
        f"process {', '.join(map(str, differing))} has other flags than process 0: start all with "
        "the same",
    )
    use_virtual_cpu_devices(flags.mesh.cpu_devices)
    require_equal_devices(processes)
    return load_pretrained(flags.checkpoint, flags.dtype, flags.mesh)


def add_settings_flags(parser: argparse.ArgumentParser, defaults: Settings) -> None:
    """Adds a flag for each field of `Settings`."""
    described = {
        "max_new_tokens": "the most tokens to write",
        "temperature": "0 takes the likeliest token, 1 draws as learnt",
        "top_p": "draw from the likeliest tokens of so much probability",
        "top_k": "draw from so many; 0: all",
        "seed": "of what is drawn",
    }
    for name, help_text in described.items():
        default = getattr(defaults, name)
        parser.add_argument(
            f"--{name}",
            type=type(default),
            default=default,
            help=f"{help_text} (default: {default})",
        )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        help="a text to end before; may be given several times",
    )


def read_settings(flags: argparse.Namespace) -> Settings:
    """What `add_settings_flags` parsed; raises ConfigError where a value is out of range."""
    return Settings.of(
        **{field.name: getattr(flags, field.name) for field in dataclasses.fields(Settings)}
    )


def note(text: object, *, is_shown: bool = True) -> None:
    """Tells people something, on standard error; of several processes, one should show it."""
    if is_shown:
        print(text, file=sys.stderr, flush=True)
