"""The dense model that an upcycled run starts from: planned, opened, and made into experts."""

import dataclasses
from collections.abc import Callable, Sequence

import jax

from mixtral_jax.checkpoint.on_devices import load_model
from mixtral_jax.checkpoint.upcycled import copy_experts
from mixtral_jax.config import (
    Config,
    DispatchConfig,
    LoadBalanceConfig,
    ModelConfig,
    RouterConfig,
    UpcycleConfig,
    require,
)
from mixtral_jax.data.sources import require_sources
from mixtral_jax.finetune.upcycling import upcycle, without_routers
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.runs.base import Base, open_base, plan_base, require_folder
from mixtral_jax.runs.console import print_notes
from mixtral_jax.runs.run import Run, start_part

# Keys that must be equal: they give the shapes of weights that are taken over, or change what
# these weights compute.
_SAME_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "rope_theta",
    "norm_eps",
)


def start_dense(run: Run) -> Run:
    """Starts the run, in `workdir/base`, that pretrains the dense model of an upcycled run.

    Raises:
        ConfigError: it does not fit the devices, its workdir holds another run, or the text of
            `run` does not exist.
    """
    require_sources(run.config.data)
    return start_part(run, plan_dense(run.config), run.workdir / "base")


def plan_dense(config: Config) -> Config:
    """The config that pretrains a model of one expert, as large as all slices of a copy."""
    settings, model = config.upcycle, config.model
    assert settings is not None
    hidden = settings.granularity * model.intermediate_size
    return dataclasses.replace(
        plan_base(config, settings.pretrain),
        model=dataclasses.replace(model, num_experts=1, intermediate_size=hidden),
        router=RouterConfig(
            num_experts_per_token=1, load_balance=LoadBalanceConfig(weight=0), z_loss_weight=0
        ),
        dispatch=DispatchConfig(grouped_matmul=config.dispatch.grouped_matmul),
        mesh=dataclasses.replace(config.mesh, expert=1, data=-1),
    )


def open_dense(run: Run, named_keys: Sequence[str] = ()) -> Base:
    """Opens the dense model of an upcycled run, without reading the weights.

    Args:
        named_keys: keys of the config that a command line sets.

    Raises:
        ConfigError: there is none, or no tokenizer for it, or it does not fit the run; names each
            key that does not fit, or that is set and has no effect beside `upcycle.base`.
    """
    settings = run.config.upcycle
    assert settings is not None
    if settings.base is None:
        folder = run.workdir / "base"
    else:
        folder = require_folder(settings.base, "upcycle.base")
    base = open_base(folder, run.config, is_shown=run.is_writer)
    misfits = find_misfits(base.weights.architecture.model, run.config.model, settings)
    require(not misfits, f"upcycle.base={folder} does not fit the run: {'; '.join(misfits)}")
    if settings.base is not None:
        _check_unused(base, run, named_keys)
    if settings.scale(run.config.router) is None:
        run.console.print(
            "note: the weights of a token's experts have no fixed sum (router.score, "
            "router.renormalize), so the first outputs are not those of the dense model"
        )
    return base


def _check_unused(base: Base, run: Run, named_keys: Sequence[str]) -> None:
    """Refuses keys that a command line sets in vain; says that the tokenizer is the base's."""
    unused = base.find_unused(named_keys, "upcycle")
    require(
        not unused,
        f"upcycle.base={base.folder} decides {', '.join(unused)}, which would have no effect: "
        "leave it out",
    )
    if base.weights.tokenizer is not None:
        note = (
            f"data.tokenizer={run.config.data.tokenizer} is not used: the tokenizer is that of "
            f"upcycle.base={base.folder}"
        )
        print_notes([note], is_shown=run.is_writer)


def find_misfits(dense: ModelConfig, model: ModelConfig, settings: UpcycleConfig) -> list[str]:
    """The reasons why the dense model cannot be made into the other one; empty if it can."""
    misfits = [
        f"its {key} is {getattr(dense, key)}, and model.{key}={getattr(model, key)}"
        for key in _SAME_KEYS
        if getattr(dense, key) != getattr(model, key)
    ]
    if dense.num_experts != 1:
        misfits.append(f"it has {dense.num_experts} experts, and a dense model has 1")
    num_slices, hidden = settings.granularity, model.intermediate_size
    if dense.intermediate_size != num_slices * hidden:
        slices = (
            f", of which a copy has {num_slices} (upcycle.granularity, which model.granularity "
            "sets)"
        )
        misfits.append(
            f"its intermediate_size is {dense.intermediate_size}, and "
            f"model.intermediate_size={hidden}{slices if num_slices > 1 else ''}"
        )
    return misfits


def dense_loader(base: Base, run: Run) -> Callable[[], Transformer]:
    """A function that loads the dense weights onto the mesh in force and makes experts of them.

    Each device reads what its experts need, and changes it as the config says.
    """

    def load() -> Transformer:
        config, make_model = run.config, run.training.make_base
        assert config.upcycle is not None
        num_experts, num_slices = config.model.num_experts, config.upcycle.granularity
        parameters = copy_experts(base.weights.parameters, num_experts, num_slices)
        copies = load_model(parameters, jax.eval_shape(lambda: without_routers(make_model())))
        # Under jit, only the routers of the fresh model are ever computed.
        make_experts = jax.jit(
            lambda copies: upcycle(copies, make_model(), config), donate_argnums=0
        )
        return make_experts(copies)

    return load
