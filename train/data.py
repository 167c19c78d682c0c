"""Data sets as batches of uint8 images.

Small images are held in memory whole and augmented a batch at a time (`MemorySplit`); large ones are read from files
and augmented one by one in worker processes (`FileSplit`). Both give the same batches for the same seed and epoch,
wherever in the epoch reading starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastlocal.train.augment import BatchAugmentation, file_transform, generator_for
from fastlocal.train.config import TrainConfig, UserError
from fastlocal.train.workers import read_in_workers

SplitName = Literal["train", "validation"]
LARGEST_IN_MEMORY = 64  # pixels; image folders whose images are larger are read by workers
SUBSET_SEED = 0  # --train-limit and --val-limit take the same images whatever the run's seed


@dataclass(frozen=True)
class MemorySplit:
    """Images [N, 3, H, W] uint8 and labels [N] int64 in memory."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    image_size: int  # what batches are resized to, if the images have another size
    augmentation: BatchAugmentation
    seed: int

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, indices: Sequence[Tensor], epoch: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Images [B, 3, H, W] uint8 and labels [B] int64, on the CPU, for each tensor of indices.

        ``epoch`` seeds the augmentation; None: no augmentation.
        """
        from torchvision.transforms.v2.functional import resize

        for chosen in indices:
            images = self.images[chosen]
            if epoch is not None:
                images = self.augmentation(images, generator_for(self.seed, epoch, int(chosen[0])))
            if images.shape[-2:] != (self.image_size, self.image_size):
                images = resize(images, [self.image_size, self.image_size], antialias=True)
            yield images, self.labels[chosen]

    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel over all pixels, for images scaled to 0…1."""
        counts = torch.stack([torch.bincount(self.images[:, c].flatten(), minlength=256) for c in range(3)]).double()
        shares, values = counts / counts.sum(1, keepdim=True), torch.arange(256).double() / 255
        mean = shares @ values
        variance = shares @ values.square() - mean.square()
        # A constant channel has nothing to scale; 1/255 is one step of uint8.
        return tuple(mean.tolist()), tuple(variance.clamp(min=255**-2).sqrt().tolist())


@dataclass(frozen=True)
class FileSplit:
    """Image files and their labels, read by ``workers`` processes."""

    paths: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    image_size: int
    hflip: bool
    seed: int
    workers: int

    def __len__(self) -> int:
        return len(self.paths)

    def batches(self, indices: Sequence[Tensor], epoch: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """As `MemorySplit.batches`."""
        items = _FilesOfEpoch(self, epoch, file_transform(self.image_size, epoch is not None, self.hflip))
        loader = read_in_workers(items, [chosen.tolist() for chosen in indices], _collate, self.workers)
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch[0], batch[1]


Split = MemorySplit | FileSplit


class _FilesOfEpoch(torch.utils.data.Dataset[tuple[Tensor, int]]):
    def __init__(self, split: FileSplit, epoch: int | None, transform: Callable[[object], Tensor]) -> None:
        self.split, self.epoch, self.transform = split, epoch, transform

    def __getitem__(self, index: int) -> Any:
        try:
            image = _read_image(self.split.paths[index])
        except UserError as error:
            return error  # raised in a worker, it would arrive wrapped in the worker's traceback
        with torch.random.fork_rng(devices=[]):  # torchvision's transforms draw from the global generator
            if self.epoch is not None:
                torch.manual_seed(generator_for(self.split.seed, self.epoch, index).initial_seed())
            return self.transform(image), self.split.labels[index]


def _collate(samples: list[Any]) -> Any:
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    return torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples])


def _subset(total: int, count: int | None) -> Tensor:
    if count is None or count >= total:
        return torch.arange(total)
    return torch.randperm(total, generator=generator_for(SUBSET_SEED))[:count].sort().values


