"""What a run tells while it goes and afterwards: curves, logs, a preview, early exits that save compute."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastlocal.train import cli, loop
from fastlocal.train.config import TrainConfig
from fastlocal.train.errors import UserError
from fastlocal.train.evaluation import open_saved
from fastlocal.train.predict import predict

DIGITS: dict[str, Any] = {"data": "digits", "train_limit": 128, "val_limit": 32, "epochs": 2, "batch_size": 64}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return loop.run(TrainConfig.of(**DIGITS, output=str(folder), experiment="run")).folder


def test_curves_are_drawn(run: Path) -> None:
    with Image.open(run / "curves.png") as picture:
        assert picture.format == "PNG"
        assert len(np.unique(np.asarray(picture))) > 10


def test_curves_are_refreshed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(loop.Curves, "due", True)
    monkeypatch.setattr(loop.Curves, "draw", lambda self, rows, file: drawn.append(len(rows)))
    loop.run(TrainConfig.of(**DIGITS, output=str(tmp_path)))
    assert drawn == [1, 2]


def test_without_matplotlib_a_run_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    summary = loop.run(TrainConfig.of(**{**DIGITS, "epochs": 1}, output=str(tmp_path)))
    assert "pip install matplotlib" in capsys.readouterr().out
    assert not (summary.folder / "curves.png").exists()


LOGGER = """
import json, pathlib
calls = pathlib.Path(__file__).with_suffix(".jsonl")
def note(**what):
    with calls.open("a") as file:
        file.write(json.dumps(what) + "\\n")
def init(**options):
    note(init=options)
def log(values, step):
    note(log=values, step=step)
def finish():
    note(finish=True)
"""


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_epochs_go_to_other_logs(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{package}.py").write_text(LOGGER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setenv(f"{package.upper()}_PROJECT", "mine")
    loop.run(TrainConfig.of(**DIGITS, output=str(tmp_path), experiment="run", log=package))
    calls = [json.loads(line) for line in (tmp_path / f"{package}.jsonl").read_text().splitlines()]
    monkeypatch.delitem(sys.modules, package)
    assert [next(iter(call)) for call in calls] == ["init", "log", "log", "finish"]
    assert calls[0]["init"]["project"] == "mine"
    assert calls[0]["init"]["name"] == "run"
    assert calls[0]["init"]["config"]["epochs"] == 2
    assert [call["step"] for call in calls[1:3]] == [1, 2]
    assert {"lr", "steps", "loss/1", "validation_accuracy/4"} <= calls[1]["log"].keys()
    assert "step" not in calls[1]["log"]  # a name that both services keep for themselves


@pytest.mark.parametrize("package", ["tensorboard", "wandb", "trackio"])
def test_a_missing_log_is_told_before_there_is_a_folder(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=f"--log {package} needs a package that is not installed: pip install {package}"
    ):
        loop.run(TrainConfig.of(**DIGITS, output=str(tmp_path / "runs"), log=package))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags", [[], ["--mixup", "0.5"]])
def test_a_preview_shows_training_images_and_trains_nothing(flags: list[str], tmp_path: Path) -> None:
    file, runs = tmp_path / "preview.png", tmp_path / "runs"
    assert cli.train(["--data", "digits", "--output", str(runs), "--preview", str(file), *flags]) == 0
    with Image.open(file) as picture:
        assert picture.width > 900
    assert not runs.exists()
    with pytest.raises(UserError, match=r"--preview .* cannot be written"):
        cli.train(["--data", "digits", "--preview", str(tmp_path / "no" / "preview.png")])


def test_early_exits_save_compute(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    saved = open_saved(run)
    images = torch.randint(256, (9, 3, 8, 8), dtype=torch.uint8)
    whole = saved.infer(images)
    confidence = float(whole[:-1].softmax(-1).amax(-1).median())
    logits, exits = saved.infer_early(images, confidence)
    sure = whole.softmax(-1).amax(-1) >= confidence
    sure[-1] = True
    expected = sure.int().argmax(0)
    assert torch.equal(exits, expected)
    assert len(exits.unique()) > 1
    torch.testing.assert_close(logits, whole[expected, torch.arange(9)], rtol=1e-4, atol=1e-5)

    from fastlocal.engine import Engine

    seen: list[int] = []
    infer = Engine.infer
    monkeypatch.setattr(Engine, "infer", lambda self, k, x, classify: (seen.append(k), infer(self, k, x, classify))[1])
    monkeypatch.setattr("fastlocal.train.predict.CONFIDENCE", 0.01)
    answers = list(predict(run, [tmp_path], exit="auto"))
    assert seen == [0]  # everybody is sure at once: no other module has run
    assert {(answer.exit, answer.exits) for answer in answers} == {(1, 4)}


def test_the_average_depth_is_printed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "black.png")
    assert cli.predict([str(run), str(tmp_path), "--exit", "auto"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("average depth: exit ")
    assert last.endswith(" of 4")
