"""State that leaves the device comes back the same, and really leaves."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
from collections.abc import Callable
from typing import Any

import pytest
import timm
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
    trainer = fastlocal.LocalTrainer(build(family), **{**FULL, **options})
    if state is not None:
        trainer.load_state_dict(copy.deepcopy(state))  # optimizers keep the tensors they are given
    torch.manual_seed(steps)
    for _ in range(steps):
        trainer.step(*batch)
    return trainer.state_dict()


def assert_equal(ours: Any, theirs: Any, name: str = "") -> None:
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), name
        for key in ours:
            assert_equal(ours[key], theirs[key], f"{name}.{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), name
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(a, b, f"{name}.{i}")
    elif isinstance(ours, Tensor):
        assert torch.equal(ours.cpu(), theirs.cpu()), name
    else:
        assert ours == theirs, name


HOMES: dict[str, dict[str, Any]] = {
    "boundaries on the host": {"boundaries": "host"},
    "states on the host": {"residency": "optimizer"},
    "all on the host": {"residency": "module", "boundaries": "host"},
    "low weights, no prefetch": {
        "residency": "module",
        "weights": "low",
        "boundaries": "host",
        "prefetch": False,
    },
}


@pytest.mark.parametrize("homes", HOMES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("family", ["swin", "vit"])
def test_where_things_live_changes_no_bit(build: Build, batch: Batch, family: str, objective: str, homes: str) -> None:
    expected = run(build, batch, family, 3, objective=objective)
    assert_equal(run(build, batch, family, 3, objective=objective, **HOMES[homes]), expected)


@pytest.mark.parametrize("homes", [{}, *HOMES.values()], ids=["all on the device", *HOMES])
@pytest.mark.parametrize("objective", ["feature", "end-to-end"])
def test_the_default_device_is_the_users(build: Build, batch: Batch, objective: str, homes: dict[str, Any]) -> None:
    """What a trainer makes lies where it must, whatever `torch.set_default_device` says."""
    states = []
    for default in (contextlib.nullcontext(), torch.device("meta")):
        torch.manual_seed(0)
        trainer = fastlocal.LocalTrainer(build("swin"), **FULL, objective=objective, **homes)
        trainer.step(*batch)  # torch's optimizers make their step counts on the default device
        with default:
            for exact in (False, True):
                trainer.step(*batch, exact=exact)
            logits = (
                trainer.predict(batch[0]),
                trainer.predict(batch[0], ema=True),
                trainer.predict_early(batch[0], 0.1),
            )
            states.append((trainer.state_dict(), logits))
    assert_equal(*states)


@pytest.mark.parametrize("objective", ["feature", "end-to-end"])
def test_low_weights_are_the_casts_that_autocast_makes(build: Build, batch: Batch, objective: str) -> None:
    options = {"objective": objective, "amp_dtype": torch.bfloat16, "lookahead": 1}
    expected = run(build, batch, "vit", 3, **options)
    low = {"residency": "module", "weights": "low"}
    assert_equal(run(build, batch, "vit", 3, **options, **low), expected)
    trainer = fastlocal.LocalTrainer(build("vit"), modules=5, **low, amp_dtype=torch.bfloat16)
    matrices = [m.weight for m in trainer.modules[2].blocks.modules() if isinstance(m, nn.Linear)]
    norms = [m.weight for m in trainer.modules[2].blocks.modules() if isinstance(m, nn.LayerNorm)]
    with trainer.residency.on_device(2, None):
        assert {p.dtype for p in matrices} == {torch.bfloat16}
        assert {p.dtype for p in norms} == {torch.float32}
    assert {p.dtype for p in (*matrices, *norms)} == {torch.float32}


def test_weights_that_somebody_loads_between_steps_are_trained_on(build: Build, batch: Batch) -> None:
    """What is held in a low precision beside the weights must not outlive a change of them."""
    other = {name: value * 0.5 for name, value in build("vit").state_dict().items()}
    results = []
    for homes in ({}, {"residency": "module", "weights": "low"}):
        trainer = fastlocal.LocalTrainer(build("vit"), amp_dtype=torch.bfloat16, **homes)
        trainer.step(*batch)
        trainer.model.load_state_dict(other)
        trainer.step(*batch)
        results.append(trainer.state_dict()["model"])
    assert_equal(results[1], results[0])


@pytest.mark.parametrize(
    "optimizer", ["sgd", "momentum", "adam", "nadam", "rmsprop", "lion", "adan", "adagrad", "muon"]
)
def test_other_optimizers_too(build: Build, batch: Batch, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On slices of a parameter, on small ones in particular, or on whole parameters where the optimizer needs them."""
    options: dict[str, Any] = {
        "optimizer": lambda groups: timm.optim.create_optimizer_v2(groups, optimizer, lr=0.01),
        "amp_dtype": torch.bfloat16,
    }
    start = run(build, batch, "vit", 2, residency="all", **options)
    expected = run(build, batch, "vit", 2, start, residency="all", **options)
    monkeypatch.setattr("fastlocal.hosted.SLICE", 2048)
    hosted = {"residency": "module", "weights": "low"}
    assert_equal(run(build, batch, "vit", 2, **hosted, **options), start)
    assert_equal(run(build, batch, "vit", 2, start, **hosted, **options), expected)


@pytest.mark.parametrize(("first", "second"), [("all", "module"), ("module", "optimizer"), ("optimizer", "all")])
def test_resume_under_another_residency(build: Build, batch: Batch, first: str, second: str) -> None:
    start = run(build, batch, "vit", 2, residency=first)
    assert_equal(
        run(build, batch, "vit", 2, start, residency=second), run(build, batch, "vit", 2, start, residency=first)
    )


def test_the_model_is_whole_between_steps(build: Build, batch: Batch) -> None:
    model = build("vit")
    trainer = fastlocal.LocalTrainer(model, residency="module")
    trainer.step(*batch)
    assert all(p.grad is None for p in model.parameters())
    logits = trainer.predict(batch[0])[-1]
    torch.testing.assert_close(model.to(trainer.device)(batch[0]), logits)


@pytest.mark.parametrize("residency", ["all", "optimizer", "module"])
def test_nothing_leaks_over_fifty_steps(build: Build, batch: Batch, residency: str) -> None:
    images, labels = batch[0][:4], torch.arange(4)
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


def test_an_optimizer_that_needs_all_gradients_at_once_is_refused(build: Build) -> None:
    def lamb(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
        return timm.optim.Lamb(groups, lr=1e-3, **options)

    with pytest.raises(ValueError, match="optimizer: LAMB with max_grad_norm"):
        fastlocal.LocalTrainer(build("vit"), residency="optimizer", optimizer=lamb)
    without = functools.partial(lamb, max_grad_norm=None)
    fastlocal.LocalTrainer(build("vit"), residency="optimizer", optimizer=without)
