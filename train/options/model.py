"""The model, the weights it starts from and what it sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastlocal.train.errors import UserError
from fastlocal.train.options import values
from fastlocal.train.options.values import INTERPOLATIONS, Options, option


@dataclass(frozen=True)
class ModelOptions(Options):
    """The model, the weights it starts from and what it sees."""

    name: str = option("swin_tiny_patch4_window7_224", "a timm vision transformer", flag="model")
    model_kwargs: Mapping[str, Any] = field(
        default_factory=dict,
        metadata=values.about("arguments of timm.create_model, such as img_size=32 depths=2,2,2,2", values.keywords),
    )
    pretrained: bool = option(False, "start from timm's pretrained weights, with their normalization", values.switch)
    initial_checkpoint: str | None = option(
        None, "start from these weights: a file, a run, local-dir:FOLDER, hf-hub:NAME"
    )
    drop_path: float = option(0.0, "stochastic depth rate of the last block", values.number, at_least=0, below=1)
    img_size: tuple[int, int] | None = option(
        None, "pixels that images are brought to: one side, or height and width", values.size
    )
    in_chans: int = option(3, "1: grey, 3: RGB, 4: RGB and transparency", values.whole, at_least=1, at_most=4)
    mean: tuple[float, ...] | None = option(
        None, "mean of the pixels, 0 to 1, per channel", values.numbers, at_least=0, at_most=1
    )
    std: tuple[float, ...] | None = option(
        None, "their standard deviation, likewise", values.numbers, above=0, at_most=1
    )
    interpolation: str | None = option(None, "resizing of validation images", choices=INTERPOLATIONS)
    crop_pct: float | None = option(
        None, "side of the validation crop, as a share of the resized image", values.number, above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._gather_arguments()
        if self.in_chans == 2:
            raise UserError("--in-chans must be 1 (grey), 3 (RGB) or 4 (RGB and transparency), got 2.")
        for name in ("mean", "std"):
            given = getattr(self, name)
            if given is not None and len(given) not in (1, self.in_chans):
                raise UserError(f"--{name} takes one number or one per channel, {self.in_chans}; got {len(given)}.")
        if self.pretrained and self.initial_checkpoint is not None:
            raise UserError("--pretrained and --initial-checkpoint exclude each other: both say what to start from.")

    def _gather_arguments(self) -> None:
        """What has a flag of its own has one home, whichever way it was given."""
        rest = dict(self.model_kwargs)
        for argument, name, unset in (
            ("img_size", "img_size", None),
            ("in_chans", "in_chans", 3),
            ("drop_path_rate", "drop_path", 0.0),
        ):
            if argument in rest:
                value = values.checked(self.__dataclass_fields__[name], rest.pop(argument))
                if getattr(self, name) not in (unset, value):
                    raise UserError(f"{values.flag(name)} and --model-kwargs {argument}=… say different things.")
                object.__setattr__(self, name, value)
        object.__setattr__(self, "model_kwargs", rest)
