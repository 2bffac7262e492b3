"""Several seeds of one tuning, one after the other: their flags, and which of them was best."""

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

from mixtral_jax.runs.answers import Answers
from mixtral_jax.cli.flags import RunFlags, add_run_flags, make_parser, parse_config, read_run_flags
from mixtral_jax.runs.run import Run
from mixtral_jax.runs.workdir import write_json
from mixtral_jax.config import require


@dataclasses.dataclass(frozen=True)
class TuningFlags:
    """What the command line of a tuning said."""

    run: RunFlags
    num_seeds: int

    def each_seed(self, workdir: Path) -> list[RunFlags]:
        """The flags of each run: the one in `workdir`, or of several, each in a folder below it
        that its seed names.
        """
        first = self.run.config.train.seed
        if self.num_seeds == 1:
            return [dataclasses.replace(self.run, workdir=workdir)]
        seeds = range(first, first + self.num_seeds)
        return [
            dataclasses.replace(
                self.run,
                workdir=workdir / f"seed-{seed}",
                config=dataclasses.replace(
                    self.run.config, train=dataclasses.replace(self.run.config.train, seed=seed)
                ),
            )
            for seed in seeds
        ]


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A run that has ended, and what its model says to held-out questions."""

    run: Run
    said: Answers


def parse_tuning_flags(arguments: Sequence[str], *, description: str | None, default_config: str) -> TuningFlags:
    """The flags of a script that tunes.

    Raises:
        ConfigError: names the flag and what would be right.
    """
    parser = make_parser(description, default_config)
    add_run_flags(parser)
    parser.add_argument("--seeds", type=_parse_count, default=1, help="tune so often, seed after seed; export the best")
    flags, config = parse_config(parser, arguments)
    require(config.finetune is not None, "the config has no section finetune: run train.py with it")
    return TuningFlags(read_run_flags(flags, config), flags.seeds)


def choose_best(runs: Sequence[Tuned], workdir: Path) -> Tuned:
    """The run with the lowest held-out loss; of several, prints the spread, and writes
    `seeds.json`.
    """
    best = min(runs, key=lambda tuned: tuned.said.loss)
    if len(runs) == 1:
        return best
    losses = {tuned.run.config.train.seed: tuned.said.loss for tuned in runs}
    mean, deviation = statistics.mean(losses.values()), statistics.stdev(losses.values())
    for tuned in runs:
        mark = " (best)" if tuned is best else ""
        tuned.run.console.print(
            f"seed {tuned.run.config.train.seed}: held-out loss {tuned.said.loss:.4f}, "
            f"{tuned.said.num_ended} of {len(tuned.said.answers)} answers ended by themselves{mark}"
        )
    best.run.console.print(f"held-out loss over {len(runs)} seeds: mean {mean:.4f}, standard deviation {deviation:.4f}")
    if best.run.is_writer:
        summary = {"losses": losses, "mean": mean, "standard_deviation": deviation, "best": best.run.config.train.seed}
        write_json(workdir / "seeds.json", summary)
    return best


def _parse_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")
    return int(text)
