"""What an ablation is: a question, a base config, arms that change some of its keys, and seeds.

`read_ablation` takes the dict of an ablation file apart, `plan_ablation` builds and checks the
config of every arm before anything runs. `mixtral_jax.runs` trains the arms; `records` reads what
the runs have written.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mixtral_jax.config import Config, ConfigError, build, require, set_key

# Keys that no arm may change. All arms see the same rows, follow the same learning rate schedule
# and are evaluated at the same steps, or their losses could not be compared. A process cannot
# change its precision or its devices after it has started.
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

_REQUIRED_ENTRIES = ("question", "base", "arms", "reference")
_ENTRIES = (*_REQUIRED_ENTRIES, "seeds", "tokens")
_DEFAULT_SEEDS = (0, 1, 2)
_ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")


@dataclasses.dataclass(frozen=True)
class AblationFile:
    """The entries of an ablation file, before the command line changes them and they are checked.

    Attributes:
        question: the heading of the report.
        base: sections of a config. If it has no `train.num_steps`, `tokens` sets the number of
            steps.
        arms: name of the arm -> dotted keys that it changes -> their new values.
        reference: name of the arm that the others are compared with.
        seeds: every arm is trained once per seed.
        tokens: number of training tokens per run, or None.
    """

    question: str
    base: dict[str, Any]
    arms: Mapping[str, Mapping[str, Any]]
    reference: str
    seeds: Sequence[int]
    tokens: int | None


@dataclasses.dataclass(frozen=True)
class Arm:
    """One variant of the base config. `config` is the config of its runs, apart from the seed."""

    name: str
    changes: Mapping[str, Any]
    config: Config


@dataclasses.dataclass(frozen=True)
class ArmRun:
    """One training run: an arm with one seed."""

    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        """`ARM/seed-N`, as in the path of its folder and in the flag `--arm`."""
        return f"{self.arm.name}/seed-{self.seed}"

    @property
    def config(self) -> Config:
        """The full config of this run: that of the arm, with the seed."""
        return dataclasses.replace(
            self.arm.config, train=dataclasses.replace(self.arm.config.train, seed=self.seed)
        )

    def folder(self, workdir: Path) -> Path:
        """The workdir of this run, inside the workdir of the ablation."""
        return workdir / "arms" / self.name


@dataclasses.dataclass(frozen=True)
class Ablation:
    """A question with the arms and seeds that are trained to answer it; everything is checked."""

    question: str
    arms: tuple[Arm, ...]
    reference: str
    seeds: tuple[int, ...]

    @property
    def runs(self) -> list[ArmRun]:
        """All runs, seed after seed, so that a stopped ablation has all arms of its first seeds."""
        return [ArmRun(arm, seed) for seed in self.seeds for arm in self.arms]

    def select(self, names: Sequence[str]) -> list[ArmRun]:
        """Returns the runs that match any of `names`, in the order of `runs`.

        Args:
            names: each is the name of an arm, `ARM/seed-N`, or the number of a run, from 0.

        Raises:
            ConfigError: a name matches no run.
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
                f"--arm={name} is not the name of an arm ({arms}), not a run such as "
                f"{runs[0].name}, and not a number below {len(runs)}",
            )
            chosen.update(found)
        return [run for number, run in enumerate(runs) if number in chosen]


