"""How weights change; one optimizer and one schedule per module."""

from __future__ import annotations

from dataclasses import dataclass

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
    smoothing: float = option(0.0, "label smoothing", values.number, at_least=0, below=1)
    model_ema: bool = option(False, "keep a moving average of the model, validate and export it", values.switch)
    model_ema_decay: float = option(0.9998, "decay of the moving average", values.number, at_least=0, below=1)
    seed: int = option(42, "seed of values.weights, data order and augmentation", values.whole, at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_epochs is None:
            object.__setattr__(self, "warmup_epochs", min(self.epochs / 10, 5.0))
        elif self.warmup_epochs > self.epochs:
            raise UserError(f"--warmup-epochs must be at most --epochs, {self.epochs}; got {self.warmup_epochs}.")
