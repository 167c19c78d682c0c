"""Folders of photographs: what counts as a picture, what is decided once for all of them, classes by name, preprocessing."""

from __future__ import annotations

import io
import os
import random
import shutil
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from fastlocal.train import loop
from fastlocal.train.build import build_trainer, pretrained_configuration
from fastlocal.train.config import TrainConfig
from fastlocal.train.data import Data, FileSplit, MemorySplit, Preprocessing, differences, read, read_validation
from fastlocal.train.errors import UserError

SOURCE = {"input_size": (3, 32, 32)}
Options = Callable[..., dict[str, Any]]


def _picture(path: Path, size: tuple[int, int] = (80, 60), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def _folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 4, **options: Any) -> Path:
    for split in ("train", "val"):
        for position, name in enumerate(classes):
            for i in range(count):
                _picture(root / split / name / f"{i}.png", seed=10 * position + i + 100 * (split == "val"), **options)
    return root


def _read(root: Path, **options: Any) -> Data:
    return read(TrainConfig.of(data=str(root), workers=0, **options), SOURCE)


# What counts as a picture


def test_what_systems_leave_is_skipped_and_what_is_no_picture_is_counted(tmp_path: Path) -> None:
    root = _folder(tmp_path)
    train = root / "train"
    for name in (".DS_Store", "Thumbs.db", "cat/.hidden.png", "cat/desktop.ini", "cat/~x~", ".ipynb_checkpoints/0.png"):
        (train / name).parent.mkdir(exist_ok=True)
        (train / name).write_bytes(b"system")
    for folder in ("__MACOSX", "cat/@eaDir", "cat/.git"):
        _picture(train / folder / "0.png")
    for i in range(12):
        (train / "cat" / f"{i}.xyz").touch()
    for i in range(4):
        (train / "dog" / f"{i}.heic").touch()
    (train / "README").touch()
    _picture(train / "stray.png")
    shutil.copy(train / "cat" / "0.png", train / "cat" / "0.mpo")  # read by what reads JPEGs
    data = _read(root)
    assert data.classes == ("cat", "dog")
    assert (len(data.training), len(data.validation)) == (9, 8)
    assert data.notes == ("left out: 12 .xyz, 4 .heic, 1 (no ending), 1 beside the class folders",)


def test_all_broken_files_are_named_before_training_or_skipped(tmp_path: Path) -> None:
    root = _folder(tmp_path)
    for name in ("cat/1.png", "cat/2.png", "dog/0.png"):
        (root / "train" / name).write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"3 files cannot be read: cat/1.png, cat/2.png, dog/0.png.*add --skip-broken"):
        _read(root)
    (root / "val" / "dog" / "3.png").write_bytes((root / "val" / "dog" / "3.png").read_bytes()[:900])  # half a picture
    data = _read(root, skip_broken=True)
    assert (len(data.training), len(data.validation)) == (5, 7)
    assert data.notes == ("left out: 4 that cannot be read (--skip-broken)",)
    for split in (data.training, data.validation):
        assert len(list(split.batches([torch.arange(len(split))], None))) == 1


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    root = _folder(tmp_path)
    os.mkfifo(root / "train" / "cat" / "pipe.png")
    (root / "train" / "dog" / "gone.png").symlink_to("/nowhere.png")
    with pytest.raises(UserError, match=r"pipe.png cannot be read: it is no regular file. 2 files .*gone"):
        _read(root)
    (root / "train" / "cat" / "above").symlink_to(root / "train")  # whose dogs are no cats
    assert len(_read(root, skip_broken=True).training) == 8
    assert _read(root, skip_broken=True).notes == ("left out: 2 that cannot be read (--skip-broken)",)


def test_transparency_and_frames_are_told(tmp_path: Path) -> None:
    root = _folder(tmp_path)
    Image.new("RGBA", (80, 60), (1, 2, 3, 0)).save(root / "train" / "cat" / "0.png")
    red = Image.new("RGB", (80, 60), "red")
    red.save(root / "train" / "cat" / "7.gif", save_all=True, append_images=[Image.new("RGB", (40, 30), "blue")])
    assert _read(root).notes == (
        "1 images with transparency, laid on white",
        "1 files with several frames, of which the first is used",
    )


def test_an_empty_class_is_refused(tmp_path: Path) -> None:
    root = _folder(tmp_path)
    (root / "train" / "cow").mkdir()
    with pytest.raises(UserError, match=r"there is no image in .*train for class cow"):
        _read(root)


def test_one_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has one class, 'cat': there is nothing to tell apart"):
        _read(_folder(tmp_path, ("cat",)))


# Decided once, from all headers


