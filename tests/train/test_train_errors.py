"""The bad-input table: each mistake is told in one sentence, with exit code 2."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastlocal
from fastlocal.train import loop
from fastlocal.train.config import TrainConfig

Command = Callable[..., Any]
VIT = ("--model", "vit_tiny_patch16_224", "--model-kwargs", "patch_size=2", "embed_dim=16", "depth=4", "num_heads=2")
QUICK = ("--train-limit", 32, "--val-limit", 16, "--epochs", 1)


def _assert_told(outcome: Any, *parts: str) -> None:
    assert outcome.code == 2
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert "Traceback" not in outcome.out + outcome.err
    for part in parts:
        assert part in outcome.err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("trian",), ("no command 'trian'", "did you mean 'train'?")),
        (("train", "--objectiv", "feature"), ("no flag --objectiv", "did you mean '--objective'?")),
        (("train", "--batchsize=3"), ("no flag --batchsize", "did you mean '--batch-size'?")),
        (("train", "digits"), ("does not take the argument 'digits'",)),
        (("train", "--epochs"), ("--epochs", "expected one argument")),
        (("train", "--epochs", "many"), ("--epochs must be a whole number, got 'many'",)),
        (("train", "--data", "digit"), ("--data digit is not one of", "did you mean 'digits'?")),
        (("train", "--objective", "featur"), ("--objective featur is not one of", "did you mean 'feature'?")),
        (("train", "--config", "no.yaml"), ("--config no.yaml cannot be read",)),
        (("train", "--model", "swin_tinny_patch4_window7_224"), ("did you mean 'swin_tiny_patch4_window7_224'?",)),
        (("train", "--opt", "adamm", *VIT), ("--opt 'adamm' is not known to timm", "did you mean")),
        (("train", "--device", "gpu", *VIT), ("--device gpu cannot be used",)),
        (("train", "--model", "resnet50"), ("ResNet is not supported", "give a fastlocal.Backbone")),
        (
            ("train", "--model", "vit_tiny_patch16_224", "--model-kwargs", "dpth=3"),
            ("'dpth' is no argument", "did you mean 'depth'?"),
        ),
        (("train", *VIT, "mlp_ratio=-1"), ("cannot be built with", "mlp_ratio=-1")),
        (("train", *VIT, "patch_size=3"), ("does not fit images of 8 pixels", "patch size, 3")),
        (("train", "--modules", 5, *VIT), ("modules must be from 1 to 4", "got 5")),
        (("train", "--modules", "3,1", *VIT), ("modules: cut points must be increasing",)),
        (("train", "--modules", "stages", *VIT), ("modules='stages' needs a model with stages",)),
        (("train", "--torchcompile-mode", "default", *VIT), ("--torchcompile-mode default needs --torchcompile",)),
        (("train", "--resume", "no/such/run"), ("there is no checkpoint at no/such/run",)),
        (("eval", "no/such/run"), ("there is no checkpoint at no/such/run",)),
        (("eval",), ("RUN_OR_CHECKPOINT",)),
        (("doctor", "--verbose"), ("fastlocal doctor has no flag --verbose",)),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: tuple[Any, ...], parts: tuple[str, ...], cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _assert_told(cli(*arguments), *parts)
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_kernels_that_cannot_run_are_told(
    cli: Command, flags: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    _assert_told(cli("train", *flags(kernels="triton", device="cpu")), "--kernels triton was asked for, but triton")


def _write_folder(root: Path, classes: dict[str, tuple[str, ...]], size: int = 8) -> None:
    for split, names in classes.items():
        for name in names:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                pixels = np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")


def test_mistakes_in_an_image_folder(cli: Command, tmp_path: Path) -> None:
    def trained(name: str) -> Any:
        return cli("train", "--data", f"folder:{tmp_path / name}", *VIT, "--output", tmp_path / "runs")

    _assert_told(trained("missing"), "must hold train/CLASS/* and val/CLASS/*")
    for split in ("train", "val"):
        (tmp_path / "empty" / split).mkdir(parents=True)
    _assert_told(trained("empty"), "is not usable", "class folder")
    _write_folder(tmp_path / "corrupt", {"train": ("a", "b"), "val": ("a", "b")})
    (tmp_path / "corrupt" / "val" / "b" / "2.png").write_bytes(b"no image")
    _assert_told(trained("corrupt"), "val/b/2.png cannot be read")
    _write_folder(tmp_path / "labels", {"train": ("a", "b"), "val": ("a", "b", "c")})
    _assert_told(trained("labels"), "outside the model's 2 classes", "'c' is none of a, b")
    for model, parts in (
        ("swin_tiny_patch4_window7_224", ("pads a grid of 8 × 8 tokens to 14 × 14", "patch_size=2 window_size=4")),
        ("vit_tiny_patch16_224", ("makes 2 × 2 tokens of images of 32 pixels", "patch_size=4")),
    ):
        _write_folder(tmp_path / model, {"train": ("a", "b"), "val": ("a", "b")}, size=32)
        data = ("--data", f"folder:{tmp_path / model}", "--output", tmp_path / "runs")
        _assert_told(cli("train", "--model", model, *data), *parts, "img_size=224")
    assert not (tmp_path / "runs").exists()


def test_labels_outside_the_classes_and_nan_images_in_a_loop_of_ones_own(tiny: Callable[..., dict[str, Any]]) -> None:
    from fastlocal.train.build import build_model, build_trainer

    config = TrainConfig.of(**tiny())
    trainer = build_trainer(config, build_model(config, 10, (8, 8)), torch.device("cpu"), None)
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    for wrong in (
        (images, labels + 7),
        (images, labels - 1),
        (images.clone().index_fill_(0, torch.tensor(2), float("nan")), labels),
        (torch.rand(4, 3, 9, 9), labels),
        (images, labels[:3]),
    ):
        with pytest.raises(ValueError, match=r"^(images|labels)") as mistake:
            trainer.step(*wrong)
        assert "\n" not in str(mistake.value)
    assert trainer.step(images, labels).loss.isfinite().all()


@pytest.fixture
def run(tiny: Callable[..., dict[str, Any]]) -> Path:
    return loop.run(TrainConfig.of(**tiny(epochs=1))).folder


def test_bad_checkpoints(run: Path, cli: Command, tmp_path: Path, runs_code: Callable[[Path], object]) -> None:
    last = run / "last.pt"
    whole = last.read_bytes()
    for command in (("train", "--resume", run), ("eval", last)):
        last.write_bytes(whole[: len(whole) // 2])
        _assert_told(cli(*command), "last.pt is truncated or is not a checkpoint")

        torch.save({"format": 1, "trainer": runs_code(tmp_path / "ran")}, last)
        _assert_told(cli(*command), "last.pt holds Python objects other than tensors and plain values")
        assert not (tmp_path / "ran").exists()

        last.write_bytes(whole)
        saved = torch.load(last, weights_only=True)
        saved["config"]["model_kwargs"]["embed_dim"] = 32
        torch.save(saved, last)
        _assert_told(cli(*command), "last.pt is a checkpoint of another model or set-up")
    last.write_bytes(whole)
    _assert_told(cli("train", "--resume", run, "--model", "vit_small_patch16_224"), "--model cannot change on --resume")
    assert cli("eval", last).code == 0


def test_evaluation_on_other_classes(run: Path, cli: Command, tmp_path: Path) -> None:
    _write_folder(tmp_path / "animals", {"val": ("cat", "dog")})
    _assert_told(
        cli("eval", run, "--data", f"folder:{tmp_path / 'animals'}"), "outside the model's 10 classes", "'cat'"
    )


def test_an_existing_run_is_never_overwritten(run: Path, cli: Command, flags: Callable[..., list[str]]) -> None:
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    _assert_told(cli("train", *flags()), "exists already", f"--resume {run}")
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before


def test_output_that_cannot_be_written(cli: Command, flags: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    _assert_told(cli("train", *flags(output=str(tmp_path / "file" / "runs"))), "cannot be made", "--output")
    _assert_told(cli("train", *flags(output=str(tmp_path), experiment="file")), "a file of that name is in the way")
    _assert_told(cli("train", *flags(output="/proc/runs")), "cannot be made")


def test_a_disk_that_fills_up(
    cli: Command, flags: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    _assert_told(cli("train", *flags()), "cannot be written: No space left on device")
    assert not list((tmp_path / "runs").iterdir())


def test_a_loss_that_is_not_finite_ends_the_run(cli: Command, flags: Callable[..., list[str]], tmp_path: Path) -> None:
    _assert_told(
        cli("train", *flags(opt="sgd", lr=1e30)), "the loss of module", "is not finite in epoch 1, step 4. Lower --lr"
    )
    saved = torch.load(tmp_path / "runs" / "tiny" / "last.pt", weights_only=True)
    assert all(value.isfinite().all() for value in saved["trainer"]["model"].values())


def test_out_of_memory_says_what_to_try(
    cli: Command, flags: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. And so on.")

    monkeypatch.setattr(fastlocal.LocalTrainer, "step", out_of_memory)
    _assert_told(cli("train", *flags()), "CUDA out of memory: try a smaller --micro-batch")