def read_ablation(returned: Any) -> AblationFile:
    """Takes apart the dict that `get_config()` of an ablation file returned.

    `base` may be a ConfigDict. If the file has `tokens`, the number of steps that `base` inherited
    from its parent config is dropped.

    Raises:
        ConfigError: an entry is missing, unknown, or has the wrong type.
    """
    entries = _to_dict(returned)
    require(isinstance(entries, dict), "get_config() of an ablation must return a dict")
    unknown = [name for name in entries if name not in _ENTRIES]
    require(
        not unknown, f"unknown entry {', '.join(unknown)}; an ablation has {', '.join(_ENTRIES)}"
    )
    missing = [name for name in _REQUIRED_ENTRIES if name not in entries]
    require(not missing, f"an ablation lacks {', '.join(missing)}; it has {', '.join(_ENTRIES)}")
    for name in ("base", "arms"):
        require(
            isinstance(entries[name], dict) and entries[name],
            f"{name} of an ablation must be a dict that is not empty",
        )
    tokens = entries.get("tokens")
    require(
        tokens is None or (type(tokens) is int and tokens > 0),
        f"tokens={tokens!r} must be a whole number over 0",
    )
    base = entries["base"]
    if tokens is not None and isinstance(base.get("train"), dict):
        base["train"].pop("num_steps", None)
    for name, changes in entries["arms"].items():
        require(isinstance(changes, dict), f"arm {name} must be a dict from changed keys to values")
    return AblationFile(
        question=entries["question"],
        base=base,
        arms=entries["arms"],
        reference=entries["reference"],
        seeds=entries.get("seeds", _DEFAULT_SEEDS),
        tokens=tokens,
    )


def plan_ablation(file: AblationFile) -> Ablation:
    """Builds the config of every arm and checks the whole ablation.

    Raises:
        ConfigError: something is wrong. The message names the arm, the key and the rule.
    """
    require(
        isinstance(file.question, str) and file.question.strip(),
        f"question={file.question!r} must be the text of a question",
    )
    seeds = tuple(file.seeds)
    require(
        seeds
        and len(set(seeds)) == len(seeds)
        and all(type(seed) is int and seed >= 0 for seed in seeds),
        f"seeds={seeds} must be different whole numbers from 0, at least one",
    )
    base = _set_num_steps(file)
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
            f"arm {arm.name} has the same config as arm {same and same.name}: change a key of it",
        )
    return Ablation(file.question.strip(), arms, file.reference, seeds)


def _set_num_steps(file: AblationFile) -> dict[str, Any]:
    """Returns the base config with the number of steps that `tokens` needs, if it has none."""
    train = file.base.get("train", {})
    if file.tokens is None or "num_steps" in train:
        return file.base
    try:
        per_step = int(train["batch_size"]) * int(train["sequence_length"])
    except (KeyError, ValueError):
        per_step = 0
    require(
        per_step > 0,
        f"tokens={file.tokens} needs train.batch_size and train.sequence_length over 0: set both "
        "in base",
    )
    return {**file.base, "train": {**train, "num_steps": math.ceil(file.tokens / per_step)}}


def _build_arm(name: str, changes: Mapping[str, Any], base: Mapping[str, Any]) -> Arm:
    require(
        _ARM_NAME.fullmatch(name) and not name.isdecimal(),
        f"arm {name!r}: a name has letters, digits and . _ + = -, begins with a letter or digit, "
        "and is not a number, because it names a folder and numbers select runs: use a name such "
        "as top-2",
    )
    config = _to_dict(base)
    try:
        for key, value in changes.items():
            is_fixed = any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED_KEYS)
            require(
                not is_fixed,
                f"{key} must be the same in all arms, or their losses could not be compared: set "
                "it in base instead",
            )
            set_key(config, key, value)
        upcycle = config.get("upcycle")
        if isinstance(upcycle, dict) and not (upcycle.get("base") or upcycle.get("method")):
            # The section of the base is for arms that set a method. This one sets none, so it does
            # not upcycle.
            del config["upcycle"]
        built = build(Config, config)
        require(
            built.finetune is None,
            "the section finetune must be left out: ablations only pretrain",
        )
        return Arm(name, dict(changes), built)
    except ConfigError as error:
        raise ConfigError(f"arm {name}: {error}") from None


def _to_dict(value: Any) -> Any:
    """Copies nested mappings into plain dicts."""
    is_mapping = isinstance(value, Mapping | ConfigDict)
    return {key: _to_dict(inner) for key, inner in value.items()} if is_mapping else value
