"""What is trained at a time, and what it learns from."""

from __future__ import annotations

from dataclasses import dataclass

from fastlocal.train.errors import UserError
from fastlocal.train.options import values
from fastlocal.train.options.values import Options, option

OBJECTIVES = ("feature", "image", "cross-entropy", "transport", "end-to-end")
DECODERS = ("linear", "mlp", "conv", "transformer")


@dataclass(frozen=True)
class LearningOptions(Options):
    """What is trained at a time, and what it learns from."""

    modules: int | str | tuple[int, ...] = option(
        4,
        "modules trained one at a time: a number, 'stages', or cut points (first blocks of modules 2, 3, …)",
        values.modules,
    )
    objective: str = option(
        "feature",
        "what a module learns from; end-to-end for a model with weights (--pretrained, --initial-checkpoint)",
        choices=OBJECTIVES,
    )
    decoder: str = option("linear", "what maps a module's output back to its input", choices=DECODERS)
    first_target: str = option(
        "image",
        "what module 1 reconstructs for 'feature': the image or its patch embedding",
        choices=("image", "patch"),
    )
    reconstruction: str = option("mse", "reconstruction loss", choices=("mse", "l1", "smooth_l1"))
    normalize_target: bool = option(False, "normalize each token of the reconstruction target", values.switch)
    regularizer_weight: float | tuple[float, ...] | None = option(
        None,
        "weight of the reconstruction or transport term, one or one per local module; default: the objective's",
        values.weights,
        at_least=0,
    )
    classification_weight: float | tuple[float, ...] | None = option(
        None, "weight of the auxiliary cross-entropy, likewise", values.weights, at_least=0
    )
    lookahead: int = option(0, "blocks of the next module that an auxiliary head reads", values.whole, at_least=0)
    freeze: tuple[str, ...] = option(
        (), "what is not trained: names of parameters or of what holds them, such as patch_embed blocks.0", values.names
    )
    train: tuple[str, ...] = option((), "what is trained, and nothing else, likewise", values.names)
    linear_probe: bool = option(False, "train the classifier only", values.switch)
    exact_epochs: int | None = option(
        None,
        "train the last so many epochs with exact gradients, as 'end-to-end' does; default: two fifths of them for a local"
        " objective, 0 with --exact-every, --linear-probe or --parallel modules",
        values.whole,
        at_least=0,
    )
    exact_every: int = option(0, "train every so many-th step with exact gradients; 0: none", values.whole, at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective == "end-to-end" and self.exact_steps:
            raise UserError(
                "--exact-epochs and --exact-every are for local objectives (--objective feature, for one); end-to-end is exact"
                " throughout."
            )

        if sum((bool(self.freeze), bool(self.train), self.linear_probe)) > 1:
            raise UserError("--freeze, --train and --linear-probe exclude each other: each says what is trained.")

    @property
    def exact_steps(self) -> bool:
        """Whether some steps of a local objective compute exact gradients."""
        return bool(self.exact_epochs or self.exact_every)
