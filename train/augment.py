"""Augmentation: whole batches of small images as uint8 tensors, large images one by one in worker processes.

Every random draw comes from a generator seeded by the run's seed and by what is drawn for (`generator_for`), so an
image's augmentation depends neither on the device nor on the number of workers, and a resumed run repeats it exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def generator_for(*numbers: int) -> torch.Generator:
    """A CPU generator with a seed of its own for each tuple of ``numbers``, such as (seed, epoch, step)."""
    # The length goes in because a SeedSequence takes (1,) and (1, 0) for the same.
    seed = int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(seed >> 1)


@dataclass(frozen=True)
class BatchAugmentation:
    """Random crop, flip and cutout of a batch of uint8 images.

    Crop: zero padding of ``crop_padding`` pixels, then a window of the original size (He et al., 2016). Flip: left to
    right, half of the images. Cutout: one grey square of side ``cutout``, which the border may clip (DeVries & Taylor,
    2017).
    """

    crop_padding: int = 0
    hflip: bool = False
    cutout: int = 0

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment ``images`` [B, C, H, W] uint8 on any device; ``generator`` is on the CPU."""
        batch, _, height, width = images.shape
        device = images.device
        if self.crop_padding:
            rows, columns = torch.randint(
                2 * self.crop_padding + 1, (2, batch, 1), generator=generator, device="cpu"
            ).to(device)
            rows, columns = rows + torch.arange(height, device=device), columns + torch.arange(width, device=device)
            padded = F.pad(images, (self.crop_padding,) * 4).permute(0, 2, 3, 1)
            which = torch.arange(batch, device=device)[:, None, None]
            images = padded[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        if self.hflip:
            flipped = torch.rand((batch, 1, 1, 1), generator=generator, device="cpu").to(device) < 0.5
            images = torch.where(flipped, images.flip(3), images)
        if self.cutout:
            top = torch.randint(height, (batch, 1), generator=generator, device="cpu").to(device) - self.cutout // 2
            left = torch.randint(width, (batch, 1), generator=generator, device="cpu").to(device) - self.cutout // 2
            inside_rows = _between(torch.arange(height, device=device), top, top + self.cutout)
            inside_columns = _between(torch.arange(width, device=device), left, left + self.cutout)
            square = (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None]
            images = torch.where(square, torch.tensor(127, dtype=images.dtype, device=device), images)
        return images.contiguous()


def _between(position: Tensor, start: Tensor, end: Tensor) -> Tensor:
    return (start <= position) & (position < end)


def mix_batch(
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], images: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Apply a ``timm.data.Mixup`` to uint8 images [B, 3, H, W]: uint8 images and soft labels [B, classes] float32.

    A last odd image is dropped, since mixup pairs images.
    """
    even = len(images) // 2 * 2
    mixed, soft = mixup(images[:even].float(), labels[:even])
    return mixed.round().to(torch.uint8), soft
