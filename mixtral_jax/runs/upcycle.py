"""The dense model that an upcycled run starts from: planned, opened, compared with the run, and
made experts of.
"""

import dataclasses
from collections.abc import Callable

import jax

from mixtral_jax.checkpoint.on_devices import load_model
from mixtral_jax.checkpoint.upcycled import copy_experts
from mixtral_jax.runs.base import Base, open_base, plan_base, require_folder
from mixtral_jax.runs.run import Run
from mixtral_jax.runs.workdir import open_workdir
from mixtral_jax.config import (
    Config,
    DispatchConfig,
    LoadBalanceConfig,
    ModelConfig,
    RouterConfig,
    UpcycleConfig,
    require,
)
from mixtral_jax.data.sources import fingerprint_source
from mixtral_jax.finetune.tunable import make_tunable
from mixtral_jax.finetune.upcycling import upcycle, without_routers
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.parallel.mesh import make_mesh, resolve_mesh

# What must be equal, since it is taken over, or changes what the parameters compute.
_SAME_KEYS = (
    "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "rope_theta", "norm_eps"
)


def start_dense(run: Run) -> Run:
    """The run, in `workdir/base`, that pretrains the dense model of an upcycled run that names
    none.

    Raises:
        ConfigError: it does not fit the devices, its workdir holds another run, or the text of
            `run` is not there.
    """
    fingerprint_source(run.config.data.path, run.config.data.suffixes)
    config = resolve_mesh(plan_dense(run.config), run.mesh.size)
    workdir = run.workdir / "base"
    open_workdir(workdir, config, run.processes)
    return dataclasses.replace(run, config=config, mesh=make_mesh(config.mesh), workdir=workdir)


def plan_dense(config: Config) -> Config:
    """The pretraining of a model of one expert, the size of all slices of a copy, with nothing that
    routes.
    """
    settings, model = config.upcycle, config.model
    assert settings is not None
    return dataclasses.replace(
        plan_base(config, settings.pretrain),
        model=dataclasses.replace(
            model, num_experts=1, intermediate_size=settings.granularity * model.intermediate_size
        ),
        router=RouterConfig(num_experts_per_token=1, load_balance=LoadBalanceConfig(weight=0), z_loss_weight=0),
        dispatch=DispatchConfig(grouped_matmul=config.dispatch.grouped_matmul),
        mesh=dataclasses.replace(config.mesh, expert=1, data=-1),
    )


def open_dense(run: Run) -> Base:
    """Opens the dense model of an upcycled run, without reading the weights.

    Raises:
        ConfigError: there is none, or no tokenizer for it, or it does not fit the run; names each
            key.
    """
    settings = run.config.upcycle
    assert settings is not None
    folder = run.workdir / "base" if settings.base is None else require_folder(settings.base, "upcycle.base")
    base = open_base(folder, run.config)
    wrong = find_misfits(base.weights.architecture.model, run.config.model, settings)
    require(not wrong, f"upcycle.base={folder} does not fit the run: {'; '.join(wrong)}")
    if settings.scale(run.config.router) is None:
        run.console.print(
            "note: the weights of a token's experts have no fixed sum (router.score, "
            "router.renormalize), so the first "
            "outputs are not those of the dense model"
        )
    return base


def find_misfits(dense: ModelConfig, model: ModelConfig, settings: UpcycleConfig) -> list[str]:
    """What keeps a dense model from being made the other one."""
    wrong = [
        f"its {key} is {getattr(dense, key)}, and model.{key}={getattr(model, key)}"
        for key in _SAME_KEYS
        if getattr(dense, key) != getattr(model, key)
    ]
    if dense.num_experts != 1:
        wrong.append(f"it has {dense.num_experts} experts, and a dense model has 1")
    m, hidden = settings.granularity, model.intermediate_size
    if dense.intermediate_size != m * hidden:
        slices = f", of which a copy has {m} (upcycle.granularity, which model.granularity sets)" if m > 1 else ""
        wrong.append(
            f"its intermediate_size is {dense.intermediate_size}, and "
            f"model.intermediate_size={hidden}{slices}"
        )
    return wrong


def dense_loader(base: Base, run: Run) -> Callable[[], Transformer]:
    """A function that reads the dense weights onto the mesh in force, each device its experts'
    part, and changes them there as the config says.
    """

    def load() -> Transformer:
        config = run.config
        assert config.upcycle is not None
        make_model = make_tunable(config, run.mesh.devices.flat[0].platform).make_base
        parameters = copy_experts(base.weights.parameters, config.model.num_experts, config.upcycle.granularity)
        copies = load_model(parameters, jax.eval_shape(lambda: without_routers(make_model())))
        # Of the fresh model, all but the routers is never made.
        return jax.jit(lambda copies: upcycle(copies, make_model(), config), donate_argnums=0)(copies)

    return load
