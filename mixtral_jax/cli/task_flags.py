"""Flags of the verbs that read text with a model: which part of which data, in which rows."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mixtral_jax.cli.flags import set_config_keys
from mixtral_jax.config import DataConfig, build, require

if TYPE_CHECKING:
    from mixtral_jax.pretrained import Pretrained
    from mixtral_jax.runs.eval_data import EvalTask, TrainedRun


def add_task_flags(parser: argparse.ArgumentParser) -> None:
    """Adds what `read_task` reads."""
    parser.add_argument(
        "--chat",
        action="store_true",
        help="the data are conversations; `evaluate` scores the answers alone",
    )
    parser.add_argument(
        "--part",
        choices=["held_out", "all"],
        help="by default all; of a run's own data, what it held out",
    )
    parser.add_argument(
        "--sequence_length", type=int, help="of a row; by default the run's own, or 2048"
    )
    parser.add_argument(
        "--num_sequences",
        type=int,
        help="the number of rows, spread evenly; by default what the run evaluates on, or of other "
        "data all (`analyze`: 256)",
    )
    named = "--data.path=TEXT and other --data.KEY=VALUE name the data, as in training"
    parser.epilog = f"{parser.epilog}; {named}"


def choose_data(arguments: Sequence[str], run: "TrainedRun | None") -> DataConfig:
    """The data that `--data.KEY=VALUE` names, or those of the run without `--data.path`.

    If they are the run's own, its settings hold for all keys that are not named.

    Raises:
        ConfigError: no data are named, or a key is wrong.
    """
    from mixtral_jax.runs.eval_data import names_same_data

    keys = [argument for argument in arguments if argument.startswith("--data.")]
    named: dict[str, Any] = {}
    set_config_keys(named, keys, "--data.")
    if run is None or ("path" in named and not names_same_data(named["path"], run.data.path)):
        require(
            "path" in named,
            "--data.path=TEXT must name the data: the checkpoint is not a run's, which has its own",
        )
        return build(DataConfig, named, "data.")
    changed = dataclasses.asdict(run.data)
    set_config_keys(changed, keys, "--data.")
    return build(DataConfig, changed | {"path": run.data.path}, "data.")


def read_task(
    flags: argparse.Namespace,
    arguments: Sequence[str],
    run: "TrainedRun | None",
    data: DataConfig,
    loaded: "Pretrained",
) -> "EvalTask":
    """The task that the flags ask for.

    Raises:
        ConfigError: as of `plan_task`; or a key of the data is named that has no effect.
    """
    from mixtral_jax.runs.eval_data import plan_task

    task = plan_task(
        run,
        data,
        loaded,
        part=flags.part,
        is_chat=flags.chat,
        sequence_length=flags.sequence_length,
        num_sequences=flags.num_sequences,
    )
    has_tokenizer = loaded.tokenizer is not None
    for key, is_void, reason in (
        ("tokenizer=", has_tokenizer, "the checkpoint has a tokenizer of its own"),
        ("chat.", not task.is_chat, "the data are read as text, without --chat"),
        ("held_out_fraction=", data.held_out is not None, "data.held_out is held out"),
        ("text_field=", task.is_chat, "the data are read as conversations"),
    ):
        named = [argument for argument in arguments if argument.startswith(f"--data.{key}")]
        require(
            not (named and is_void),
            f"{' '.join(named)} has no effect, since {reason}: leave it out",
        )
    return task
