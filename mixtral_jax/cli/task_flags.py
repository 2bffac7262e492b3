"""Flags of the verbs that read text with a model: which part of which data, in which rows."""

import argparse
from typing import TYPE_CHECKING

from mixtral_jax.config import DataConfig

if TYPE_CHECKING:
    from mixtral_jax.pretrained import Pretrained
    from mixtral_jax.runs.eval_data import EvalTask


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
    parser.epilog = (
        f"{parser.epilog}; --data.path=F and other --data.KEY=VALUE name the data, as in training"
    )


def read_task(flags: argparse.Namespace, data: DataConfig, loaded: "Pretrained") -> "EvalTask":
    """The task that the flags ask for; raises ConfigError if a number is out of range."""
    from mixtral_jax.runs.eval_data import plan_task

    return plan_task(
        flags.checkpoint,
        data,
        loaded,
        part=flags.part,
        is_chat=flags.chat,
        sequence_length=flags.sequence_length,
        num_sequences=flags.num_sequences,
    )
