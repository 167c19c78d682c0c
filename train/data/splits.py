"""Splits: labelled images that come as batches of uint8.

Small images are held in memory whole and augmented a batch at a time (`MemorySplit`); others are read from files and
augmented one by one in worker processes (`FileSplit`). Both give the same batches for the same seed and epoch, wherever in
the epoch reading starts.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlocal.distributed.data_parallel import share_of
from fastlocal.train.augment import BatchAugmentation, generator_for
from fastlocal.train.config import TrainConfig
from fastlocal.train.data.listing import Pictures
from fastlocal.train.data.picture import read_picture
from fastlocal.train.data.preprocessing import Preprocessing, Transform
from fastlocal.train.errors import UserError
from fastlocal.train.workers import read_in_workers


@dataclass(frozen=True)
class MemorySplit:
    """Images [N, C, H, W] uint8 and labels [N] int64 in memory."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    augmentation: BatchAugmentation
    seed: int

    def __len__(self) -> int:
        return len(self.images)

    def batches(
        self, indices: Sequence[Tensor], epoch: int | None, share: tuple[int, int] = (0, 1)
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Images [B, C, H, W] uint8 and labels [B] int64, on the CPU, for each tensor of indices.

        Args:
            epoch: seeds the augmentation; None: no augmentation, but the validation transform.
            share: number and count: of each batch, the part that this process trains on.
        """
        settings = self.preprocessing
        whole = self.images.shape[-2:] == settings.image_size and settings.crop_pct == 1.0
        for chosen in indices:
            images = self.images[chosen]
            if epoch is not None:
                images = self.augmentation(images, generator_for(self.seed, epoch, int(chosen[0])))
                if images.shape[-2:] != settings.image_size:
                    images = self._resized(images)
            elif not whole:
                images = self._transformed(images)
            if share[1] > 1:  # augmented as a whole, so that the parts are those of one process's batch
                part = share_of(len(chosen), *share)
                images, chosen = images[part], chosen[part]
            yield images, self.labels[chosen]

    def _resized(self, images: Tensor) -> Tensor:
        from torchvision.transforms.v2.functional import InterpolationMode, resize

        kind = (
            InterpolationMode.BILINEAR if self.preprocessing.interpolation == "bilinear" else InterpolationMode.BICUBIC
        )
        return resize(images, list(self.preprocessing.image_size), interpolation=kind, antialias=True)

    def _transformed(self, images: Tensor) -> Tensor:
        from torchvision.transforms.functional import to_pil_image

        transform = self.preprocessing.transform()
        with torch.device("cpu"):
            return torch.stack([transform(to_pil_image(image)) for image in images])

    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel over all pixels, for images scaled to 0…1."""
        return mean_and_std(self.images)


def mean_and_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of ``images`` [N, C, H, W] uint8 over all pixels, scaled to 0…1."""
    channels = range(images.shape[1])
    counts = torch.stack([torch.bincount(images[:, c].flatten(), minlength=256) for c in channels]).double()
    shares, values = counts / counts.sum(1, keepdim=True), torch.arange(256, device=images.device).double() / 255
    mean = shares @ values
    variance = shares @ values.square() - mean.square()
    # A constant channel has nothing to scale; 1/255 is one step of uint8.
    return tuple(mean.tolist()), tuple(variance.clamp(min=255**-2).sqrt().tolist())


@dataclass(frozen=True)
class FileSplit:
    """Pictures and their labels, read by ``workers`` processes; ``kept`` are the places of those that are used."""

    pictures: Pictures
    kept: tuple[int, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    config: TrainConfig

    def __len__(self) -> int:
        return len(self.kept)

    def batches(
        self, indices: Sequence[Tensor], epoch: int | None, share: tuple[int, int] = (0, 1)
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """As `MemorySplit.batches`."""
        settings = self.preprocessing
        transform = settings.transform() if epoch is None else settings.training_transform(self.config)
        loader = read_in_workers(
            _FilesOfEpoch(self, epoch, transform),
            [chosen[share_of(len(chosen), *share)].tolist() for chosen in indices],
            _collate,
            self.config.data.workers,
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch[0], batch[1]


Split = MemorySplit | FileSplit


class _FilesOfEpoch(torch.utils.data.Dataset[tuple[Tensor, int]]):
    def __init__(self, split: FileSplit, epoch: int | None, transform: Transform) -> None:
        self.split, self.epoch, self.transform = split, epoch, transform

    def __getitem__(self, index: int) -> Any:
        split = self.split
        place = split.kept[index]
        try:
            picture = read_picture(split.pictures[place], split.preprocessing.channels, split.pictures.where(place))
        except UserError as error:
            return error  # raised in a worker, it would arrive wrapped in the worker's traceback
        except OSError as error:
            return UserError(f"image file {split.pictures.where(place)} cannot be read: {error.strerror or error}.")
        with torch.device("cpu"), self._drawing(index):
            return self.transform(picture), split.labels[index]

    @contextlib.contextmanager
    def _drawing(self, index: int) -> Iterator[None]:
        """timm's transforms draw from all three global generators."""
        if self.epoch is None:
            yield
            return
        with torch.random.fork_rng(devices=[]):
            saved = random.getstate(), np.random.get_state()
            seed = generator_for(self.split.config.optimization.seed, self.epoch, index).initial_seed()
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            try:
                yield
            finally:
                random.setstate(saved[0])
                np.random.set_state(saved[1])


def _collate(samples: list[Any]) -> Any:
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    images = [torch.as_tensor(np.asarray(image), device="cpu") for image, _ in samples]
    return torch.stack(images), torch.tensor([label for _, label in samples], device="cpu")


def training_indices(total: int, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """The epoch's data order, cut into full batches; a data set smaller than a batch makes one."""
    order = torch.randperm(total, generator=generator_for(seed, epoch), device="cpu")
    return list(order[: max(total // batch_size, 1) * batch_size].split(batch_size))
