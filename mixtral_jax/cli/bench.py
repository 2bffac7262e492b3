"""Steady-state speed of the train step on this machine, on made-up tokens."""

import json

from mixtral_jax.cli.flags import make_parser, parse_config


def main(arguments: list[str]) -> int:
    """`bench [--train | --layer | --generate] [--json] [--config=CONFIG] [--config.KEY=V ...]`."""
    parser = make_parser(__doc__, "pretrain/tiny.py", "bench")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--train", action="store_true", help="the train step beside transformers'")
    what.add_argument("--layer", action="store_true", help="one MoE layer beside transformers'")
    what.add_argument(
        "--generate", action="store_true", help="prefill and decode beside transformers'"
    )
    flags, config = parse_config(parser, arguments)

    from mixtral_jax.bench.generate import describe_generate, measure_generate
    from mixtral_jax.bench.layer import describe_layer, measure_layer
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
    else:
        figures = measure_step(config, mesh)
        text = describe_step(figures)
    print(json.dumps(figures) if flags.json else text)
    return 0