@pytest.mark.parametrize("odd", ["train/cat/0.png", "val/dog/3.png"])
def test_one_image_decides_nothing(tmp_path: Path, odd: str) -> None:
    root = _folder(tmp_path / "same", size=(20, 20))
    data = _read(root)
    assert isinstance(data.training, MemorySplit)
    assert data.preprocessing.image_size == (20, 20)
    _picture(root / odd, (10, 30))  # one thumbnail of another size
    data = _read(root)
    assert isinstance(data.training, FileSplit)
    assert isinstance(data.validation, FileSplit)
    assert data.preprocessing.image_size == (32, 32)
    assert not data.preprocessing.in_memory


def test_small_images_get_what_is_asked_for_them(tmp_path: Path, tiny: Options) -> None:
    """They are held in memory unless they are to be augmented one by one; their size is theirs either way."""
    root = str(_folder(tmp_path, size=(16, 24)))
    for asked, in_memory in (({}, True), ({"aa": "rand-m9"}, False), ({"scale": [0.5, 1]}, False)):
        config = TrainConfig.of(**tiny(data=root, img_size=None, workers=0, crop_padding=0, **asked))
        data = read(config, pretrained_configuration(config.model.name))
        assert (data.preprocessing.in_memory, data.preprocessing.image_size) == (in_memory, (24, 16))
    both = TrainConfig.of(**tiny(data=root, workers=0, crop_padding=2, aa="rand-m9"))
    with pytest.raises(UserError, match=r"--crop-padding would do nothing: .*; --aa has them read one by one"):
        read(both, pretrained_configuration(both.model.name))


def test_aspect_ratio_is_kept(tmp_path: Path) -> None:
    root = _folder(tmp_path, size=(20, 40))
    for name in ("train", "val"):
        image = Image.new("RGB", (20, 40))
        image.paste((255, 255, 255), (5, 15, 15, 25))  # a square, 10 by 10, in the middle
        image.save(root / name / "cat" / "0.png")
    for options in ({}, {"img_size": [40, 20]}, {"img_size": [80, 40]}, {"img_size": 32}):
        data = _read(root, **options)
        images, _ = next(data.validation.batches([torch.tensor([0])], None))
        rows, columns = (images[0, 0] > 128).any(1).sum(), (images[0, 0] > 128).any(0).sum()
        assert rows == columns, options


# Classes by name


def test_classes_stand_in_timms_order(tmp_path: Path) -> None:
    from timm.data.readers.reader_image_folder import ReaderImageFolder

    root = _folder(tmp_path, ("b10", "b9", "A", "Zebra", "ant"), count=1)
    indices = ReaderImageFolder(str(root / "train")).class_to_idx
    data = _read(root)
    assert list(data.classes) == sorted(indices, key=indices.__getitem__)


def test_validation_may_show_some_of_the_classes(tmp_path: Path) -> None:
    root = _folder(tmp_path, ("a", "b", "c"))
    shutil.rmtree(root / "val" / "a")
    data = _read(root)
    assert "the validation images show 2 of the 3 classes" in data.notes
    _, labels = next(data.validation.batches([torch.arange(8)], None))
    assert labels.tolist() == [1] * 4 + [2] * 4
    saved = {"preprocessing": data.preprocessing.to_dict(), "classes": ["c", "b", "a"]}
    split, _ = read_validation(TrainConfig.of(data=str(root), workers=0), saved)
    assert next(split.batches([torch.arange(8)], None))[1].tolist() == [1] * 4 + [0] * 4


def test_the_fingerprint_tells_what_changed(tmp_path: Path) -> None:
    root = _folder(tmp_path / "here", ("cat", "dog", "owl"))
    before = _read(root).fingerprint()
    (tmp_path / "away").mkdir()
    moved = shutil.move(root, tmp_path / "away" / "there")
    assert differences(before, _read(moved).fingerprint()) == []
    (moved / "train" / "cat" / "0.png").rename(moved / "train" / "cat" / "9.png")
    (moved / "val" / "dog" / "0.png").unlink()
    for split in ("train", "val"):
        (moved / split / "owl").rename(moved / split / "eagle")
    assert differences(before, _read(moved, mean=0.4).fingerprint()) == [
        "class 'owl' is gone",
        "class 'eagle' is new",
        "the training images of class 'cat' are others or were renamed",
        "class 'dog' has 3 validation images and had 4",
        "mean is [0.4, 0.4, 0.4] and was [0.485, 0.456, 0.406]",
    ]


