"""From a picture to what the model sees: timm's settings and transforms, decided once per run and saved with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor
from torchvision.transforms import Compose

from fastlocal.train.config import TrainConfig

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Preprocessing:
    """Attributes as timm's ``resolve_data_config`` has them, but that the size of the input is in two parts.

    Attributes:
        image_size: height and width.
        in_memory: training images are all of one small size, held in memory and augmented a batch at a time.
        mean, std: per channel, of pixels from 0 to 1.
    """

    image_size: tuple[int, int]
    channels: int
    in_memory: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str

    @classmethod
    def resolve(
        cls,
        config: TrainConfig,
        source: Mapping[str, Any],
        image_size: tuple[int, int],
        of_data: tuple[tuple[float, ...], tuple[float, ...]] | None,
    ) -> Preprocessing:
        """What ``config`` says, else ``source`` (timm's ``pretrained_cfg`` of the weights that training starts from).

        Args:
            of_data: mean and std of the training images, if they are in memory: used unless there are weights to start
                from. Such images are taken whole.
        """
        asked: dict[str, Any] = {
            "input_size": (config.model.in_chans, *image_size),
            "interpolation": config.model.interpolation,
        }
        asked["crop_pct"] = config.model.crop_pct or (1.0 if of_data else None)
        found = resolve_data_config(asked, pretrained_cfg=dict(source))
        mean, std = found["mean"], found["std"]
        if of_data is not None and not (config.model.pretrained or config.model.initial_checkpoint):
            mean, std = of_data
        return cls(
            image_size=image_size,
            channels=config.model.in_chans,
            in_memory=of_data is not None,
            mean=_per_channel(config.model.mean or mean, config.model.in_chans),
            std=_per_channel(config.model.std or std, config.model.in_chans),
            interpolation=found["interpolation"],
            crop_pct=float(found["crop_pct"]),
            crop_mode=found["crop_mode"],
        )

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Preprocessing:
        """From `to_dict`."""
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in saved.items()}
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @property
    def normalize(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.mean, self.std

    def transform(self) -> Transform:
        """timm's validation transform, to uint8 [channels, height, width]: the engine normalizes, on the device."""
        return create_transform((self.channels, *self.image_size), normalize=False, **self._settings())

    def training_transform(self, config: TrainConfig) -> Transform:
        """timm's training transform, likewise; its random numbers come from Python's, NumPy's and torch's generators."""
        erase = config.augmentation.reprob > 0
        augment = create_transform(
            (self.channels, *self.image_size),
            is_training=True,
            scale=config.augmentation.scale,
            ratio=config.augmentation.ratio,
            hflip=0.5 if config.augmentation.hflip else 0.0,
            vflip=config.augmentation.vflip,
            color_jitter=cast(
                Any, config.augmentation.color_jitter or None
            ),  # None, for no jitter, is not in timm's annotation
            auto_augment=config.augmentation.aa,
            re_prob=config.augmentation.reprob,
            re_mode=config.augmentation.remode,
            normalize=erase,
            **{**self._settings(), "interpolation": config.augmentation.train_interpolation},
        )
        return Compose([augment, self._as_pixels]) if erase else augment

    def _as_pixels(self, normalized: Tensor) -> Tensor:
        """Random erasing works on normalized images; its noise is clipped to what pixels can be."""
        mean, std = (torch.tensor(v, device=normalized.device).view(-1, 1, 1) for v in self.normalize)
        return (normalized * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8)

    def _settings(self) -> dict[str, Any]:
        return {
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
            "mean": self.mean,
            "std": self.std,
        }


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """``values`` for this many channels; where they are of other channels, their average for each."""
    if len(values) == channels:
        return tuple(map(float, values))
    return (sum(values) / len(values),) * channels
