"""What an ablation file says: a question, a base config, arms that each change some keys of it,
seeds, tokens.

All of it is checked here, before anything runs. Running is for `cli`, reading what was written for
`records`.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mixtral_jax.config import Config, ConfigError, build, require, set_key

# The same in every arm: they see the same rows, learn by the same schedule and are judged at the
# same steps; and a process computes in one precision, on the devices that it started with.
FIXED_KEYS = (
    "data",
    "finetune",
    "checkpoint",
    "log",
    "mesh.cpu_devices",
    "model.vocab_size",
    "model.dtype",
    "optimizer.learning_rate",
    "optimizer.warmup_fraction",
    "optimizer.final_learning_rate_fraction",
    "train.num_steps",
    "train.batch_size",
    "train.sequence_length",
    "train.seed",
    "train.eval_every",
    "train.eval_sequences",
    "train.log_every",
)

_FIELDS = ("question", "base", "arms", "reference", "seeds", "tokens")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")


@dataclasses.dataclass(frozen=True)
class AblationFile:
    """What the file says, taken apart but not yet checked; the command line may still change it.

    Attributes:
        base: sections of a config. Where it has no `train.num_steps`, `tokens` gives the length of
            the runs.
        arms: name -> changed keys, dotted, with their values.
        reference: the arm that the others are compared with.
    """

    question: str
    base: dict[str, Any]
    arms: Mapping[str, Mapping[str, Any]]
    reference: str
    seeds: Sequence[int]
    tokens: int | None


@dataclasses.dataclass(frozen=True)
class Arm:
    """One setting that is tried; `config` is that of its runs but for the seed."""

    name: str
    changes: Mapping[str, Any]
    config: Config


@dataclasses.dataclass(frozen=True)
class ArmRun:
    """An arm with one seed: what is trained."""

    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        """As in its folder, and on the command line."""
        return f"{self.arm.name}/seed-{self.seed}"

    @property
    def config(self) -> Config:
        """Everything about the run."""
        return dataclasses.replace(
            self.arm.config, train=dataclasses.replace(self.arm.config.train, seed=self.seed)
        )

    def folder(self, workdir: Path) -> Path:
        """The run's own workdir, in that of the ablation."""
        return workdir / "arms" / self.name


@dataclasses.dataclass(frozen=True)
class Ablation:
    """A question, and the runs that shall answer it."""

    question: str
    arms: tuple[Arm, ...]
    reference: str
    seeds: tuple[int, ...]

    @property
    def runs(self) -> list[ArmRun]:
        """All of them, seed after seed: whenever they are stopped, what there is can be compared."""
        return [ArmRun(arm, seed) for seed in self.seeds for arm in self.arms]

    def select(self, names: Sequence[str]) -> list[ArmRun]:
        """The runs that `names` name, in their order: an arm, `ARM/seed-N`, or the number of a run
        from 0.

        Raises:
            ConfigError: a name is none of these.
        """
        runs = self.runs
        chosen = set()
        for name in names:
            found = [
                number
                for number, run in enumerate(runs)
                if name in (str(number), run.arm.name, run.name)
            ]
            arms = ", ".join(arm.name for arm in self.arms)
            require(
                found,
                f"--arm={name} is no arm ({arms}), no run (as {runs[0].name}) and no number below "
                f"{len(runs)}",
            )
            chosen.update(found)
        return [run for number, run in enumerate(runs) if number in chosen]