def test_a_class_renamed_between_stop_and_resume_is_refused(tmp_path: Path, tiny: Options) -> None:
    root = _folder(tmp_path / "data", size=(8, 8))
    run = loop.run(TrainConfig.of(**tiny(data=str(root), epochs=1, batch_size=4))).folder
    for split in ("train", "val"):
        (root / split / "cat").rename(root / split / "zebra")
    with pytest.raises(UserError, match="trained on other data: class 'cat' is gone; class 'zebra' is new"):
        loop.resume(run)


# Where validation images come from


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test", "Val"])
def test_names_of_the_validation_folder(tmp_path: Path, name: str) -> None:
    root = _folder(tmp_path)
    (root / "val").rename(root / name)
    assert len(_read(root).validation) == 8


@pytest.mark.parametrize("inside", ["", "train"])
def test_a_share_of_each_class_is_set_apart(tmp_path: Path, inside: str) -> None:
    for name, count in (("cat", 20), ("dog", 3)):
        for i in range(count):
            _picture(tmp_path / inside / name / f"{i}.png")
    data, again = _read(tmp_path, val_split=0.1), _read(tmp_path, val_split=0.1, seed=7)
    assert data.fingerprint() == again.fingerprint()
    assert data.fingerprint()["validation images"]["cat"][0] == 2
    assert data.fingerprint()["validation images"]["dog"][0] == 1
    assert isinstance(data.training, FileSplit)
    assert isinstance(data.validation, FileSplit)
    assert not set(data.training.kept) & set(data.validation.kept)


def test_an_archive_is_read_by_timm(tmp_path: Path) -> None:
    root = _folder(tmp_path / "data", ("b10", "b9"))
    with tarfile.open(tmp_path / "data.tar", "w") as archive:
        archive.add(root / "train", ".")
    data = _read(tmp_path / "data.tar", val_split=0.25)
    assert data.classes == ("b9", "b10")
    assert (len(data.training), len(data.validation)) == (6, 2)
    images, labels = next(data.training.batches([torch.arange(6)], None))
    assert images.shape == (6, 3, 32, 32)
    assert labels.tolist() == [0] * 3 + [1] * 3
    with pytest.raises(UserError, match="one archive: add --val-split"):
        _read(tmp_path / "data.tar")


def test_a_data_set_of_hugging_faces_is_read_by_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    root = _folder(tmp_path / "data")
    data = read(TrainConfig.of(data=f"hfds/{root}", workers=0), SOURCE)
    assert data.classes == ("cat", "dog")
    images, labels = next(data.validation.batches([torch.arange(8)], None))
    assert images.shape == (8, 3, 32, 32)
    assert labels.tolist() == [0] * 4 + [1] * 4


def _shards(root: Path, pictures: Path) -> Path:
    """``train-0.tar`` and ``train-1.tar`` of the pictures in ``pictures/train/CLASS``, with the place of their class."""
    root.mkdir()
    for number, label in enumerate(sorted((pictures / "train").iterdir())):
        with tarfile.open(root / f"train-{number}.tar", "w") as archive:
            for path in sorted(label.iterdir()):
                archive.add(path, f"{label.name}-{path.name}")
                info = tarfile.TarInfo(f"{label.name}-{path.stem}.cls")
                info.size = 1
                archive.addfile(info, io.BytesIO(str(number).encode()))
    return root


def test_shards_are_read_like_any_pictures(tmp_path: Path) -> None:
    shards = _shards(tmp_path / "shards", _folder(tmp_path / "data"))
    (tmp_path / "names").write_text("cat\ndog\n")
    options = {"data": f"wds/{shards}", "val_split": 0.25, "workers": 0}
    data = read(TrainConfig.of(**options, class_map=str(tmp_path / "names")), SOURCE)
    assert data.classes == ("cat", "dog")
    assert data.notes == (f"classes named by {tmp_path / 'names'}",)
    assert (len(data.training), len(data.validation)) == (6, 2)
    assert next(data.training.batches([torch.arange(6)], None))[1].tolist() == [0] * 3 + [1] * 3
    assert read(TrainConfig.of(**options), SOURCE).classes == ("0", "1")
    with pytest.raises(UserError, match=r"holds no shards val\*.tar or"):
        read(TrainConfig.of(**{**options, "val_split": 0.0}), SOURCE)
    with tarfile.open(shards / "train-1.tar", "a") as archive:
        archive.add(tmp_path / "data" / "val" / "cat" / "0.png", "alone.png")
    with pytest.raises(UserError, match="picture or label is missing in alone in train-1"):
        read(TrainConfig.of(**options), SOURCE)


