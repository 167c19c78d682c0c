"""Boundaries and the bus: what is written is read, and every byte that crosses is counted."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlocal
from fastlocal import memory
from fastlocal.boundary import Boundary
from fastlocal.bus import Bus

Build = Callable[..., nn.Module]
PARTS = [slice(0, 3), slice(3, 6), slice(6, 8)]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("home", ["device", "host"])
def test_what_is_written_in_parts_is_read_in_other_parts(home: Any, dtype: torch.dtype | None) -> None:
    x = torch.randn(8, 5, 2)
    boundary = Boundary(home, Bus(x.device), 8, dtype)
    for part in PARTS:
        boundary.write(part, x[part])
    for parts in (PARTS, [slice(0, 8)], [slice(0, 4), slice(4, 8)]):
        assert torch.equal(torch.cat(list(boundary.parts(parts))), x.to(dtype or x.dtype))


def test_a_part_of_the_host_is_a_copy_and_two_at_most_are_on_the_device() -> None:
    bus = Bus(torch.get_default_device())
    images = torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8, device="cpu")
    boundary = Boundary.of(images, "host", bus)
    with memory.Meter(images, device=bus.device) as meter:
        for part in boundary.parts([slice(i, i + 1) for i in range(8)]):
            assert part.untyped_storage().data_ptr() != images.untyped_storage().data_ptr()
            del part
    assert meter.peak <= 2 * images[0].nbytes
    assert bus.moved == images.nbytes


def test_host_memory_is_lent_again() -> None:
    bus = Bus(torch.get_default_device())
    first = bus.borrow(torch.Size((4, 6)), torch.float32)
    address = first.data_ptr()
    bus.give_back(first)
    second = bus.borrow(torch.Size((4, 6)), torch.bfloat16)
    assert second.data_ptr() == address
    assert bus.borrow(torch.Size((2,)), torch.float32).data_ptr() != address


def step_bytes(build: Build, micro_batch: int, **options: Any) -> int:
    torch.manual_seed(0)
    trainer = fastlocal.LocalTrainer(
        build("vit"), modules=5, micro_batch=micro_batch, residency="module", boundaries="host", **options
    )
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, device="cpu")
    labels = torch.arange(8)
    for _ in range(2):
        before = trainer.engine.bus.moved
        trainer.step(images, labels)
    return trainer.engine.bus.moved - before


@pytest.mark.parametrize("objective", ["feature", "cross-entropy", "end-to-end"])
def test_the_bus_does_not_see_the_number_of_parts(build: Build, objective: str) -> None:
    assert len({step_bytes(build, size, objective=objective) for size in (1, 3, 8)}) == 1


def test_bytes_of_an_exact_step_are_those_of_the_description(build: Build) -> None:
    """Weights in twice (but for the last module), states and masters in and out, five times each boundary."""
    model = build("vit")
    counts = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    weights = 4 * sum(p.numel() for p in model.parameters())
    last = 4 * (counts[-1] + sum(p.numel() for m in (model.norm, model.head) for p in m.parameters()))
    boundary = 4 * 8 * 17 * 32 * 4  # four of them, 8 samples, 17 tokens of 32 fp32 channels
    images = 2 * 8 * 3 * 32 * 32
    expected = (2 * weights - last) + 5 * weights + 5 * boundary + images
    assert step_bytes(build, 4, objective="end-to-end") == pytest.approx(expected, rel=0.01)  # slabs are aligned
    # Halves of the matrices come in instead of the whole; masters come in for the optimizer, and halves go out with them.
    low = step_bytes(build, 4, objective="end-to-end", amp_dtype=torch.bfloat16, weights="low")
    assert low < 7.7 * weights + 2.5 * boundary + images


def test_memory_that_cannot_be_pinned_is_used_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def register(address: int, size: int, flags: int) -> int:
        calls.append(size)
        return 2  # cudaErrorMemoryAllocation

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register))
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: object())
    with pytest.warns(UserWarning, match="4 MiB of host memory could not be pinned"):
        value: Tensor = Bus(torch.device("cuda", 0)).host(2**20, torch.float32)
    assert calls == [4 * 2**20]
    assert value.fill_(3.0).eq(3.0).all()
