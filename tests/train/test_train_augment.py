"""Augmentation of whole batches."""

from __future__ import annotations

import torch
from timm.data import Mixup

from fastlocal.train.augment import BatchAugmentation, generator_for, mix_batch


def _images(count: int = 64, size: int = 8) -> torch.Tensor:
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator_for(1))


def test_seeds_differ_for_every_tuple_and_repeat() -> None:
    tuples = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 1), (0, 1, 0)]
    draws = [torch.rand((), generator=generator_for(*numbers)).item() for numbers in tuples]
    assert len(set(draws)) == len(tuples)
    assert draws == [torch.rand((), generator=generator_for(*numbers)).item() for numbers in tuples]


def test_crop_takes_a_window_of_the_padded_image() -> None:
    images = _images()
    cropped = BatchAugmentation(crop_padding=2)(images, generator_for(2))
    offsets = set()
    for image, result in zip(images, cropped, strict=True):
        padded = torch.zeros(3, 12, 12, dtype=torch.uint8)
        padded[:, 2:10, 2:10] = image
        found = [(y, x) for y in range(5) for x in range(5) if torch.equal(padded[:, y : y + 8, x : x + 8], result)]
        assert len(found) == 1
        offsets.add(found[0])
    assert {y for y, _ in offsets} == {x for _, x in offsets} == set(range(5))


def test_flip_mirrors_about_half_of_the_images() -> None:
    images = _images(200)
    flipped = BatchAugmentation(hflip=True)(images, generator_for(3))
    mirrored = [torch.equal(new, old.flip(2)) for new, old in zip(flipped, images, strict=True)]
    kept = [torch.equal(new, old) for new, old in zip(flipped, images, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 70 < sum(mirrored) < 130


def test_cutout_greys_one_square() -> None:
    images = torch.full((100, 3, 8, 8), 9, dtype=torch.uint8)
    grey = BatchAugmentation(cutout=4)(images, generator_for(4)) == 127
    assert ((~grey) == (BatchAugmentation(cutout=4)(images, generator_for(4)) == 9)).all()
    for mask in grey[:, 0]:
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns)  # a rectangle
        assert 2 <= rows.sum() <= 4  # clipped by the border at most by half
        assert 2 <= columns.sum() <= 4
    assert (grey[:, 0].sum((1, 2)) == 16).any()


def test_nothing_asked_nothing_changed() -> None:
    assert torch.equal(BatchAugmentation()(_images(), generator_for(0)), _images())


def test_mixup_gives_uint8_images_and_soft_labels() -> None:
    torch.manual_seed(0)
    mixup = Mixup(mixup_alpha=1.0, cutmix_alpha=0.0, label_smoothing=0.0, num_classes=4)
    images, labels = _images(5), torch.tensor([0, 1, 2, 3, 0])
    mixed, soft = mix_batch(mixup, images, labels)
    assert mixed.shape == (4, 3, 8, 8)
    assert mixed.dtype == torch.uint8
    share = soft[0, 0].item()
    expected = images[0].float() * share + images[3].float() * (1 - share)
    assert (mixed[0].float() - expected).abs().max() <= 0.5 + 1e-3
    assert torch.allclose(soft.sum(1), torch.ones(4))
