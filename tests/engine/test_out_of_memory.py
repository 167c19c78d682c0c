"""A step that runs out of memory goes on at the module that failed, in smaller parts, and nothing is trained twice."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlocal

Build = Callable[..., nn.Module]
Batch = tuple[Tensor, Tensor]
OUT_OF_MEMORY = {
    "allocator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}


class Full:
    """Makes block ``index`` refuse more than ``largest`` samples, in the forward or in the backward."""

    def __init__(self, model: nn.Module, index: int, where: str, error: Exception) -> None:
        self.largest: int | None = None
        self.failures = 0

        def check(samples: int) -> None:
            if self.largest is not None and samples > self.largest:
                self.failures += 1
                raise error

        def forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if where == "forward":
                check(len(output))
            elif output.requires_grad:
                output.register_hook(lambda gradient: check(len(gradient)))

        model.blocks[index].register_forward_hook(forward)


def train(build: Build, batch: Batch, where: str, error: str, fail: bool, **options: Any) -> tuple[Any, int]:
    torch.manual_seed(0)
    model = build("vit", **options.pop("model", {}))
    full = Full(model, 2, where, OUT_OF_MEMORY[error])
    trainer = fastlocal.LocalTrainer(
        model, modules=[2, 4], optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1), **options
    )
    torch.manual_seed(1)
    trainer.step(*batch)
    full.largest = 4 if fail else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.step(*batch)
    assert all(p.grad is None for p in trainer.model.parameters())
    trainer.step(*batch)
    return trainer, full.failures


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("homes", [{}, {"residency": "module", "boundaries": "host"}], ids=["device", "host"])
@pytest.mark.parametrize("objective", ["feature", "end-to-end"])
def test_the_result_is_that_of_smaller_parts(
    build: Build, batch: Batch, objective: str, homes: dict, where: str, error: str
) -> None:
    options = {"objective": objective, "amp_dtype": torch.float16, **homes}
    ours, failures = train(build, batch, where, error, True, **options)
    assert failures == 1
    assert ours.micro_batch == 4
    theirs, _ = train(build, batch, where, error, False, **options)
    for (name, value), expected in zip(
        ours.model.state_dict().items(), theirs.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=2e-4, msg=name)
    # A module that was trained twice would have moved twice as far.
    assert ours.scaler.state_dict() == theirs.scaler.state_dict()


def test_random_masks_are_repeated_even_so(build: Build, batch: Batch) -> None:
    """The second run of a module must draw what the first one drew, in parts of the same size, or all starts again."""
    model = {"drop_path_rate": 0.4, "proj_drop_rate": 0.2}
    trainer, failures = train(build, batch, "backward", "allocator", True, objective="end-to-end", model=model)
    assert failures == 1
    assert trainer.micro_batch == 4
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_prediction_goes_on_in_smaller_parts(build: Build, batch: Batch) -> None:
    model = build("vit")
    full = Full(model, 3, "forward", OUT_OF_MEMORY["allocator"])
    trainer = fastlocal.LocalTrainer(model, modules=[2, 4])
    expected = trainer.predict(batch[0])
    full.largest = 2
    with pytest.warns(UserWarning, match="out of memory with parts of 8 samples; going on with parts of 4"):
        torch.testing.assert_close(trainer.predict(batch[0]), expected)
    assert full.failures == 2


@pytest.mark.parametrize("amp_dtype", [None, torch.float16])
def test_an_optimizer_without_memory_is_not_asked_twice(
    build: Build, batch: Batch, amp_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = fastlocal.LocalTrainer(build("vit"), modules=[2, 4], amp_dtype=amp_dtype)
    trainer.step(*batch)
    calls: list[int] = []

    def step(*_: Any) -> None:
        calls.append(1)
        raise OUT_OF_MEMORY["allocator"]

    with monkeypatch.context() as patch:
        patch.setattr(trainer.optimizers[1], "step", step)
        with pytest.raises(torch.OutOfMemoryError, match="the optimizer's step of module 2"):
            trainer.step(*batch)
    assert calls == [1]
    assert not trainer.step(*batch).skipped.any()  # nothing is left half-done
