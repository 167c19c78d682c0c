"""Readers: the embedded digits, torchvision's file formats, image folders."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastlocal.train.config import TrainConfig
from fastlocal.train.data import FileSplit, MemorySplit, Split, check_classes, read, training_indices
from fastlocal.train.errors import UserError


def _read(name: Any = "train", model_size: int = 80, **options: Any) -> Split:
    data = read(TrainConfig.of(**options), {"input_size": (3, model_size, model_size)})
    return data.training if name == "train" else data.validation


def _memory(*arguments: Any, **options: Any) -> MemorySplit:
    split = _read(*arguments, **options)
    assert isinstance(split, MemorySplit)
    return split


# The embedded digits


def test_digits_are_split_once_and_for_all_by_class() -> None:
    train, validation = _memory("train", seed=1), _memory("validation", seed=2)
    assert (len(train), len(validation)) == (1437, 360)
    assert train.images.dtype == torch.uint8
    assert (train.images.min(), train.images.max()) == (0, 255)
    assert 32 <= torch.bincount(validation.labels).min() <= torch.bincount(validation.labels).max() <= 38
    again = _memory("train", seed=7)
    assert torch.equal(train.images, again.images)
    pixels = np.concatenate([train.images[:, 0].numpy(), validation.images[:, 0].numpy()])
    assert np.array_equal(np.unique(pixels), np.unique(np.round(np.arange(17) * 255 / 16)))
    # The sum of all pixels, of 0 to 16, as scikit-learn's load_digits has them.
    assert int(np.round(pixels.astype(float) * 16 / 255).sum()) == 561718


def test_normalization_is_that_of_the_pixels() -> None:
    split = _memory("train", train_limit=100)
    mean, std = split.mean_and_std()
    pixels = split.images.double().div(255).transpose(0, 1).flatten(1)
    assert torch.allclose(torch.tensor(mean, dtype=torch.float64), pixels.mean(1))
    assert torch.allclose(torch.tensor(std, dtype=torch.float64), pixels.std(1, unbiased=False))


def test_limits_take_the_same_random_subset_whatever_the_seed() -> None:
    one, other = _memory("train", train_limit=50, seed=1), _memory("train", train_limit=50, seed=2)
    assert len(one) == 50
    assert torch.equal(one.images, other.images)
    assert not torch.equal(one.images, _memory("train").images[:50])
    assert len(_read("validation", val_limit=7)) == 7
    assert len(_read("validation", val_limit=10**6)) == 360


def test_synthetic_images_are_noise() -> None:
    split = _memory("train", data="synthetic", train_limit=20, model_size=16)
    assert split.images.shape == (20, 3, 16, 16)
    assert split.images.float().std() > 60
    assert split.labels.unique().numel() > 3


def test_order_covers_every_image_and_changes_with_the_epoch() -> None:
    batches = training_indices(40, 8, seed=1, epoch=0)
    assert sorted(torch.cat(batches).tolist()) == list(range(40))
    assert [batch.tolist() for batch in batches] == [batch.tolist() for batch in training_indices(40, 8, 1, 0)]
    assert torch.cat(batches).tolist() != torch.cat(training_indices(40, 8, 1, 1)).tolist()
    assert [len(batch) for batch in training_indices(43, 8, 1, 0)] == [8] * 5  # only full batches
    assert [len(batch) for batch in training_indices(5, 8, 1, 0)] == [5]


def test_images_of_another_size_are_resized() -> None:
    split = _memory("train", train_limit=4, model_kwargs={"img_size": 16})
    images, _ = next(split.batches([torch.arange(4)], None))
    assert images.shape == (4, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert split.preprocessing.image_size == (16, 16)


# torchvision's formats, in tiny files

TORCHVISION = ("cifar10", "cifar100", "stl10", "svhn", "fashion-mnist")


@pytest.mark.parametrize("data", TORCHVISION)
def test_torchvision_formats_are_read_pixel_by_pixel(tmp_path: Path, data: str, torchvision_files: Any) -> None:
    for name, (images, labels) in torchvision_files(tmp_path, data).items():
        split = _memory(name, data=data, data_dir=str(tmp_path))
        assert np.array_equal(split.images.numpy(), images)
        assert np.array_equal(split.labels.numpy(), labels)
        assert len(split.classes) == (100 if data == "cifar100" else 10)
        assert split.preprocessing.image_size == images.shape[-2:]
    source = {"input_size": (3, 80, 80)}
    assert read(TrainConfig.of(data=data, data_dir=str(tmp_path)), source).notes == (f"read from {tmp_path}",)


@pytest.mark.parametrize("data", TORCHVISION)
def test_a_missing_data_set_says_which_flag_to_add(tmp_path: Path, data: str) -> None:
    with pytest.raises(UserError, match=r"--download .*--data-dir"):
        _read(data=data, data_dir=str(tmp_path))


def test_a_failed_download_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import svhn

    def offline(*_: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(svhn, "download_url", offline)
    with pytest.raises(UserError, match=r"could not be downloaded .* no route to host"):
        _read(data="svhn", data_dir=str(tmp_path), download=True)


# Image folders


def _write_folder(root: Path, size: int, classes: tuple[str, ...] = ("cat", "dog")) -> dict[str, np.ndarray]:
    written = {}
    for split, count in (("train", 5), ("val", 2)):
        for position, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(100 * position + i).integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
                written[f"{split}/{name}/{i}"] = pixels
    return written


def test_a_folder_of_small_images_is_read_into_memory(tmp_path: Path) -> None:
    written = _write_folder(tmp_path, 20)
    split = _memory("train", data=f"folder:{tmp_path}")
    assert split.classes == ("cat", "dog")
    assert split.labels.tolist() == [0] * 5 + [1] * 5
    assert np.array_equal(split.images[7].permute(1, 2, 0).numpy(), written["train/dog/2"])
    assert split.preprocessing.image_size == (20, 20)


def test_a_folder_of_large_images_gives_the_same_batches_for_any_workers_and_start(tmp_path: Path) -> None:
    _write_folder(tmp_path, 100)
    order = training_indices(10, 3, seed=5, epoch=1)

    def batches(workers: int, start: int, epoch: int | None = 1) -> list[torch.Tensor]:
        split = _read("train", data=f"folder:{tmp_path}", workers=workers)
        assert isinstance(split, FileSplit)
        return [images for images, _ in split.batches(order[start:], epoch)]

    before = torch.get_rng_state()
    alone, helped = batches(0, 0), batches(2, 1)
    assert torch.equal(torch.get_rng_state(), before)  # the run's own random numbers are left alone
    assert alone[0].shape == (3, 3, 80, 80)
    assert all(torch.equal(a, b) for a, b in zip(alone[1:], helped, strict=True))
    assert not torch.equal(alone[0], batches(0, 0, epoch=2)[0])
    assert torch.equal(batches(0, 0, epoch=None)[0], batches(0, 0, epoch=None)[0])


def test_pictures_are_known_before_one_was_opened() -> None:
    """Pillow loads its readers when they are first asked for."""
    code = "from fastlocal.train.data.listing import picture_endings; print(*picture_endings())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {".jpg", ".png", ".webp", ".mpo", ".tif"} <= set(told)
    assert not {".mp4", ".eps", ".pdf"} & set(told)


@pytest.mark.parametrize(("size", "workers"), [(20, 0), (100, 0), (100, 1)])
def test_a_broken_file_is_named(tmp_path: Path, size: int, workers: int) -> None:
    _write_folder(tmp_path, size)
    broken = tmp_path / "train" / "dog" / "3.png"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(UserError, match=r"train/dog/3\.png cannot be read") as mistake:
        list(_read("train", data=f"folder:{tmp_path}", workers=workers).batches([torch.arange(10)], 0))
    assert "\n" not in str(mistake.value)


def test_an_unusable_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must hold train/CLASS/\* and val/CLASS/\*"):
        _read("train", data=f"folder:{tmp_path}")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no folder val or valid or validation or test; add --val-split 0.1"):
        _read("train", data=f"folder:{tmp_path}")
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match=r"is not usable: .*train holds no class folder with images"):
        _read("train", data=f"folder:{tmp_path}")


def test_other_classes_are_refused() -> None:
    check_classes(["a", "b"], ("b",), "x")  # a subset is none
    with pytest.raises(UserError, match="labels of x are outside the model's 2 classes: 'c' is none of a, b"):
        check_classes(["a", "b"], ("a", "b", "c"), "x")


@pytest.mark.parametrize("size", [20, 100])
def test_the_default_device_is_the_users(tmp_path: Path, size: int) -> None:
    """Data is read, drawn and augmented on the host, whatever `torch.set_default_device` says."""
    _write_folder(tmp_path, size)

    def training() -> list[tuple[torch.Tensor, torch.Tensor]]:
        small = {"crop_padding": 2, "cutout": 4} if size == 20 else {}
        split = _read("train", data=f"folder:{tmp_path}", train_limit=8, hflip=True, workers=0, **small)
        return [
            *split.batches(training_indices(8, 4, seed=5, epoch=1), 1),
            *split.batches([torch.tensor([1, 2], device="cpu")], None),
        ]

    expected = training()
    with torch.device("meta"):
        found = training()
    for ours, theirs in zip(found, expected, strict=True):
        assert all(map(torch.equal, ours, theirs))
