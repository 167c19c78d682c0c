"""A run that was broken off and resumed ends bit for bit where it would have ended without the break (CPU)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from soak.compare import assert_same, result

import fastlocal
from fastlocal.train import loop, signals
from fastlocal.train.config import TrainConfig
from fastlocal.train.errors import UserError

Options = Callable[..., dict[str, Any]]


def _interrupt(monkeypatch: pytest.MonkeyPatch, method: str, call: int, action: Callable[[], Any]) -> None:
    """Run ``action`` in the middle of the ``call``-th call of a LocalTrainer's ``method``."""
    real, calls = getattr(fastlocal.LocalTrainer, method), 0

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            action()
        return real(self, *arguments, **options)

    monkeypatch.setattr(fastlocal.LocalTrainer, method, counted)


def _press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


SWIN = {"patch_size": 1, "window_size": 4, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
SETUPS: dict[str, dict[str, Any]] = {
    # Between them: every objective's heads, both drop-path and mixup draws, EMA, scaler, parts, schedules, optimizers.
    "feature": {"model": "swin_tiny_patch4_window7_224", "model_kwargs": SWIN, "drop_path": 0.3, "mixup": 0.8},
    "image": {"objective": "image", "decoder": "conv", "cutmix": 1.0, "mixup": 0.8, "model_ema": True, "cutout": 2},
    "transport": {"objective": "transport", "modules": 2, "opt": "sgd", "sched": "poly", "micro_batch": 5},
    "end-to-end": {
        "objective": "end-to-end",
        "amp": True,
        "amp_dtype": "float16",
        "recompute": "block",
        "drop_path": 0.2,
    },
    "exact finish": {"exact_epochs": 1, "exact_every": 3, "lookahead": 1, "drop_path": 0.2},
    "cross-entropy": {"objective": "cross-entropy", "residency": "module", "normalize_target": True, "lookahead": 1},
}


@pytest.mark.parametrize("setup", SETUPS)
def test_ctrl_c_and_resume_equals_running_straight(setup: str, tiny: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = loop.run(TrainConfig.of(**tiny(**SETUPS[setup], experiment="straight")))
    with monkeypatch.context() as patch:
        _interrupt(patch, "step", 6, _press_ctrl_c)  # the second step of epoch 2, which is finished first
        broken = loop.run(TrainConfig.of(**tiny(**SETUPS[setup], experiment="broken")))
    assert broken.interrupted
    assert torch.load(broken.folder / "last.pt", weights_only=True)["progress"]["position"] == 2
    resumed = loop.resume(broken.folder)
    assert not resumed.interrupted
    assert resumed.accuracy == straight.accuracy
    assert_same(result(resumed.folder), result(straight.folder))


def test_a_run_that_was_killed_goes_on_from_its_last_save(tiny: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    class KilledError(BaseException):
        pass

    def kill() -> None:
        raise KilledError

    straight = loop.run(TrainConfig.of(**tiny(epochs=3, experiment="straight")))
    folder = straight.folder.parent / "killed"
    for method, call, place in (("step", 1, (0, 0)), ("step", 4, (0, 2)), ("step", 5, (1, 2)), ("predict", 2, (1, 4))):
        with monkeypatch.context() as patch:
            _interrupt(patch, method, call, kill)
            fresh = TrainConfig.of(**tiny(epochs=3, experiment="killed", recovery_interval=2))
            with pytest.raises(KilledError):
                loop.resume(folder) if folder.exists() else loop.run(fresh)
        progress = torch.load(folder / "last.pt", weights_only=True)["progress"]
        assert (progress["epoch"], progress["position"]) == place
        with (folder / "metrics.jsonl").open("a") as rows:
            rows.write('{"epoch": 99, "torn')  # a row whose epoch was not saved
    loop.resume(folder)
    assert_same(result(folder), result(straight.folder))


def test_ctrl_c_while_validating_validates_on_resume(tiny: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = loop.run(TrainConfig.of(**tiny(epochs=1, experiment="straight")))
    with monkeypatch.context() as patch:
        _interrupt(patch, "predict", 1, _press_ctrl_c)
        broken = loop.run(TrainConfig.of(**tiny(epochs=1, experiment="broken")))
    assert broken.interrupted
    assert not (broken.folder / "metrics.jsonl").exists()
    loop.resume(broken.folder)
    assert_same(result(broken.folder), result(straight.folder))


def test_only_what_the_result_does_not_hang_on_can_change(tiny: Options) -> None:
    folder = loop.run(TrainConfig.of(**tiny(epochs=1))).folder
    with pytest.raises(UserError, match="--lr cannot change on --resume"):
        loop.resume(folder, lr=1.0)
    assert loop.resume(folder, log_interval=7, epochs=1).epochs == 1  # finished already


def test_how_a_run_ends_may_change(tiny: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = loop.run(TrainConfig.of(**tiny(epochs=1))).folder
    step, kinds = fastlocal.LocalTrainer.step, []

    def noted(self: fastlocal.LocalTrainer, *batch: Any, exact: bool) -> Any:
        kinds.append(exact)
        return step(self, *batch, exact=exact)

    monkeypatch.setattr(fastlocal.LocalTrainer, "step", noted)
    loop.resume(folder, epochs=3, exact_epochs=1, exact_every=0)
    half = len(kinds) // 2
    assert half
    assert kinds == [False] * half + [True] * half


def test_other_training_images_are_refused(tiny: Options) -> None:
    folder = loop.run(TrainConfig.of(**tiny(epochs=1))).folder
    saved = torch.load(folder / "last.pt", weights_only=True)
    saved["data"]["training images"]["3"][0] = 63
    torch.save(saved, folder / "last.pt")
    with pytest.raises(UserError, match="other data: class '3' has 8 training images and had 63"):
        loop.resume(folder)


def test_a_second_ctrl_c_ends_at_once_but_an_echo_of_the_first_does_not(
    tiny: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        _press_ctrl_c()
        time.sleep(0.02)
        _press_ctrl_c()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist's workers ignore Ctrl-C
    try:
        with monkeypatch.context() as patch:
            _interrupt(patch, "step", 2, twice)
            assert loop.run(TrainConfig.of(**tiny(experiment="echo"))).interrupted
        with monkeypatch.context() as patch:
            patch.setattr(signals, "HURRY", 0.01)
            _interrupt(patch, "step", 2, twice)
            with pytest.raises(KeyboardInterrupt):
                loop.run(TrainConfig.of(**tiny()))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