@pytest.mark.parametrize("kind", ["tar", "tar in tar", "hfds", "wds"])
def test_threads_and_processes_read_what_one_thread_reads(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    for name in ("cat", "dog"):
        for i in range(20):
            _picture(root / "train" / name / f"{i}.png", size=(70 + i, 80), seed=20 * (name == "dog") + i)
    expected = {path.read_bytes() for path in root.rglob("*.png")}
    assert len(expected) == 40
    if kind == "hfds":
        pytest.importorskip("datasets")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        data = f"hfds/{root}"
    elif kind == "wds":
        data = f"wds/{_shards(tmp_path / 'shards', root)}"
    else:
        inside = tmp_path / "inside.tar"
        with tarfile.open(inside, "w") as archive:
            archive.add(root / "train", ".")
        data = str(tmp_path / "data.tar")
        with tarfile.open(data, "w") as archive:
            archive.add(*((inside, "inside.tar") if "in" in kind else (root / "train", ".")))
    config = TrainConfig.of(data=data, val_split=0.25, workers=0)
    split = read(config, SOURCE).training  # every header, by threads
    assert isinstance(split, FileSplit)
    alone = [split.pictures[i] for i in range(40)]
    assert set(alone) == expected
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(split.pictures.__getitem__, list(range(40)) * 5)) == alone * 5
    finally:
        sys.setswitchinterval(interval)
    order = list(torch.arange(len(split)).split(2))
    pairs = zip(
        split.batches(order, 1), replace(split, config=config.changed(workers=2)).batches(order, 1), strict=True
    )
    for (images, labels), (by_workers, their_labels) in pairs:
        assert torch.equal(images, by_workers)
        assert torch.equal(labels, their_labels)


# Preprocessing is timm's

MODELS = (
    *("vit_tiny_patch16_224.augreg_in21k_ft_in1k", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"),
    *("swinv2_tiny_window8_256", "beit_base_patch16_224", "eva02_tiny_patch14_336", "vit_small_patch14_dinov2"),
    "vit_base_patch16_clip_224.openai",
)


@pytest.mark.parametrize("model", MODELS)
def test_validation_tensors_are_timms(model: str, tiny: Options) -> None:
    known = pretrained_configuration(model)
    config = TrainConfig.of(data="synthetic", model=model, pretrained=True)
    ours = Preprocessing.resolve(config, known, known["input_size"][-2:], None)
    expected = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(model).to_dict())
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 411, 3), dtype=np.uint8))
    pixels = ours.transform()(image)
    assert pixels.dtype == torch.uint8
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in ours.normalize)
    normalized = pixels.float().sub_(mean).div_(std)  # as the engine does, on the device
    torch.testing.assert_close(normalized, create_transform(**expected)(image), rtol=1e-5, atol=1e-5)
    assert Preprocessing.of(ours.to_dict()) == ours


def test_augmentation_draws_depend_on_the_image_alone(tmp_path: Path) -> None:
    root = _folder(tmp_path, size=(90, 70))
    options = {"aa": "rand-m9-mstd0.5-inc1", "color_jitter": 0.3, "reprob": 0.5, "vflip": 0.5, "scale": "0.5,1"}

    def batches(workers: int, order: list[int], epoch: int) -> torch.Tensor:
        config = TrainConfig.of(data=str(root), **options, workers=workers)  # type: ignore[arg-type]
        return torch.cat([x for x, _ in read(config, SOURCE).training.batches(torch.tensor(order).split(2), epoch)])

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    forwards = batches(0, [0, 1, 2, 3], 1)
    assert before[0] == random.getstate()
    assert before[1] == np.random.get_state()[1].tolist()
    assert torch.equal(before[2], torch.get_rng_state())
    assert torch.equal(forwards, batches(1, [3, 2, 1, 0], 1).flip(0))
    assert not torch.equal(forwards, batches(0, [0, 1, 2, 3], 2))


def test_grey_and_transparent_channels_reach_the_model(tmp_path: Path, tiny: Options) -> None:
    from fastlocal.train.build import build_model

    root = _folder(tmp_path, size=(16, 24))
    for channels in (1, 4):
        config = TrainConfig.of(**tiny(data=str(root), in_chans=channels, img_size=[24, 16], workers=0))
        data = read(config, pretrained_configuration(config.model.name))
        model = build_model(config, 2, data.preprocessing.image_size)
        trainer = build_trainer(config, model, torch.device("cpu"), data.preprocessing.normalize)
        images, labels = next(data.training.batches([torch.arange(4)], 0))
        assert images.shape == (4, channels, 24, 16)
        assert trainer.step(images, labels).loss.isfinite().all()


