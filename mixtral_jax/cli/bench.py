"""Steady-state speed of the train step on this machine, on made-up tokens."""

import argparse
import json
from pathlib import Path

from mixtral_jax.cli.flags import make_parser, parse_config, parse_path
from mixtral_jax.config import Config


def main(arguments: list[str]) -> int:
    """`bench [--train | --layer | --generate | --growth | --picture=F.png] [--json] ...`."""
    flags, config = _parse(arguments)

    from mixtral_jax.bench.generate import describe_generate, measure_generate
    from mixtral_jax.bench.growth import describe_growth, measure_growth
    from mixtral_jax.bench.layer import describe_layer, measure_layer
    from mixtral_jax.bench.parts import describe_parts
    from mixtral_jax.bench.step import describe_step, measure_step
    from mixtral_jax.bench.train import describe_train, measure_train
    from mixtral_jax.parallel.mesh import make_mesh
    from mixtral_jax.parallel.processes import Processes
    from mixtral_jax.runs.run import start_devices

    config = start_devices(config, Processes())
    mesh = make_mesh(config.mesh)
    if flags.train:
        figures = measure_train(config, mesh)
        text = describe_train(figures)
    elif flags.layer:
        figures = measure_layer(config, mesh)
        text = describe_layer(figures)
    elif flags.generate:
        figures = measure_generate(config, mesh)
        text = describe_generate(figures)
    elif flags.growth:
        figures = measure_growth(config)
        text = describe_growth(figures)
    else:
        figures = measure_step(config, mesh)
        text = f"{describe_step(figures)}\n{describe_parts(figures['profile'])}"
    print(json.dumps(figures) if flags.json else text)
    if flags.picture:
        from mixtral_jax.bench.picture import draw_parts
        from mixtral_jax.whole_files import write_whole

        write_whole(flags.picture, draw_parts(figures["profile"]).to_png())
    return 0


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, Config]:
    parser = make_parser(__doc__, "pretrain/tiny.py", "bench")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--train", action="store_true", help="the train step beside transformers'")
    what.add_argument("--layer", action="store_true", help="one MoE layer beside transformers'")
    what.add_argument(
        "--generate", action="store_true", help="prefill and decode beside transformers'"
    )
    what.add_argument(
        "--growth",
        action="store_true",
        help="how the cost of the train step grows with tokens, sequence length, experts, layers "
        "and devices",
    )
    what.add_argument(
        "--picture",
        type=_parse_picture,
        help="a .png to draw: where the time of the train step goes",
    )
    return parse_config(parser, arguments)


def _parse_picture(text: str) -> Path:
    path = parse_path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text} must end in .png, the only kind that is drawn")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no folder {path.parent}: make it first")
    return path
