"""Data sets: reading a picture, listing a folder, arrays, timm's preprocessing, splits, and what tells a data set again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlocal.train.augment import BatchAugmentation
from fastlocal.train.config import OPTIONS, TrainConfig
from fastlocal.train.data.fingerprint import differences, fingerprint
from fastlocal.train.data.listing import (
    TRAINING_FOLDERS,
    VALIDATION_FOLDERS,
    Listing,
    Member,
    Pictures,
    PicturesInArchives,
    PicturesOfHub,
    list_folder,
    listed,
    split_folder,
    subset,
    told,
)
from fastlocal.train.data.picture import read_picture
from fastlocal.train.data.preprocessing import Preprocessing
from fastlocal.train.data.shards import list_shards
from fastlocal.train.data.sources import read_arrays
from fastlocal.train.data.splits import FileSplit, MemorySplit, Split, mean_and_std, training_indices
from fastlocal.train.errors import UserError, printable
from fastlocal.train.options.data import ARRAYS, DOWNLOADED
from fastlocal.train.options.values import flag

__all__ = [
    "Data",
    "FileSplit",
    "MemorySplit",
    "Preprocessing",
    "Split",
    "check_classes",
    "differences",
    "fingerprint",
    "read",
    "read_validation",
    "refuse_unasked",
    "training_indices",
]

# Pixels. Images that are larger, not all of one size, or to be augmented one by one are read from their files.
LARGEST_IN_MEMORY = 64


@dataclass(frozen=True)
class Data:
    """What a run reads.

    Attributes:
        notes: what was read beside what the data's name says, left out, converted or missing, a sentence each.
    """

    training: Split
    validation: Split
    preprocessing: Preprocessing
    notes: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        return self.training.classes

    def fingerprint(self) -> dict[str, Any]:
        return fingerprint(self.training, self.validation, self.preprocessing)


def read(config: TrainConfig, source: Mapping[str, Any], saved: Mapping[str, Any] | None = None) -> Data:
    """Both splits of ``config.data.name``; how they are read is decided once, from the headers of all images.

    Args:
        source: timm's ``pretrained_cfg`` of the model or of the weights that training starts from.
        saved: ``preprocessing`` and ``classes`` of a checkpoint that training goes on from.

    Raises:
        UserError: the data set is not there (the sentence names the flag to add), has fewer than two classes, or holds what
            cannot be read.
    """
    height, width = source["input_size"][-2:]
    designed = (height, width)
    preset = Preprocessing.of(saved["preprocessing"]) if saved is not None else None
    if config.data.name in ARRAYS:
        size = config.model.img_size or (preset.image_size if preset else designed)
        training = _limited(read_arrays(config, True, size), config.data.train_limit, config.model.in_chans)
        validation = _limited(read_arrays(config, False, size), config.data.val_limit, config.model.in_chans)
        classes, notes = tuple(saved["classes"] if saved else training[2]), tuple(_read_beside(config))
        of_data: tuple[tuple[float, ...], tuple[float, ...]] | None = mean_and_std(training[0])
        height, width = training[0].shape[-2:]
        settings = preset or Preprocessing.resolve(config, source, config.model.img_size or (height, width), of_data)
        splits: list[Split] = [
            _array_split(config, part, classes, settings, "the images") for part in (training, validation)
        ]
    else:
        parts = _listings(config)
        parts = tuple(part.checked(config.data.skip_broken) for part in parts)
        classes = tuple(parts[0].classes)
        if saved is not None and set(saved["classes"]) == set(classes):
            classes = tuple(saved["classes"])  # in the order that the model learned; others, the fingerprint will tell
        sizes = {header.size for part in parts for header in part.headers}
        small = len(sizes) == 1 and max(next(iter(sizes))) <= LARGEST_IN_MEMORY
        in_memory = preset.in_memory if preset else small and not _asked(config, LARGE)
        if in_memory and len(sizes) > 1:
            raise UserError(
                f"--data {config.data.name} no longer holds images of one size, and did when the run began."
            )
        pixels = [_pixels(part, config.model.in_chans) for part in parts] if in_memory else None
        of_data = mean_and_std(pixels[0]) if pixels else None
        width, height = next(iter(sizes)) if small else designed[::-1]
        settings = preset or Preprocessing.resolve(config, source, config.model.img_size or (height, width), of_data)
        splits = []
        for number, (part, what) in enumerate(zip(parts, ("training", "validation"), strict=True)):
            check_classes(classes, part.classes, f"the {what} images")
            labels = [classes.index(part.labels[i]) for i in part.kept]
            if pixels:
                images = pixels[number]
                splits.append(_memory_split(config, images, torch.tensor(labels, device="cpu"), classes, settings))
            else:
                splits.append(FileSplit(part.pictures, part.kept, tuple(labels), classes, settings, config))
        notes = (*_read_beside(config), *_notes(parts, classes))
    _check_augmentation(config, settings.in_memory)
    if settings.in_memory:
        _check_small(config, settings, (width, height))
    if len(classes) < 2:
        raise UserError(
            f"--data {config.data.name} has one class, {classes[0]!r}: there is nothing to tell apart; it takes at least two."
        )
    shown = {int(label) for label in splits[0].labels}
    if len(shown) < 2 and config.data.name != "synthetic":  # which teaches nothing anyhow
        raise UserError(
            f"all {len(splits[0])} training images are of class {classes[shown.pop()]!r}: there is nothing to tell apart."
        )
    return Data(splits[0], splits[1], settings, notes)


SMALL = ("crop_padding", "cutout")
LARGE = ("vflip", "scale", "ratio", "color_jitter", "aa", "reprob", "train_interpolation")


def _check_augmentation(config: TrainConfig, in_memory: bool) -> None:
    """Refuse augmentation that the images at hand would not get."""
    for name in _asked(config, LARGE if in_memory else SMALL):
        reason = (
            "images of one small size are held in memory, and get --crop-padding, --hflip and --cutout"
            if in_memory
            else f"it is for images that are all of one size up to {LARGEST_IN_MEMORY} pixels, and held in memory"
        )
        if others := [] if in_memory else _asked(config, LARGE):
            reason += f"; {flag(others[0])} has them read one by one"
        raise UserError(f"{flag(name)} would do nothing: {reason}.")


def _check_small(config: TrainConfig, settings: Preprocessing, own: tuple[int, int]) -> None:
    """Refuse what would leave nothing of images in memory, ``own`` pixels wide and high, or have nothing to do."""
    for name in SMALL:
        if config.get(name) >= min(own):
            raise UserError(
                f"{flag(name)} {config.get(name)} would leave nothing of images of {min(own)} pixels; it takes less."
            )
    if config.model.interpolation is not None and settings.image_size == own[::-1] and settings.crop_pct == 1:
        raise UserError("--interpolation would do nothing: the images are taken as they are.")


def _asked(config: TrainConfig, names: Sequence[str]) -> list[str]:
    """Those of the options ``names`` that are not at their default."""
    return [name for name in names if config.get(name) != OPTIONS[name].field.default]


def read_validation(config: TrainConfig, saved: Mapping[str, Any]) -> tuple[Split, tuple[str, ...]]:
    """The validation split of ``config.data.name`` as a saved run sees it, and notes as of `Data`.

    Args:
        saved: ``preprocessing`` and ``classes`` of a checkpoint.

    Raises:
        UserError: as of `read`; a class is none of the model's.
    """
    settings, classes = Preprocessing.of(saved["preprocessing"]), tuple(saved["classes"])
    if config.data.name in ARRAYS:
        arrays = _limited(read_arrays(config, False, settings.image_size), config.data.val_limit, settings.channels)
        return _array_split(config, arrays, classes, settings, f"--data {config.data.name}"), tuple(
            _read_beside(config)
        )
    part = _listings(config, training=False)[-1].checked(config.data.skip_broken)
    check_classes(classes, part.classes, f"--data {config.data.name}")
    labels = tuple(classes.index(part.labels[i]) for i in part.kept)
    notes = (*_read_beside(config), *_notes((part,), classes))
    return FileSplit(part.pictures, part.kept, labels, classes, settings, config), notes


def refuse_unasked(config: TrainConfig, asked: Mapping[str, Any]) -> None:
    """Refuse to fetch what a checkpoint's ``config`` names and the options that were ``asked`` for do not.

    Raises:
        UserError: the images lie on the Hugging Face hub.
    """
    if config.data.name.startswith("hfds/") and "data" not in asked:
        name = printable(config.data.name, 200)
        raise UserError(
            f"the run was trained on {name}, and nothing is fetched because a file says so: add --data {name}."
        )


def check_classes(known: Sequence[str], found: Sequence[str], where: str) -> None:
    """Refuse labels outside the classes that a model was built for.

    Raises:
        UserError: some of ``found`` are none of the ``known`` classes.
    """
    extra = [name for name in found if name not in known]
    if extra:
        raise UserError(
            f"the labels of {where} are outside the model's {len(known)} classes: {listed([repr(e) for e in extra], 5)}"
            f" {'is' if len(extra) == 1 else 'are'} none of {listed(list(known), 10)}."
        )


def _listings(config: TrainConfig, training: bool = True) -> tuple[Listing, ...]:
    """The training and the validation pictures; the latter alone where nothing is trained."""
    what, (kind, _, place) = f"--data {config.data.name}", config.data.name.partition(":")
    if kind == "folder":
        parts = _folder_listings(config, Path(place), what, training)
    elif config.data.name.startswith("wds/"):
        parts = _shard_listings(config, Path(config.data.name.removeprefix("wds/")), what, training)
    else:
        parts = _reader_listings(config, what, training)
    limits = (config.data.train_limit, config.data.val_limit)[-len(parts) :]
    return tuple(part.limited(limit) for part, limit in zip(parts, limits, strict=True))


def _folder_listings(config: TrainConfig, root: Path, what: str, training: bool) -> tuple[Listing, ...]:
    if not root.is_dir():
        raise UserError(f"{what} must hold train/CLASS/* and val/CLASS/* images, but {root} is no folder.")
    train, validation = split_folder(root, TRAINING_FOLDERS), split_folder(root, VALIDATION_FOLDERS)
    if config.data.val_split:
        if validation is not None:
            raise UserError(
                f"--val-split {config.data.val_split} does nothing: {validation} holds the validation images."
            )
        parts = list_folder(train or root, what).parted(config.data.val_split)
        return parts if training else parts[1:]
    if not training:
        return (list_folder(validation or train or root, what),)
    if train is None or validation is None:
        missing = train if train is not None else root
        raise UserError(
            f"{what} must hold train/CLASS/* and val/CLASS/* images, but {root} has no folder"
            f" {' or '.join(VALIDATION_FOLDERS) if train else ' or '.join(TRAINING_FOLDERS)}; add --val-split 0.1 to set a"
            f" tenth of {missing}/CLASS/* apart for validation."
        )
    return list_folder(train, what), list_folder(validation, what)


def _shard_listings(config: TrainConfig, root: Path, what: str, training: bool) -> tuple[Listing, ...]:
    class_map = config.data.class_map
    if class_map is not None and not Path(class_map).is_file():
        raise UserError(f"--class-map {printable(class_map, 200)} is no file.")
    if config.data.val_split:
        parts = list_shards(root, ("train",), what, class_map).parted(config.data.val_split)
        return parts if training else parts[1:]
    validation = list_shards(root, VALIDATION_FOLDERS, what, class_map)
    return (list_shards(root, ("train",), what, class_map), validation) if training else (validation,)


def _reader_listings(config: TrainConfig, what: str, training: bool) -> tuple[Listing, ...]:
    """What `timm.data.create_dataset` opens; its readers alone are used, since its data sets pass over broken images."""
    from timm.data import create_dataset

    tar = config.data.name.endswith(".tar")

    def listing(split: str) -> Listing:
        try:
            options: dict[str, Any] = {"class_map": config.data.class_map} if config.data.class_map else {}
            reader: Any = (
                create_dataset("", config.data.name, **options)
                if tar
                else create_dataset(config.data.name, split=split)
            )
            reader = reader.reader
            pictures: Pictures
            if tar:
                targets, indices = reader.targets.tolist(), reader.class_name_to_idx
                pictures = PicturesInArchives(
                    tuple(Member.of(config.data.name, i, within) for i, _, within in reader.samples)
                )
            else:
                targets, indices = list(reader.dataset[reader.label_key]), reader.class_to_idx
                pictures = PicturesOfHub(reader)
        except Exception as error:  # readers check what they are given with whatever the library under them raises
            reason = printable(str(error), 300).rstrip(".") or type(error).__name__
            raise UserError(f"{what} cannot be opened by timm's reader ({split}): {reason}.") from None
        names = {index: str(name) for name, index in indices.items()}
        return Listing.of(pictures, tuple(names.get(target, str(target)) for target in targets))

    if config.data.val_split:
        parts = listing("train").parted(config.data.val_split)
        return parts if training else parts[1:]
    if tar:
        if training:
            raise UserError(f"{what} is one archive: add --val-split 0.1 to set a tenth of it apart for validation.")
        return (listing("validation"),)
    return (listing("train"), listing("validation")) if training else (listing("validation"),)


def _pixels(part: Listing, channels: int) -> Tensor:
    """Images [N, C, H, W] uint8 of pictures that all have one size."""
    pictures = (read_picture(part.pictures[i], channels, part.pictures.where(i)) for i in part.kept)
    images = [torch.from_numpy(np.array(picture)) for picture in pictures]
    return torch.stack([image[None] if image.ndim == 2 else image.permute(2, 0, 1) for image in images])


def _limited(arrays: tuple[Tensor, Tensor, Sequence[str]], limit: int | None, channels: int) -> Any:
    """A subset of ``limit`` images, with this many channels."""
    images, labels, classes = arrays
    kept = subset(len(images), limit)
    images = images[kept]
    if channels == 1:
        from torchvision.transforms.functional import rgb_to_grayscale

        images = rgb_to_grayscale(images)
    elif channels == 4:
        images = torch.cat([images, torch.full_like(images[:, :1], 255)], 1)
    return images, labels[kept], classes


def _array_split(
    config: TrainConfig, arrays: Any, classes: Sequence[str], settings: Preprocessing, where: str
) -> MemorySplit:
    images, labels, names = arrays
    present = labels.unique().tolist()
    known = dict(enumerate(names))
    check_classes(classes, [known.get(i, str(i)) for i in present], where)
    places = torch.tensor([list(classes).index(name) if name in classes else -1 for name in names], device="cpu")
    return _memory_split(config, images, places[labels], classes, settings)


def _memory_split(
    config: TrainConfig, images: Tensor, labels: Tensor, classes: Sequence[str], settings: Preprocessing
) -> MemorySplit:
    augmentation = BatchAugmentation(
        config.augmentation.crop_padding, config.augmentation.hflip, config.augmentation.cutout
    )
    return MemorySplit(images, labels, tuple(classes), settings, augmentation, config.optimization.seed)


def _read_beside(config: TrainConfig) -> Iterator[str]:
    """What the data's name does not say: a checkpoint's options may name places that nobody has thought of."""
    if config.data.name in DOWNLOADED:
        yield f"read from {printable(config.data.data_dir, 200)}"
    if config.data.class_map is not None:
        yield f"classes named by {printable(config.data.class_map, 200)}"


def _notes(parts: Sequence[Listing], classes: Sequence[str]) -> Iterator[str]:
    headers = [header for part in parts for header in part.headers]
    left_out = sum((part.left_out for part in parts), Counter[str]())
    if left_out:
        yield f"left out: {told(left_out)}"
    if broken := sum(part.broken for part in parts):
        yield f"left out: {broken} that cannot be read (--skip-broken)"
    if transparent := sum(header.transparent for header in headers):
        yield f"{transparent} images with transparency, laid on white"
    if frames := sum(header.frames for header in headers):
        yield f"{frames} files with several frames, of which the first is used"
    found = len(set(parts[-1].classes))
    if found < len(classes):
        yield f"the validation images show {found} of the {len(classes)} classes"
