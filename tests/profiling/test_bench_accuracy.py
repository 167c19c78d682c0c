"""``fastlocal bench accuracy`` trains each objective once, goes on with what was stopped, and reports side by side."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from fastlocal import LocalTrainer
from fastlocal.profiling import report, results
from fastlocal.profiling.cli import bench

TINY = [
    *("--model", "vit_tiny_patch16_224", "--model-kwargs", "patch_size=2", "embed_dim=16", "depth=3", "num_heads=2"),
    *("--modules", "3", "--epochs", "2", "--batch-size", "16", "--train-limit", "64", "--val-limit", "40"),
]


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    return ["accuracy", *TINY, "--results", "rows", "--objectives", "feature", "end-to-end"]


def test_each_objective_is_trained_once(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench(arguments) == 0
    first = capsys.readouterr().out
    assert "| module 1 % | module 2 % | module 3 % | images/s | peak MiB |" in first

    monkeypatch.setattr(LocalTrainer, "step", None)  # what is done is read, not trained again
    assert bench(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-4:] == first.splitlines()[-4:]
    rows = results.read_rows(results.card_folder(Path("rows")) / "accuracy.jsonl")
    assert [row["objective"] for row in rows] == ["feature", "end-to-end"]
    assert [len(row["accuracy"]) for row in rows] == [3, 1]

    assert report.main(["--output", "rows"]) == 0
    assert "### Accuracy" in Path("rows/README.md").read_text()


def test_a_stopped_campaign_goes_on(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    step = LocalTrainer.step
    steps = 0

    def counted(self: LocalTrainer, *batch: torch.Tensor) -> object:
        nonlocal steps
        steps += 1
        if steps == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *batch)

    monkeypatch.setattr(LocalTrainer, "step", counted)
    assert bench(arguments) == 130
    assert bench(arguments) == 0
    assert steps == 2 * 2 * 4  # two objectives, two epochs, four steps: none is done twice


def test_runs_with_other_options_are_not_mixed_in(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(arguments) == 0
    for wrong, sentence in (
        (["--lr", "0.1"], "is a run with other options"),
        (["--objective", "image"], "use --objectives"),
        (["--objectives", "featur"], "invalid choice: 'featur'"),
    ):
        assert bench([*arguments, *wrong]) == 2
        assert sentence in capsys.readouterr().err
