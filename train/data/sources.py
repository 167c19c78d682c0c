"""Data sets that come as arrays: the digits that come along, noise, and what torchvision reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastlocal.train.augment import generator_for
from fastlocal.train.config import TrainConfig
from fastlocal.train.errors import UserError, printable

Arrays = tuple[Tensor, Tensor, Sequence[str]]  # images [N, 3, H, W] uint8, labels [N] int64, names of the classes


def read_arrays(config: TrainConfig, training: bool, size: tuple[int, int]) -> Arrays:
    """One split of ``config.data.name``; ``size`` is that of synthetic images.

    Raises:
        UserError: the data set is not there; the sentence names the flag to add.
    """
    if config.data.name == "digits":
        return _digits(training)
    if config.data.name == "synthetic":
        return _synthetic(config, training, size)
    return _torchvision(config, training)


def _digits(training: bool) -> Arrays:
    """1,797 real 8×8 digits (digits.LICENCE says whose): 1,437 to train on, 360 to validate, the same share of each class."""
    with np.load(Path(__file__).with_name("digits.npz")) as digits:
        kept = slice(1437) if training else slice(1437, None)
        grey = torch.from_numpy(digits["images"][kept]).mul(255 / 16).round().to(torch.uint8)
        labels = torch.from_numpy(digits["labels"][kept]).long()
    return _three_channels(grey), labels, [str(digit) for digit in range(10)]


def _synthetic(config: TrainConfig, training: bool, size: tuple[int, int]) -> Arrays:
    """Random images of ten random classes: 1,024 to train on, 256 to validate, or as many as the limits say."""
    count = (config.data.train_limit or 1024) if training else (config.data.val_limit or 256)
    generator = generator_for(config.optimization.seed, training)
    images = torch.randint(256, (count, 3, *size), dtype=torch.uint8, generator=generator, device="cpu")
    return images, torch.randint(10, (count,), generator=generator, device="cpu"), [f"class {i}" for i in range(10)]


def _torchvision(config: TrainConfig, training: bool) -> Arrays:
    """The data sets that torchvision reads; its test set is the validation set."""
    from torchvision import datasets

    kind, split = config.data.name, "train" if training else "test"
    options = {"root": config.data.data_dir, "download": config.data.download}
    try:
        if kind in ("cifar10", "cifar100"):
            source = (datasets.CIFAR10 if kind == "cifar10" else datasets.CIFAR100)(train=training, **options)
            images, labels = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous(), source.targets
        elif kind == "fashion-mnist":
            source = datasets.FashionMNIST(train=training, **options)
            images, labels = _three_channels(source.data), source.targets
        else:
            source = (datasets.STL10 if kind == "stl10" else datasets.SVHN)(split=split, **options)
            images, labels = torch.from_numpy(np.ascontiguousarray(source.data)), source.labels
    except (RuntimeError, OSError) as error:
        if config.data.download:
            raise UserError(f"--data {kind} could not be downloaded to {config.data.data_dir!r}: {error}.") from None
        raise UserError(
            f"--data {kind} is not (whole) in {config.data.data_dir!r}: add --download to fetch it, or --data-dir FOLDER "
            "to say where it is."
        ) from None
    except Exception as error:  # torchvision's readers check what they read with whatever numpy and torch raise
        reason = printable(str(error), 200).rstrip(".") or type(error).__name__
        raise UserError(f"--data {kind} in {config.data.data_dir!r} cannot be read: {reason}.") from None
    if len(images) != len(labels) or images.ndim != 4 or not len(images):
        raise UserError(
            f"--data {kind} in {config.data.data_dir!r} cannot be read: {len(images)} images and {len(labels)} labels."
        )
    classes = getattr(source, "classes", None) or [str(i) for i in range(10)]
    return images, torch.as_tensor(labels, device="cpu").long(), [str(entry) for entry in classes]


def _three_channels(grey: Tensor) -> Tensor:
    """[N, H, W] to [N, 3, H, W]: timm's pretrained models and the objectives take three channels."""
    return grey[:, None].expand(-1, 3, -1, -1).contiguous()