def read_ablation(returned: Any) -> AblationFile:
    """Takes apart what `get_config()` of an ablation file returned: a dict, in which `base` may be
    a ConfigDict.

    Raises:
        ConfigError: an entry is missing, unknown, or of another kind.
    """
    said = _to_dict(returned)
    require(isinstance(said, dict), "get_config() of an ablation must return a dict")
    unknown = [name for name in said if name not in _FIELDS]
    require(
        not unknown, f"unknown entry {', '.join(unknown)}; an ablation has {', '.join(_FIELDS)}"
    )
    missing = [name for name in ("question", "base", "arms", "reference") if name not in said]
    require(not missing, f"an ablation lacks {', '.join(missing)}; it has {', '.join(_FIELDS)}")
    for name in ("base", "arms"):
        require(
            isinstance(said[name], dict) and said[name],
            f"{name} of an ablation must be a dict, not empty",
        )
    tokens = said.get("tokens")
    require(
        tokens is None or (type(tokens) is int and tokens > 0),
        f"tokens={tokens!r} must be a whole number over 0",
    )
    base = said["base"]
    if tokens is not None and isinstance(base.get("train"), dict):
        base["train"].pop("num_steps", None)  # Of the parent that the base was made from.
    for name, changes in said["arms"].items():
        require(isinstance(changes, dict), f"arm {name} must be a dict from changed keys to values")
    return AblationFile(
        said["question"],
        base,
        said["arms"],
        said["reference"],
        said.get("seeds", (0, 1, 2)),
        tokens,
    )


def plan_ablation(file: AblationFile) -> Ablation:
    """Builds the config of every arm.

    Raises:
        ConfigError: names the arm, the key and the rule.
    """
    require(
        isinstance(file.question, str) and file.question.strip(),
        "question must say what shall be found out",
    )
    seeds = tuple(file.seeds)
    require(
        seeds
        and len(set(seeds)) == len(seeds)
        and all(type(seed) is int and seed >= 0 for seed in seeds),
        f"seeds={seeds} must be different whole numbers, at least one",
    )
    base = _with_length(file)
    arms = tuple(_build_arm(name, changes, base) for name, changes in file.arms.items())
    names = [arm.name for arm in arms]
    require(
        file.reference in names,
        f"reference={file.reference!r} must be one of the arms: {', '.join(names)}",
    )
    for number, arm in enumerate(arms):
        same = next((other for other in arms[:number] if other.config == arm.config), None)
        require(
            same is None,
            f"arm {arm.name} is the same config as arm {same and same.name}: change a key of it",
        )
    return Ablation(file.question.strip(), arms, file.reference, seeds)


def _with_length(file: AblationFile) -> dict[str, Any]:
    """The base, with as many steps as it takes to see the tokens."""
    train = file.base.get("train", {})
    if file.tokens is None or "num_steps" in train:
        return file.base
    try:
        per_step = int(train["batch_size"]) * int(train["sequence_length"])
    except (KeyError, ValueError):
        per_step = 0
    require(
        per_step > 0, "tokens needs train.batch_size and train.sequence_length in the base, over 0"
    )
    return {**file.base, "train": {**train, "num_steps": math.ceil(file.tokens / per_step)}}


def _build_arm(name: str, changes: Mapping[str, Any], base: Mapping[str, Any]) -> Arm:
    require(
        _NAME.fullmatch(name) and not name.isdecimal(),
        f"arm {name!r}: a name is of letters, digits and . _ + = -, and no number, as in top-2: it "
        "names a folder, and "
        "numbers are those of runs",
    )
    config = _to_dict(base)
    try:
        for key, value in changes.items():
            is_fixed = any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED_KEYS)
            require(
                not is_fixed,
                f"{key} must be the same in all arms, or their losses could not be compared: set "
                "it in base",
            )
            set_key(config, key, value)
        upcycle = config.get("upcycle")
        if isinstance(upcycle, dict) and not (upcycle.get("base") or upcycle.get("method")):
            del config[
                "upcycle"
            ]  # The base says how arms upcycle that have a method; this one has none.
        built = build(Config, config)
        require(
            built.finetune is None, "it has a section finetune: ablations pretrain, leave it out"
        )
        return Arm(name, dict(changes), built)
    except ConfigError as error:
        raise ConfigError(f"arm {name}: {error}") from None


def _to_dict(value: Any) -> Any:
    """A copy in plain dicts."""
    is_mapping = isinstance(value, Mapping | ConfigDict)
    return {key: _to_dict(inner) for key, inner in value.items()} if is_mapping else value
