"""How weights change; one optimizer and one schedule per module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastlocal.train.errors import UserError
from fastlocal.train.options import values
from fastlocal.train.options.values import Options, option


@dataclass(frozen=True)
class OptimizationOptions(Options):
    """How weights change; one optimizer and one schedule per module."""

    epochs: int = option(100, "passes over the training images", values.whole, at_least=1)
    batch_size: int = option(128, "images per optimizer step", values.whole, at_least=1)
    opt: str = option("adamw", "any optimizer of timm's")
    lr: float = option(5e-4, "peak learning rate", values.number, above=0)
    weight_decay: float = option(
        0.05, "weight decay, not of biases, norms and position tables", values.number, at_least=0
    )
    lr_base: float | None = option(
        None,
        "instead of --lr: the rate of --lr-base-size images, which is scaled to --batch-size",
        values.number,
        above=0,
    )
    lr_base_size: int = option(256, "the batch size that --lr-base is for", values.whole, at_least=1)
    lr_base_scale: str | None = option(
        None,
        "how it grows with the batch; default: sqrt for ada… and lamb, else linear",
        choices=("linear", "sqrt"),
    )
    layer_decay: float | None = option(
        None, "factor of the learning rate from each block to the one before", values.number, above=0, at_most=1
    )
    layer_decay_min_scale: float = option(
        0.0, "the least that --layer-decay makes of it", values.number, at_least=0, at_most=1
    )
    opt_betas: tuple[float, ...] | None = option(None, "the optimizer's betas", values.numbers, at_least=0, below=1)
    opt_eps: float | None = option(None, "its epsilon", values.number, at_least=0)
    opt_kwargs: Mapping[str, Any] = field(
        default_factory=dict,
        metadata=values.about("its other arguments, such as nesterov=true", values.optimizer_arguments),
    )
    momentum: float = option(0.9, "for optimizers that have it", values.number, at_least=0, below=1)
    sched: str = option("cosine", "learning-rate schedule, per step", choices=("cosine", "poly", "step", "none"))
    warmup_epochs: float | None = option(
        None,
        "epochs of linear warm-up, fractions allowed; default: a tenth of --epochs, at most 5",
        values.number,
        at_least=0,
    )
    warmup_lr: float = option(1e-6, "learning rate that warm-up starts from", values.number, at_least=0)
    min_lr: float = option(0.0, "learning rate that cosine and poly end at", values.number, at_least=0)
    decay_epochs: float = option(30.0, "step schedule: epochs between decays", values.number, above=0)
    decay_rate: float = option(0.1, "step schedule: factor of a decay; poly: the power", values.number, above=0)
    clip_grad: float | None = option(None, "largest gradient norm of a module", values.number, above=0)
    clip_mode: str = option(
        "norm",
        "value: largest gradient of an element; agc: adaptive, a share of the weights' norm",
        choices=("norm", "value", "agc"),
    )
    smoothing: float = option(0.0, "label smoothing", values.number, at_least=0, below=1)
    bce_loss: bool = option(False, "a binary cross-entropy for each class in place of the softmax's", values.switch)
    bce_sum: bool = option(False, "its sum over the classes, not their mean", values.switch)
    bce_target_thresh: float | None = option(
        None, "targets above it count as 1, others as 0", values.number, at_least=0, at_most=1
    )
    class_weights: str | tuple[float, ...] | None = option(
        None,
        "of the loss: 'balanced' (as rare as a class is), or one number per class in their order",
        values.class_weights,
        at_least=0,
    )
    model_ema: bool = option(False, "keep a moving average of the model, validate and export it", values.switch)
    model_ema_decay: float = option(0.9998, "decay of the moving average", values.number, at_least=0, below=1)
    seed: int = option(42, "seed of weights, data order and augmentation", values.whole, at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr_base is not None:
            scale = self.lr_base_scale or ("sqrt" if self.opt.startswith(("ada", "lamb")) else "linear")
            ratio = self.batch_size / self.lr_base_size
            object.__setattr__(self, "lr", self.lr_base * (ratio**0.5 if scale == "sqrt" else ratio))
        if isinstance(self.class_weights, tuple) and not any(self.class_weights):
            raise UserError("--class-weights are all 0, so there is nothing to learn; give at least one above 0.")
        if self.bce_loss and self.class_weights is not None:
            raise UserError("--bce-loss and --class-weights exclude each other.")
        if self.warmup_epochs is None:
            object.__setattr__(self, "warmup_epochs", min(self.epochs / 10, 5.0))
        elif self.warmup_epochs > self.epochs:
            raise UserError(f"--warmup-epochs must be at most --epochs, {self.epochs}; got {self.warmup_epochs}.")
