"""What ends, disturbs or fills up around a training process loses nothing. ``make soak`` does the same for hours."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from soak.compare import assert_same, result
from soak.kills import TINY
from soak.processes import Processes

import fastlocal
from fastlocal.train import checkpoint, loop
from fastlocal.train.config import TrainConfig, UserError

Options = Callable[..., dict[str, Any]]
Command = Callable[..., Any]


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with Processes() as started:
        yield started


def _flags(output: Path, name: str = "run") -> list[object]:
    return [*TINY, "--output", output, "--experiment", name]


def _wait_for(path: Path) -> None:
    for _ in range(1200):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


# One commit point

DIE_AT = """
import os, signal
left, replace = {0}, os.replace
def dying(*names):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)
os.replace = dying
"""


def test_a_process_that_dies_between_any_two_files_loses_nothing(processes: Processes, tmp_path: Path) -> None:
    assert processes.run(["train", *_flags(tmp_path, "straight")]) == 0
    expected, places, code = result(tmp_path / "straight"), 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        run = tmp_path / f"run{places}"
        code = processes.run(["train", *_flags(tmp_path, run.name)], code=DIE_AT.format(places))
        # Seen means resumable; not seen means that the same command may be given again.
        again = ["train", "--resume", run] if run.exists() else ["train", *_flags(tmp_path, run.name)]
        assert processes.run(again) == 0
        assert_same(result(run), expected)
        places += 1
    assert code == 0
    assert places > 8  # config, last, and per epoch row, previous, last, best and model, as far as each is due
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".starting"]


# A bad state is never saved or trusted


def test_a_run_that_diverges_keeps_two_states_that_are_good(cli: Command, flags: Any, tmp_path: Path) -> None:
    told = cli("train", *flags(lr=1e9, opt="sgd", warmup_epochs=0, recovery_interval=1))
    assert told.code == 2
    assert "training has diverged" in told.err
    for name in ("last.pt", "previous.pt")[: 1 + (tmp_path / "runs" / "tiny" / "previous.pt").exists()]:
        assert checkpoint.unusable(checkpoint.load(tmp_path / "runs" / "tiny" / name)["trainer"]) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e29])
def test_weights_that_no_training_goes_on_from_are_refused_at_the_start(
    value: float, tiny: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*arguments: Any, **options: Any) -> torch.nn.Module:
        model = real(*arguments, **options)
        model.state_dict()["head.weight"][0, 0] = value
        return model

    real = loop.build_model
    monkeypatch.setattr(loop, "build_model", build)
    with pytest.raises(UserError, match=r"would start from are of no use: model\.head\.weight"):
        loop.run(TrainConfig.of(**tiny()))


def test_a_module_that_takes_no_step_ends_the_run(tiny: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: Any, *arguments: Any, **options: Any) -> Any:
        metrics = real(self, *arguments, **options)
        metrics.skipped[1] = True
        return metrics

    real = fastlocal.LocalTrainer.step
    monkeypatch.setattr(fastlocal.LocalTrainer, "step", step)
    with pytest.raises(UserError, match="module 2 skipped 4 of 4 steps: its gradients are not finite"):
        loop.run(TrainConfig.of(**tiny()))


def test_some_skipped_steps_are_mentioned(
    tiny: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def step(self: Any, *arguments: Any, **options: Any) -> Any:
        metrics = real(self, *arguments, **options)
        metrics.skipped[2] = self.steps == 2
        return metrics

    real = fastlocal.LocalTrainer.step
    monkeypatch.setattr(fastlocal.LocalTrainer, "step", step)
    loop.run(TrainConfig.of(**tiny()))
    assert capsys.readouterr().out.count("module 3 skipped 1 of 4 steps") == 1


# Speech never stops training

GONE = "import os; r, w = os.pipe(); os.close(r); os.dup2(w, 1)"


@pytest.mark.parametrize(
    "how",
    [
        {"stdout": "/dev/full"},
        {"stdout": None},
        {"code": GONE},
        {"stdout": None, "stderr": None},
        {"encoding": "ascii"},
    ],
    ids=["full", "closed", "reader left", "both closed", "ascii"],
)
def test_nobody_has_to_listen(how: dict[str, Any], processes: Processes, tmp_path: Path) -> None:
    assert processes.run(["train", *_flags(tmp_path, "läuft")], **how) == 0
    assert (tmp_path / "läuft" / "model.safetensors").exists()


# Whatever ends the loop saves first


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
            for i in range(8):
                pixels = np.random.default_rng(i).integers(0, 256, (80, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pictures" / split / name / f"{i}.png")
    return tmp_path / "pictures"


def _with_workers(pictures: Path) -> list[object]:
    flags = [*_flags(pictures.parent), "--data", f"folder:{pictures}", "--img-size", 8]
    return [*flags, "--workers", 2, "--batch-size", 4, "--epochs", 1000, "--recovery-interval", 1]


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_to_the_whole_group_saves(number: str, processes: Processes, pictures: Path) -> None:
    run, told = pictures.parent / "run", pictures.parent / "stderr"
    process = processes.start(["train", *_with_workers(pictures)], stderr=told)
    _wait_for(run / "previous.pt")
    os.killpg(process, getattr(signal, number))
    time.sleep(0.02)
    os.killpg(process, getattr(signal, number))
    assert processes.wait(process) == (130 if number == "SIGINT" else 143)
    assert told.read_text() == ""
    assert checkpoint.load(run / "last.pt")["trainer"]["steps"] > 0