def training_indices(total: int, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """The epoch's data order, cut into full batches; a data set smaller than a batch makes one."""
    order = torch.randperm(total, generator=generator_for(seed, epoch))
    return list(order[: max(total // batch_size, 1) * batch_size].split(batch_size))


def read(config: TrainConfig, name: SplitName, model_size: int) -> Split:
    """Read one split of ``config.data``.

    Its ``image_size`` is the model's ``img_size`` from ``config.model_kwargs`` if given; else the images' own, where
    they are small, or ``model_size``, the size that the model was designed for.

    Raises:
        UserError: the data set is not there (the sentence names the flag to add), is empty, or holds a broken file.
    """
    kind, _, folder = config.data.partition(":")
    asked_size = config.model_kwargs.get("img_size")
    limit = config.train_limit if name == "train" else config.val_limit
    if kind == "folder":
        return _read_folder(config, Path(folder), name, limit, asked_size, model_size)
    if kind == "digits":
        images, labels, classes = _digits(name)
    elif kind == "synthetic":
        images, labels, classes = _synthetic(config, name, asked_size or model_size)
    else:
        images, labels, classes = _torchvision(config, name)
    kept = _subset(len(images), limit)
    return _memory_split(config, images[kept], labels[kept], classes, asked_size)


def _memory_split(
    config: TrainConfig, images: Tensor, labels: Tensor, classes: Sequence[str], asked_size: int | None
) -> MemorySplit:
    augmentation = BatchAugmentation(config.crop_padding, config.hflip, config.cutout)
    size = asked_size or max(images.shape[-2:])
    return MemorySplit(images, labels, tuple(classes), size, augmentation, config.seed)


def _digits(name: SplitName) -> tuple[Tensor, Tensor, list[str]]:
    """scikit-learn's 1,797 real 8×8 digits: 1,437 to train on, 360 to validate, the same share of each class."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, validation = train_test_split(
        np.arange(len(digits.target)), test_size=360, random_state=0, stratify=digits.target
    )
    kept = train if name == "train" else validation
    grey = torch.from_numpy(digits.images[kept]).mul(255 / 16).round().to(torch.uint8)
    labels = torch.from_numpy(digits.target[kept]).long()
    return _three_channels(grey), labels, [str(digit) for digit in range(10)]


def _synthetic(config: TrainConfig, name: SplitName, size: int) -> tuple[Tensor, Tensor, list[str]]:
    """Random images of ten random classes: 1,024 to train on, 256 to validate, or as many as the limits say."""
    count = (config.train_limit or 1024) if name == "train" else (config.val_limit or 256)
    generator = generator_for(config.seed, name == "train")
    images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return images, torch.randint(10, (count,), generator=generator), [f"class {i}" for i in range(10)]


def _torchvision(config: TrainConfig, name: SplitName) -> tuple[Tensor, Tensor, list[str]]:
    """The data sets that torchvision reads; its test set is the validation set."""
    from torchvision import datasets

    training, kind = name == "train", config.data
    options = {"root": config.data_dir, "download": config.download}
    try:
        if kind in ("cifar10", "cifar100"):
            source = (datasets.CIFAR10 if kind == "cifar10" else datasets.CIFAR100)(train=training, **options)
            images, labels = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous(), source.targets
        elif kind == "fashion-mnist":
            source = datasets.FashionMNIST(train=training, **options)
            images, labels = _three_channels(source.data), source.targets
        else:
            source = (datasets.STL10 if kind == "stl10" else datasets.SVHN)(split=_split_name(training), **options)
            images, labels = torch.from_numpy(np.ascontiguousarray(source.data)), source.labels
    except (RuntimeError, OSError) as error:
        if config.download:
            raise UserError(f"--data {kind} could not be downloaded to {config.data_dir!r}: {error}.") from None
        raise UserError(
            f"--data {kind} is not (whole) in {config.data_dir!r}: add --download to fetch it, or --data-dir FOLDER "
            "to say where it is."
        ) from None
    classes = getattr(source, "classes", None) or [str(i) for i in range(10)]
    return images, torch.as_tensor(labels).long(), [str(entry) for entry in classes]


def _split_name(training: bool) -> str:
    return "train" if training else "test"


def _three_channels(grey: Tensor) -> Tensor:
    """[N, H, W] to [N, 3, H, W]: timm's pretrained models and the objectives take three channels."""
    return grey[:, None].expand(-1, 3, -1, -1).contiguous()


def _read_folder(
    config: TrainConfig, root: Path, name: SplitName, limit: int | None, asked_size: int | None, model_size: int
) -> Split:
    """``root/train/CLASS/*`` and ``root/val/CLASS/*``, as torchvision's ImageFolder reads them."""
    from torchvision.datasets import ImageFolder

    folder = root / ("train" if name == "train" else "val")
    if not folder.is_dir():
        raise UserError(
            f"--data folder:{root} must hold train/CLASS/* and val/CLASS/* images, but {folder} is no folder."
        )
    try:
        listing = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise UserError(f"--data folder:{root} is not usable: {str(error).splitlines()[0].rstrip('.')}.") from None
    samples = [listing.samples[i] for i in _subset(len(listing.samples), limit).tolist()]
    paths, labels = [path for path, _ in samples], [label for _, label in samples]

    first = _read_image(paths[0])
    if max(first.size) > LARGEST_IN_MEMORY:
        size = asked_size or model_size
        return FileSplit(
            tuple(paths), tuple(labels), tuple(listing.classes), size, config.hflip, config.seed, config.workers
        )
    images = torch.empty((len(paths), 3, first.height, first.width), dtype=torch.uint8)
    for index, path in enumerate(paths):
        image = _read_image(path)
        if image.size != first.size:
            image = image.resize(first.size, Image.Resampling.BILINEAR)
        images[index] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return _memory_split(config, images, torch.tensor(labels), listing.classes, asked_size)


def _read_image(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"image file {path} cannot be read: {str(error).rstrip('.')}.") from None


def check_same_classes(expected: Sequence[str], found: Sequence[str], where: str) -> None:
    """Refuse labels outside the classes that a model was built for.

    Raises:
        UserError: ``found`` are not the ``expected`` classes, in the same order.
    """
    if list(expected) == list(found):
        return
    extra = [entry for entry in found if entry not in expected]
    what = f"class {extra[0]!r} is none of them" if extra else f"{where} has {len(found)} of them"
    raise UserError(f"the labels of {where} are outside the model's {len(expected)} classes: {what}.")
