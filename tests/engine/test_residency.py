"""State that leaves the device comes back the same, and really leaves."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlocal
from fastlocal import memory
from fastlocal.objectives import OBJECTIVES

Build = Callable[..., nn.Module]
Batch = tuple[Tensor, Tensor]
FULL: dict[str, Any] = {
    "amp_dtype": torch.float16,
    "clip_grad": 0.5,
    "ema_decay": 0.9,
    "micro_batch": 3,
    "recompute": "block",
}


def run(
    build: Build, batch: Batch, family: str, steps: int, state: dict | None = None, **options: Any
) -> dict[str, Any]:
    torch.manual_seed(0)
    trainer = fastlocal.LocalTrainer(build(family), **FULL, **options)
    if state is not None:
        trainer.load_state_dict(copy.deepcopy(state))  # optimizers keep the tensors they are given
    torch.manual_seed(steps)
    for _ in range(steps):
        trainer.step(*batch)
    return trainer.state_dict()


def assert_equal(ours: Any, theirs: Any) -> None:
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_equal(ours[key], theirs[key])
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_equal(a, b)
    elif isinstance(ours, Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


@pytest.mark.parametrize("residency", ["optimizer", "module"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("family", ["swin", "vit"])
def test_residency_changes_no_bit(build: Build, batch: Batch, family: str, objective: str, residency: str) -> None:
    expected = run(build, batch, family, 5, objective=objective, residency="all")
    assert_equal(run(build, batch, family, 5, objective=objective, residency=residency), expected)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_other_optimizers_too(build: Build, batch: Batch, optimizer: type[torch.optim.Optimizer]) -> None:
    options: dict[str, Any] = {"optimizer": lambda groups: optimizer(groups, lr=0.01)}
    expected = run(build, batch, "vit", 3, residency="all", **options)
    assert_equal(run(build, batch, "vit", 3, residency="module", **options), expected)


@pytest.mark.parametrize(("first", "second"), [("all", "module"), ("module", "optimizer"), ("optimizer", "all")])
def test_resume_under_another_residency(build: Build, batch: Batch, first: str, second: str) -> None:
    start = run(build, batch, "vit", 2, residency=first)
    assert_equal(
        run(build, batch, "vit", 2, start, residency=second), run(build, batch, "vit", 2, start, residency=first)
    )


def test_small_buckets_change_no_bit(build: Build, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(build, batch, "vit", 3, residency="module")
    monkeypatch.setattr("fastlocal.hosted.SLICE", 64)
    assert_equal(run(build, batch, "vit", 3, residency="module"), expected)


def test_the_model_is_whole_between_steps(build: Build, batch: Batch) -> None:
    model = build("vit")
    trainer = fastlocal.LocalTrainer(model, residency="module")
    trainer.step(*batch)
    images = batch[0]
    trainer.model.eval()
    torch.testing.assert_close(model(images), trainer.predict(images)[-1])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("residency", ["all", "optimizer", "module"])
def test_nothing_leaks_over_fifty_steps(build: Build, residency: str) -> None:
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(4, 3, 32, 32, generator=generator), torch.arange(4)
    trainer = fastlocal.LocalTrainer(build("vit", depth=2), modules=2, micro_batch=3, residency=residency)
    trainer.step(images, labels)  # makes the optimizer states
    gc.collect()
    with memory.Meter(trainer.model, *trainer.optimizers, images, labels) as meter:
        live = set()
        for step in range(50):
            trainer.step(images, labels)
            if step in (1, 10, 49):
                gc.collect()
                live.add(meter.live)
    assert len(live) == 1
