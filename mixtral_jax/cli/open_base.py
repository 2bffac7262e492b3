"""The model that is tuned: the one that `finetune.base` names, or else a small one, pretrained for the occasion."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax

from mixtral_jax.checkpoint.architecture import require_mixtral
from mixtral_jax.checkpoint.on_devices import load_model
from mixtral_jax.checkpoint.run_parameters import find_steps
from mixtral_jax.checkpoint.weights import Weights, open_weights
from mixtral_jax.cli.flags import RunFlags
from mixtral_jax.cli.open_data import find_tokenizer
from mixtral_jax.cli.start import Run, start_run
from mixtral_jax.cli.training import pretrain
from mixtral_jax.cli.workdir import check_saved
from mixtral_jax.config import Config, FinetuneConfig, OptimizerConfig, RouterConfig, require
from mixtral_jax.data.sources import fingerprint_source
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.finetune.tunable import make_tunable
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.parallel.mesh import resolve_mesh
from mixtral_jax.parallel.processes import Processes
from mixtral_jax.train.loop import StopSignal


@dataclasses.dataclass(frozen=True)
class Base:
    """A model on disk that is to be tuned, and its tokenizer."""

    folder: Path
    weights: Weights
    tokenizer: Tokenizer

    def fit(self, config: Config) -> Config:
        """The config with the shape of this model; how it computes, and what it is trained with, stay."""
        architecture, asked = self.weights.architecture, config.model
        model = dataclasses.replace(
            architecture.model, dtype=asked.dtype, param_dtype=asked.param_dtype, remat=asked.remat,
            attention=asked.attention,
            context_length=max(architecture.context_length, config.train.sequence_length),
        )  # fmt: skip
        chosen = architecture.router.num_experts_per_token
        router = dataclasses.replace(config.router, num_experts_per_token=chosen)
        return dataclasses.replace(config, model=model, router=router)

    def loader(self, run: Run) -> Callable[[], Transformer]:
        """A function that reads the weights onto the mesh in force, each device its part, as the run keeps them."""

        def load() -> Transformer:
            tunable = make_tunable(run.config, run.mesh.devices.flat[0].platform)
            return load_model(self.weights.parameters, jax.eval_shape(tunable.make_base))

        return load


def open_base(folder: Path, config: Config) -> Base:
    """Opens what `--checkpoint` takes, without reading the weights.

    Raises:
        ConfigError: there is no Mixtral, none that could be exported again, or no tokenizer for it.
    """
    weights = open_weights(folder)
    require_mixtral(weights.architecture)
    tokenizer = find_tokenizer(weights.tokenizer, config.data, weights.architecture.model.vocab_size)
    return Base(folder, weights, tokenizer)


def open_named_base(config: Config) -> Base:
    """Opens what `finetune.base` names; raises ConfigError as `open_base` does."""
    assert config.finetune is not None and config.finetune.base is not None
    folder = Path(config.finetune.base).expanduser()
    require(folder.is_dir(), f"finetune.base={folder} is no folder: name a run, a step of it, or other weights")
    return open_base(folder, config)


def find_base(flags: RunFlags, workdir: Path, processes: Processes, stop: StopSignal) -> Base | None:
    """The base of a tuning run in `workdir`, pretrained into `workdir/base` if it must be; None if that was stopped.

    Raises:
        ConfigError: the base is no model that can be tuned; or, before anything is pretrained, the tuning cannot work.
    """
    config = flags.config
    finetune = config.finetune
    assert finetune is not None
    if finetune.base is not None:
        return open_named_base(config)
    if processes.index == 0:
        for tuned in (workdir, *sorted(workdir.glob("seed-*"))):  # They began with the base that they have.
            check_saved(tuned, config, "finetune.pretrain.")
    plain = dataclasses.replace(flags, config=plan_base(config, finetune), workdir=workdir / "base")
    run = start_run(plain, processes)
    _check_tuning(config, run)
    if not _is_complete(run):
        run.console.print(f"finetune.base is not given: pretraining a base into {run.workdir}")
        if pretrain(run, stop) == "stopped":
            return None
    return open_base(run.workdir, config)


def plan_base(config: Config, finetune: FinetuneConfig) -> Config:
    """The pretraining of a base for a tuning that names none."""
    plan = finetune.pretrain
    return dataclasses.replace(
        config,
        finetune=None,
        router=RouterConfig(num_experts_per_token=config.router.num_experts_per_token),
        data=dataclasses.replace(config.data, path=plan.path),
        optimizer=OptimizerConfig(learning_rate=plan.learning_rate),
        train=dataclasses.replace(
            config.train, num_steps=plan.num_steps, batch_size=plan.batch_size, gradient_accumulation=1
        ),
    )


def _check_tuning(config: Config, run: Run) -> None:
    """Finds what would else be found minutes later: data that is not there, and parts that no pattern matches."""
    resolve_mesh(config, run.mesh.size)
    fingerprint_source(config.data.path)
    with jax.set_mesh(run.mesh):
        jax.eval_shape(make_tunable(config, run.mesh.devices.flat[0].platform).make_model)


def _is_complete(run: Run) -> bool:
    checkpoints = run.workdir / "checkpoints"
    steps = find_steps(checkpoints) if checkpoints.is_dir() else []
    return run.processes.share("base complete", run.config.train.num_steps in steps)[0]
