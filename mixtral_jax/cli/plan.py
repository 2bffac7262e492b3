"""What a run would need of devices that are not here: memory, FLOPs, collectives, max speed."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from mixtral_jax.cli.flags import make_parser, parse_config
from mixtral_jax.config import Config, ConfigError, require

if TYPE_CHECKING:
    from rich.console import Console

    from mixtral_jax.plan.topology import Target

# In a pipe, wide enough for the tables.
PIPE_COLUMNS = 120


def main(arguments: list[str]) -> int:
    """`plan --config=CONFIG --topology=v5p:4x4x4 [--json] [--sweep] [--config.KEY=VALUE ...]`."""
    parser = make_parser(__doc__, "pretrain/mixtral_8x7b_v5p.py", "plan")
    parser.add_argument(
        "--topology", required=True, help="a TPU slice (v5p:4x4x4, v6e:16x16) or GPUs (h100:8)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON, and nothing else on standard output"
    )
    parser.add_argument(
        "--cpu_fallback",
        action="store_true",
        help="without libtpu, estimate on virtual CPU devices",
    )
    parser.add_argument(
        "--sweep", action="store_true", help="try meshes and batch sizes, and rank what fits"
    )
    parser.add_argument(
        "--sweep_batch_sizes",
        help="numbers of sequences, as 64,128 (default: the config's, 2x, 4x)",
    )
    parser.add_argument(
        "--sweep_limit",
        type=int,
        default=12,
        help="the max number of compilations of a sweep (default 12)",
    )
    flags, config = parse_config(parser, arguments)
    batch_sizes = _batch_sizes(flags, config)

    from mixtral_jax.cli.plan_tables import print_plan
    from mixtral_jax.plan.estimate import make_plan
    from mixtral_jax.plan.topology import open_target, parse_topology

    topology = parse_topology(flags.topology)
    target = open_target(topology, cpu_fallback=flags.cpu_fallback)
    if flags.sweep:
        return _sweep(flags, config, target, batch_sizes)
    plan = make_plan(config, target)
    if flags.json:
        print(json.dumps(plan.to_json(), indent=2))
    else:
        print_plan(plan, _console())
    return 0


def _sweep(
    flags: argparse.Namespace, config: Config, target: "Target", batch_sizes: list[int]
) -> int:
    from rich.console import Console

    from mixtral_jax.cli.plan_tables import print_sweep
    from mixtral_jax.plan.sweep import sweep

    progress = Console(stderr=True, highlight=False)
    attempts = sweep(
        config,
        target,
        batch_sizes=batch_sizes,
        limit=flags.sweep_limit,
        say=lambda line: progress.print(line, soft_wrap=True),
    )
    if flags.json:
        ranked = [{"rank": attempt.rank, **attempt.plan.to_json()} for attempt in attempts]
        json.dump({"topology": target.topology.name, "plans": ranked}, sys.stdout, indent=2)
        print()
    else:
        print_sweep(attempts, _console())
    return 0


def _console() -> "Console":
    """A console as wide as the terminal; in a pipe, wide enough for the tables."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_COLUMNS)


def _batch_sizes(flags: argparse.Namespace, config: Config) -> list[int]:
    require(flags.sweep_limit >= 1, f"--sweep_limit={flags.sweep_limit} must be at least 1")
    if flags.sweep_batch_sizes is None:
        return [config.train.batch_size * factor for factor in (1, 2, 4)]
    try:
        sizes = [int(size) for size in flags.sweep_batch_sizes.split(",")]
    except ValueError:
        sizes = []
    accumulation = config.train.gradient_accumulation
    if not sizes or any(size < 1 or size % accumulation for size in sizes):
        raise ConfigError(
            f"--sweep_batch_sizes={flags.sweep_batch_sizes} must be numbers with commas between, "
            "each a multiple of "
            f"train.gradient_accumulation={accumulation}, as "
            f"{64 * accumulation},{128 * accumulation}"
        )
    return sizes
