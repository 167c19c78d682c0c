"""What is done to training images."""

from __future__ import annotations

from dataclasses import dataclass

from fastlocal.train.errors import UserError
from fastlocal.train.options import values
from fastlocal.train.options.values import INTERPOLATIONS, Options, option


@dataclass(frozen=True)
class AugmentationOptions(Options):
    """What is done to training images."""

    crop_padding: int = option(
        0, "small images: pixels of padding before a random crop", values.whole, at_least=0, at_most=1024
    )
    hflip: bool = option(True, "flip half of the training images left to right", values.switch)
    cutout: int = option(
        0,
        "small images: side in pixels of a random grey square; 0: none",
        values.whole,
        at_least=0,
        at_most=values.LARGEST_MODEL_ARGUMENT,
    )
    vflip: float = option(0.0, "share of the training images flipped upside down", values.number, at_least=0, at_most=1)
    scale: tuple[float, float] = option(
        (0.08, 1.0), "random crop: smallest and largest share of the image", values.span
    )
    ratio: tuple[float, float] = option((3 / 4, 4 / 3), "random crop: narrowest and widest width/height", values.span)
    color_jitter: float = option(
        0.0, "brightness, contrast and saturation vary by up to this share", values.number, at_least=0
    )
    aa: str | None = option(None, "timm's auto-augment policy, such as rand-m9-mstd0.5-inc1")
    reprob: float = option(
        0.0, "share of the training images with a random rectangle erased", values.number, at_least=0, at_most=1
    )
    remode: str = option("pixel", "what erased rectangles are filled with", choices=("pixel", "const", "rand"))
    train_interpolation: str = option(
        "random", "resizing of training images; random: bilinear or bicubic", choices=("random", *INTERPOLATIONS)
    )
    mixup: float = option(0.0, "mixup alpha; 0: off", values.number, at_least=0, at_most=1000)
    cutmix: float = option(0.0, "cutmix alpha; 0: off", values.number, at_least=0, at_most=1000)

    cutmix_minmax: tuple[float, float] | None = option(
        None, "cutmix: smallest and largest share of the side that is cut, in place of its alpha", values.span
    )
    mixup_prob: float = option(
        1.0, "share of the batches that mixup or cutmix is done to", values.number, at_least=0, at_most=1
    )
    mixup_switch_prob: float = option(
        0.5, "where both are on: how often it is cutmix", values.number, at_least=0, at_most=1
    )
    mixup_mode: str = option("batch", "one mixture per batch, pair or element", choices=("batch", "pair", "elem"))
    mixup_off_epoch: int = option(0, "epoch from which nothing is mixed; 0: never", values.whole, at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixes and self.mixup_prob == 0:
            raise UserError("--mixup-prob 0 leaves --mixup and --cutmix nothing to do; leave them out.")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with each other, and their labels with them."""
        return bool(self.mixup or self.cutmix or self.cutmix_minmax)
