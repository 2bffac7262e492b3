"""Where the figures of a report come from: config, code, versions, data, devices, commands."""

import dataclasses
import json
import shlex
from collections.abc import Iterable

from mixtral_jax.lab.ablation.results import Results, hash_config


def describe_provenance(results: Results) -> list[tuple[str, str]]:
    """Returns pairs of a name and its value, from what the runs noted before their first step.

    Where runs differ, all distinct values are given.
    """
    train = results.reference.arm.config.train
    seeds = ", ".join(map(str, results.ablation.seeds))
    steps = f"{train.num_steps} steps of {train.batch_size} x {train.sequence_length} tokens"
    configs = [f"{result.arm.name} {hash_config(result.arm)}" for result in results.arms]
    versions = [
        ", ".join(f"{name} {version}" for name, version in each.items())
        for each in results.provenance("versions")
    ]
    commits = [commit or "none: not in a git repository" for commit in results.provenance("commit")]
    return [
        ("Runs", f"{steps}, seeds {seeds}"),
        ("Configs", ", ".join(configs)),
        ("Data", _join(name[:12] for name in results.provenance("data"))),
        ("Tokenizer", _join(name[:12] for name in results.provenance("tokenizer"))),
        ("Versions", _join(versions)),
        ("Commit", _join(commits)),
        ("Devices", _join(results.provenance("devices"))),
        ("Command", _join(shlex.join(command) for command in results.provenance("command"))),
    ]


def show_config(results: Results) -> str:
    """Returns the full config of the reference arm as JSON."""
    return json.dumps(dataclasses.asdict(results.reference.arm.config), indent=2)


def _join(values: Iterable[str]) -> str:
    return "; ".join(values) or "no run has started"
