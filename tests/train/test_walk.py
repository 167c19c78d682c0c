"""The walk of a stranger: photographs of three sizes, weights of something else, and the answers, the same everywhere."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from soak.processes import Processes
from timm.data import create_transform, resolve_data_config

SIZES = ((96, 72), (60, 80), (120, 68))
MODEL = ("--model", "vit_tiny_patch16_224", "--model-kwargs", "patch_size=8", "embed_dim=16", "depth=4", "num_heads=2")
Command = Callable[..., Any]


def _photographs(root: Path, classes: dict[str, tuple[int, int, int]], count: int) -> None:
    generator = np.random.default_rng(0)
    for split, images in (("train", count), ("val", count // 4)):
        for name, color in classes.items():
            (root / split / name).mkdir(parents=True)
            for i in range(images):
                width, height = SIZES[i % 3]
                pixels = generator.normal(color, 40, (height, width, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.jpg", quality=90)


def _interrupted(run: Path, *arguments: object) -> str:
    """What ``fastlocal`` says until it has done an epoch and gets a real SIGINT."""
    with Processes() as processes:
        told = run.parent / "told.txt"
        process = processes.start(arguments, stdout=told, stderr=run.parent / "stderr.txt")
        since = time.monotonic()
        while not (run / "metrics.jsonl").exists():
            assert time.monotonic() - since < 240, told.read_text()
            time.sleep(0.01)
        os.kill(process, signal.SIGINT)
        assert processes.wait(process) == 130, told.read_text()
        return told.read_text()


def test_from_photographs_to_the_same_probabilities_everywhere(tmp_path: Path, cli: Command) -> None:
    def done(*arguments: object) -> str:
        outcome = cli(*arguments)
        assert outcome.code == 0, outcome.err
        return outcome.out

    # Weights of something else: three classes, 32 pixels.
    shades = {"dark": (40, 40, 40), "grey": (128, 128, 128), "light": (220, 220, 220)}
    _photographs(tmp_path / "shades", shades, 8)
    common = ("--output", tmp_path / "runs", "--workers", 0, "--device", "cpu", "--batch-size", 16)
    shade = ("--data", tmp_path / "shades", "--img-size", 32, "--epochs", 2, "--experiment", "shades")
    done("train", *MODEL, *shade, *common)

    # 200 photographs of two classes, in a memory budget, interrupted by Ctrl-C in some epoch.
    photographs = tmp_path / "photographs"
    _photographs(photographs, {"red": (180, 90, 90), "blue": (90, 90, 180)}, 80)
    start = ("--initial-checkpoint", tmp_path / "runs" / "shades", "--memory", "576MiB", "--lr", 3e-3)
    moved, run = tmp_path / "moved", tmp_path / "runs" / "mine"
    mine = ("--data", photographs, "--img-size", 48, "--epochs", 6, "--experiment", "mine")
    first = _interrupted(run, "train", *mine, *MODEL, *start, *common)
    assert "160 + 40 images, 48 pixels" in first
    assert "start    model.safetensors, with a new classifier (it knows 3 classes)" in first
    assert "stopped; go on with: fastlocal train --resume" in first

    # Moved, and resumed with more epochs.
    photographs.rename(moved)
    assert len((run / "metrics.jsonl").read_text().splitlines()) < 6
    resumed = done("train", "--resume", run, "--epochs", 7, "--data", moved)
    assert "schedule cosine, now to the end of epoch 7, before 6" in resumed
    assert "epoch 7/7" in resumed

    # Evaluated.
    result = json.loads(done("eval", run, "--data", moved, "--report", tmp_path / "report", "--json"))
    assert result["accuracy"][-1] > 0.9
    assert sum(row["images"] for row in result["per_class"]) == result["images"] == 40
    assert {file.name for file in (tmp_path / "report").iterdir()} == {
        *("per_class.csv", "confusion.csv", "confusion.png", "mistakes.png")
    }

    # Predicted, on the same files as all that follows.
    table = tmp_path / "answers.csv"
    done("predict", run, moved / "val", "--top-k", 2, "--csv", table)
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    assert len(rows) == 40
    labels = ["blue", "red"]
    expected = torch.tensor(
        [
            [float(row["probability_1" if row["label_1"] == name else "probability_2"]) for name in labels]
            for row in rows
        ]
    )
    truth = torch.tensor([labels.index(Path(row["path"]).parent.name) for row in rows])
    assert (expected.argmax(1) == truth).float().mean().item() == pytest.approx(result["accuracy"][-1])
    assert "average depth: exit " in done("predict", run, moved / "val", "--exit", "auto")

    # Loaded by timm, with timm's preprocessing.
    model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    assert list(model.pretrained_cfg["label_names"]) == labels
    pictures = [Image.open(row["path"]).convert("RGB") for row in rows]
    transform = create_transform(**resolve_data_config(model=model))
    with torch.no_grad():
        found = model(torch.stack([transform(picture) for picture in pictures])).softmax(1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    plain = tmp_path / "plain"  # what timm needs of the run, and no more
    plain.mkdir()
    for name in ("config.json", "model.safetensors"):
        (plain / name).write_bytes((run / name).read_bytes())
    as_plain = json.loads(done("eval", plain, "--data", moved, "--device", "cpu", "--json"))
    assert as_plain["accuracy"] == result["accuracy"][-1:]

    # Exported.
    onnxruntime = pytest.importorskip("onnxruntime")
    done("export", run, "--onnx", tmp_path / "model.onnx", "--torch-export", tmp_path / "model.pt2")
    pixels = create_transform(**resolve_data_config(model=model), normalize=False)
    images = torch.stack([torch.as_tensor(pixels(picture)) for picture in pictures]).float()
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    (answers,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(answers), expected, rtol=0, atol=1e-4)
    program = torch.export.load(str(tmp_path / "model.pt2")).module()
    torch.testing.assert_close(program(images), expected, rtol=0, atol=1e-4)
