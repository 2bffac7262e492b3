"""Where the figures of a report come from, as pairs of a name and what to say."""

import dataclasses
import json
import shlex
from collections.abc import Iterable

from mixtral_jax.lab.ablation.results import Results, hash_config


def describe_provenance(results: Results) -> list[tuple[str, str]]:
    """Config, code, versions, data, devices, commands: all that the runs noted, several values
    where they differ.
    """
    train = results.reference.arm.config.train
    versions = results.provenance("versions")
    return [
        (
            "Runs",
            f"{train.num_steps} steps of {train.batch_size} x {train.sequence_length} tokens, "
            "seeds "
            f"{', '.join(map(str, results.ablation.seeds))}",
        ),
        (
            "Configs",
            ", ".join(f"{result.arm.name} {hash_config(result.arm)}" for result in results.arms),
        ),
        ("Data", _list(name[:12] for name in results.provenance("data"))),
        ("Tokenizer", _list(name[:12] for name in results.provenance("tokenizer"))),
        (
            "Versions",
            _list(
                ", ".join(f"{name} {version}" for name, version in one.items()) for one in versions
            ),
        ),
        (
            "Commit",
            _list(
                commit or "none: not in a git repository" for commit in results.provenance("commit")
            ),
        ),
        ("Devices", _list(results.provenance("devices"))),
        ("Command", _list(shlex.join(command) for command in results.provenance("command"))),
    ]


def show_config(results: Results) -> str:
    """The config of the reference arm in full, as JSON."""
    return json.dumps(dataclasses.asdict(results.reference.arm.config), indent=2)


def _list(values: Iterable[str]) -> str:
    return "; ".join(values) or "no run has begun"