# Flags and labels that would do nothing


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--memory", "4"), "--memory 4 is 4 bytes; did you mean 4GiB?"),
        (("--data-dir", "HERE"), "would do nothing: --data digits does not lie there; did you mean --data HERE?"),
        (("--data", __file__), "is a file; of files, only archives that end in .tar are read."),
        (("--data", "HERE/none"), "is no folder or file, and not one of digits"),
        (("--val-split", "0.1"), "--val-split 0.1 would do nothing: --data digits has images to validate on."),
        (("--model-ema-decay", "0.9"), "it needs --model-ema"),
        (("--memory", "4GiB", "--modules", "2"), "--modules 2 would do nothing: --memory has the planner set it."),
        (("--model", "vit_tiny_patch16_224.augreg"), "has no weights 'augreg' for vit_tiny_patch16_224"),
        (("--aa", "rand-m9"), "--aa would do nothing: images of one small size are held in memory"),
        (("--quiet",), "has no flag --quiet."),
        (
            ("--objective", "cross-entropy", "--decoder", "conv"),
            "--decoder 'conv' would do nothing: --objective cross-",
        ),
        (
            ("--objective", "end-to-end", "--lookahead", "1"),
            "--lookahead 1 would do nothing: --objective end-to-end has",
        ),
        (
            ("--objective", "image", "--first-target", "patch"),
            "--first-target 'patch' would do nothing: --objective image",
        ),
        (("--objective", "cross-entropy", "--regularizer-weight", "2"), "--regularizer-weight 2.0 would do nothing"),
        (("--modules", "1", "--objective", "feature"), "would do nothing: a single module has exact gradients."),
        (
            ("--modules", "1", "--normalize-target"),
            "--normalize-target would do nothing: a single module learns from the",
        ),
        (("--no-prefetch",), "--prefetch would do nothing: it needs --residency module."),
        (("--reserve", "1GiB"), "--reserve '1GiB' would do nothing: it needs --memory."),
        (("--sched", "none", "--warmup-epochs", "1"), "would do nothing: --sched none has no warm-up."),
        (("--warmup-epochs", "0", "--warmup-lr", "0.1"), "--warmup-lr 0.1 would do nothing: there is no warm-up."),
        (("--opt", "sgd", "--opt-betas", "0.9", "0.99"), "--opt-betas would do nothing: --opt sgd has none."),
        (("--opt", "lion", "--opt-eps", "1e-6"), "--opt-eps would do nothing: --opt lion has none."),
        (("--momentum", "0.5"), "--momentum would do nothing: --opt adamw has none."),
        (("--opt-betas", "0.9"), "--opt-betas takes 2 numbers for --opt adamw; got 1."),
        (("--interpolation", "nearest"), "--interpolation would do nothing: the images are taken as they are."),
        (("--crop-padding", "8"), "--crop-padding 8 would leave nothing of images of 8 pixels; it takes less."),
        (("--cutout", "100"), "--cutout 100 would leave nothing of images of 8 pixels; it takes less."),
        (("--exact-every", "1000000"), "--exact-every 1000000 would do nothing: the run has"),
        (("--class-weights", *"0000000000"), "--class-weights are all 0, so there is nothing to learn"),
        (("--mixup", "0.5", "--mixup-prob", "0"), "--mixup-prob 0 leaves --mixup and --cutmix nothing to do"),
        (("--device", "meta"), "--device meta cannot be used: "),
        (("--train-limit", "1"), "all 1 training images are of class"),
        (("--mean", "123.7", "116.3", "103.5"), "--mean must be at most 1, got"),
        (
            ("--drop-path", "0.5", "--model-kwargs", "drop_path_rate=0.1"),
            "--drop-path and --model-kwargs drop_path_rate=…",
        ),
        (("--img-size", "32,x"), "--img-size must be one number of pixels, or height and width"),
        (("--model-kwargs", "img_size=12,8,4"), "--img-size must be one number of pixels, or height and width"),
    ],
)
def test_flags_that_would_do_nothing_or_mean_something_else(
    arguments: tuple[str, ...], sentence: str, cli: Callable[..., Any], tmp_path: Path
) -> None:
    given = [argument.replace("HERE", str(tmp_path)) for argument in arguments]
    outcome = cli("train", *given, "--output", tmp_path / "runs")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert sentence.replace("HERE", str(tmp_path)) in outcome.err
    assert not (tmp_path / "runs").exists()


def test_bytes_read_in_memory_are_pictures_too() -> None:
    from fastlocal.train.data.picture import read_picture

    file = io.BytesIO()
    Image.new("L", (3, 2), 9).save(file, "PNG")
    assert read_picture(file.getvalue()).getpixel((0, 0)) == (9, 9, 9)
