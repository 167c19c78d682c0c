"""The configuration of a run: groups of options, each of which one part of training owns.

A run's values come, each over the one before, from the defaults in `fastlocal.train.options`, the recipe of the data set, a
file (``--config``) and the flags. The groups are for code; flags, files and checkpoints name the options alone. Flags that
timm's training script has are named as there. Nothing heavy is imported here: the command line reads this file before it
knows whether it will train.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, NamedTuple, cast

from fastlocal.finish import FINISH
from fastlocal.train.errors import UserError, nearest, shown
from fastlocal.train.options.augmentation import AugmentationOptions
from fastlocal.train.options.data import ARRAYS, DOWNLOADED, DataOptions
from fastlocal.train.options.devices import DeviceOptions
from fastlocal.train.options.learning import LearningOptions
from fastlocal.train.options.memory import MemoryOptions
from fastlocal.train.options.model import ModelOptions
from fastlocal.train.options.optimization import OptimizationOptions
from fastlocal.train.options.reports import ReportOptions
from fastlocal.train.options.values import Options, checked, flag, outer_name, plain
from fastlocal.train.recipes import GEOMETRY, RECIPES, fitting_geometry

__all__ = ["GROUPS", "OPTIONS", "TrainConfig", "to_yaml"]


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on; `TrainConfig.of` fills in a data set's recipe.

    Raises:
        UserError: options of different groups exclude each other.
    """

    data: DataOptions = field(default_factory=DataOptions)
    augmentation: AugmentationOptions = field(default_factory=AugmentationOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    learning: LearningOptions = field(default_factory=LearningOptions)
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    devices: DeviceOptions = field(default_factory=DeviceOptions)
    optimization: OptimizationOptions = field(default_factory=OptimizationOptions)
    reports: ReportOptions = field(default_factory=ReportOptions)

    def __post_init__(self) -> None:
        epochs, batch_size = self.optimization.epochs, self.optimization.batch_size
        if self.learning.exact_epochs is None:
            finish = round(FINISH * epochs) if self._has_finish else 0
            object.__setattr__(self, "learning", replace(self.learning, exact_epochs=finish))
        if self.exact_epochs > epochs:
            raise UserError(f"--exact-epochs must be at most --epochs, {epochs}; got {self.exact_epochs}.")
        if (self.augmentation.mixes) and batch_size % 2:
            raise UserError(f"--batch-size must be even for --mixup and --cutmix, got {batch_size}.")
        if self.devices.parallel == "modules" and (
            self.learning.objective == "end-to-end" or self.learning.exact_steps
        ):
            end_to_end = self.learning.objective == "end-to-end"
            what = "--objective end-to-end" if end_to_end else "an exact step"
            without = (
                "a local objective (--objective feature)"
                if end_to_end
                else "no exact steps (--exact-epochs 0 --exact-every 0)"
            )
            raise UserError(
                f"--parallel modules cannot train {what}: it needs gradients from later modules, and nothing is sent back; use"
                f" --parallel data, which gives exact gradients on any number of devices, or {without}."
            )
        if self.devices.data_parallel > 1 and self.devices.parallel != "modules":
            raise UserError(
                f"--data-parallel {self.devices.data_parallel} is for --parallel modules; --parallel data splits each batch"
                " over all processes."
            )

    @classmethod
    def of(cls, **given: Any) -> TrainConfig:
        """A configuration with the recipe of ``given["data"]`` where ``given`` says nothing.

        Raises:
            UserError: an unknown name, with the nearest known one, or a value that its option does not accept.
        """
        for name in given:
            if name not in OPTIONS:
                raise UserError(f"unknown option {shown(name)}{nearest(name, OPTIONS)}")
        data = checked(OPTIONS["data"].field, given.get("data", "digits"))
        recipe = dict(RECIPES.get(data, {}))
        kwargs = checked(OPTIONS["model_kwargs"].field, given.get("model_kwargs", {}))
        fitting = recipe.pop("model_kwargs", {})
        if given.get("pretrained") or given.get("initial_checkpoint"):
            # Local objectives fell behind there (profiling/accuracy/recipes/finetune.py).
            recipe.setdefault("objective", "end-to-end")
        if "model" in given:
            decided = any(given.get(name) for name in ("pretrained", "initial_checkpoint", "img_size"))
            decided = decided or kwargs.keys() & GEOMETRY
            fitting = {} if decided else fitting_geometry(data, checked(OPTIONS["model"].field, given["model"]))
        given_to = _grouped({**recipe, **given, "model_kwargs": {**fitting, **kwargs}})
        if given.get("lr_base") is not None:
            given_to["optimization"].pop("lr", None)  # a recipe's
        groups: dict[str, Any] = {group: GROUPS[group](**values) for group, values in given_to.items()}
        config = cls(**groups)
        if given.get("lr_base") is not None and given.get("lr") not in (None, config.optimization.lr):
            raise UserError("--lr and --lr-base exclude each other: both say what the learning rate is.")
        return config

    def changed(self, **options: Any) -> TrainConfig:
        """A configuration with other values for ``options``, which are named as flags are.

        Raises:
            UserError: as of `of`.
        """
        groups = _grouped(options)
        return replace(self, **{group: replace(getattr(self, group), **values) for group, values in groups.items()})

    def get(self, name: str) -> Any:
        """The value of the option with the flag ``name``."""
        return getattr(getattr(self, OPTIONS[name].group), OPTIONS[name].field.name)

    def without_effect(self, given: Iterable[str]) -> dict[str, str]:
        """Those of the options ``given`` that another makes void, each with a sentence that says so."""
        archive = self.data.name.endswith(".tar") or self.data.name.startswith("wds/")
        needs = {
            "data_dir": (
                self.data.name in DOWNLOADED,
                f"--data {self.data.name} does not lie there",
                self.data.data_dir,
            ),
            "download": (self.data.name in DOWNLOADED, f"--data {self.data.name} is not downloaded", None),
            "class_map": (archive, "only archives (--data FILE.tar, wds/FOLDER) take one", None),
            "val_split": (self.data.name not in ARRAYS, f"--data {self.data.name} has images to validate on", None),
            "skip_broken": (self.data.name not in ARRAYS, f"--data {self.data.name} has no files that could be", None),
            "model_ema_decay": (self.optimization.model_ema, "it needs --model-ema", None),
            "layer_decay_min_scale": (bool(self.optimization.layer_decay), "it needs --layer-decay", None),
            "lr_base_size": (bool(self.optimization.lr_base), "it needs --lr-base", None),
            "lr_base_scale": (bool(self.optimization.lr_base), "it needs --lr-base", None),
            "clip_mode": (bool(self.optimization.clip_grad), "it needs --clip-grad", None),
            "bce_sum": (self.optimization.bce_loss, "it needs --bce-loss", None),
            "bce_target_thresh": (self.optimization.bce_loss, "it needs --bce-loss", None),
            "remode": (self.augmentation.reprob > 0, "it needs --reprob", None),
            "decay_epochs": (self.optimization.sched == "step", "it is for --sched step", None),
            "decay_rate": (self.optimization.sched in ("step", "poly"), "it is for --sched step or poly", None),
            "min_lr": (self.optimization.sched in ("cosine", "poly"), "it is for --sched cosine or poly", None),
            "amp_dtype": (self.memory.amp, "it needs --amp", None),
            "reserve": (self.memory.budget is not None, "it needs --memory", None),
            "host_memory": (self.memory.budget is not None, "it needs --memory", None),
            "prefetch": (self.memory.residency == "module", "it needs --residency module", None),
            "warmup_epochs": (self.optimization.sched != "none", "--sched none has no warm-up", None),
            "warmup_lr": (
                self.optimization.sched != "none" and bool(self.optimization.warmup_epochs),
                "there is no warm-up",
                None,
            ),
        }
        for name in ("mixup_prob", "mixup_switch_prob", "mixup_mode", "mixup_off_epoch"):
            needs[name] = (self.augmentation.mixes, "it needs --mixup or --cutmix", None)
        objective, local = self.learning.objective, self.learning.modules != 1
        weights = self.model.pretrained or self.model.initial_checkpoint
        told = ", the default for a model with weights," if weights and "objective" not in given else ""
        for names, objectives in (
            (("decoder", "reconstruction", "normalize_target"), ("feature", "image")),
            (("first_target",), ("feature",)),
            (("regularizer_weight",), ("feature", "image", "transport")),
            (("classification_weight", "lookahead"), ("feature", "image", "transport", "cross-entropy")),
        ):
            for name in names:
                reason = (
                    f"--objective {objective}{told} has none"
                    if local
                    else "a single module learns from the labels alone"
                )
                needs[name] = (objective in objectives and local, reason, None)
        for name in ("objective", "exact_epochs", "exact_every"):
            needs[name] = (local or objective == "end-to-end", "a single module has exact gradients", None)
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        for name in ("parallel", "data_parallel", "rank_cuts", "queue", "timeout"):
            needs[name] = (several, "this is one process; torchrun starts several", None)
        for name in ("rank_cuts", "queue") if several else ():
            needs[name] = (self.devices.parallel == "modules", "it needs --parallel modules", None)
        for name in ("modules", "micro_batch", "recompute", "residency"):
            needs[name] = (self.memory.budget is None, "--memory has the planner set it", None)
        sentences = {}
        for name, (effective, reason, place) in needs.items():
            value = self.get(name)
            if name in given and not effective:
                given_as = flag(name) + ("" if isinstance(value, bool) else f" {shown(value)}")
                meant = f"; did you mean --data {place}?" if place and os.path.isdir(place) else "."
                sentences[name] = f"{given_as} would do nothing: {reason}{meant}"
        return sentences

    @property
    def _has_finish(self) -> bool:
        """Whether a run of which nothing else is said ends with exact gradients: a local one that can compute them."""
        learning = self.learning
        local = learning.objective != "end-to-end" and learning.modules != 1 and not learning.linear_probe
        return local and not learning.exact_every and self.devices.parallel != "modules"

    @property
    def exact_epochs(self) -> int:
        """The epochs at the end of a local run that compute exact gradients."""
        return self.learning.exact_epochs or 0

    def is_exact(self, epoch: int, step: int) -> bool:
        """Whether ``step`` of the run (from 0), in ``epoch`` (from 0), computes exact gradients for a local objective."""
        return epoch >= self.optimization.epochs - self.exact_epochs or (
            self.learning.exact_every > 0 and step % self.learning.exact_every == self.learning.exact_every - 1
        )

    @property
    def exact_share(self) -> float:
        """The share of a local objective's steps that compute exact gradients."""
        last = self.exact_epochs / self.optimization.epochs
        return last + (1 - last) / self.learning.exact_every if self.learning.exact_every else last

    def to_dict(self) -> dict[str, Any]:
        """The options without their groups, as plain values: fit for YAML and for a checkpoint that loads weights only."""
        return {name: plain(self.get(name)) for name in OPTIONS}


class Option(NamedTuple):
    """Where an option is kept: a field of a group of `TrainConfig`."""

    group: str
    field: Field[Any]


GROUPS: dict[str, type[Options]] = {group.name: cast(Any, group.default_factory) for group in fields(TrainConfig)}
OPTIONS = {outer_name(entry): Option(name, entry) for name, group in GROUPS.items() for entry in fields(group)}


def _grouped(options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        groups.setdefault(OPTIONS[name].group, {})[OPTIONS[name].field.name] = value
    return groups


def to_yaml(config: TrainConfig) -> str:
    """``config`` as YAML that `read_file` reads back to an equal configuration."""
    import yaml

    return yaml.safe_dump(config.to_dict(), sort_keys=False)
