"""Every tensor is where it must be on a card: a CUDA device whose tensors have shapes and no values stands for one.

Fake tensors refuse operations between devices, so a tensor left on the host is found here and not by the first user.
What needs a real driver is replaced: streams, the random state, and the backward (its threads are CUDA's), which gives
every leaf of the graph a gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import fastlocal
from fastlocal import memory
from fastlocal.dry_run import _DryRun
from fastlocal.kernels import dispatch

CARD = torch.device("cuda", 0)
Build = Callable[..., nn.Module]


class _Stream:
    def __init__(self, *_: Any) -> None: ...

    def wait_stream(self, other: _Stream) -> None: ...

    def synchronize(self) -> None: ...


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A dry run on a card."""
    data: Any = Tensor.data
    empty_like = torch.empty_like

    def set_data(self: FakeTensor, value: Tensor) -> None:
        data.__set__(self, value)
        self.fake_device = value.device  # else it stays where it was made

    def backward(result: Tensor, *_: Any) -> None:
        nodes, seen = [result.grad_fn], set()
        while nodes:
            node: Any = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            if hasattr(node, "variable"):
                assert node.variable.device == CARD
                node.variable.grad = torch.empty_like(node.variable)

    monkeypatch.setattr(FakeTensor, "data", property(data.__get__, set_data), raising=False)
    monkeypatch.setattr(_DryRun, "__deepcopy__", lambda self, _: self, raising=False)
    monkeypatch.setattr(Tensor, "backward", backward)
    monkeypatch.setattr(torch, "empty_like", lambda *a, pin_memory=False, **k: empty_like(*a, **k))
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", _Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda _: torch.zeros(16, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    dispatch._why_not_card.cache_clear()
    with memory.dry_run():
        yield
    dispatch._why_not_card.cache_clear()


@pytest.mark.parametrize(("amp_dtype", "ema_decay"), [(None, None), (torch.bfloat16, 0.9), (torch.float16, 0.9)])
@pytest.mark.parametrize("residency", ["all", "optimizer", "module"])
@pytest.mark.parametrize(
    ("family", "objective"), [("swin", "feature"), ("swin", "end-to-end"), ("vit", "image"), ("vit", "end-to-end")]
)
def test_training_keeps_everything_in_its_place(
    build: Build,
    card: None,
    family: str,
    objective: str,
    residency: Any,
    amp_dtype: torch.dtype | None,
    ema_decay: float | None,
) -> None:
    small = {"depths": (1, 1, 1), "num_heads": (1, 2, 4)} if family == "swin" else {"depth": 3}
    trainer = fastlocal.LocalTrainer(
        memory.fake_copy(build(family, **small)),
        modules=3,
        objective=objective,
        residency=residency,
        ema_decay=ema_decay,
        amp_dtype=amp_dtype,
        device=CARD,
        micro_batch=2,
        clip_grad=1.0,
        kernels="reference" if amp_dtype is None else "triton",  # fused ops have fakes, so nothing is launched
    )
    assert (trainer.fused_layers > 0) == (amp_dtype is not None)
    assert trainer.scaler.is_enabled() == (amp_dtype == torch.float16)
    images = torch.empty(4, 3, 32, 32, dtype=torch.uint8)
    labels = torch.empty(4, dtype=torch.int64)
    for _ in range(2):
        trainer.step(images, labels)
        assert trainer.predict(images).device == CARD
        if ema_decay is not None:
            assert trainer.predict(images, ema=True).shape == (1, 4, 10)
    trainer.load_state_dict(trainer.state_dict())
    metrics = trainer.step(images, labels)
    assert metrics.loss.device == CARD

    host = torch.device("cpu")
    states = {
        tensor.device
        for optimizer in trainer.optimizers
        for state in optimizer.state.values()
        for tensor in state.values()
        if tensor.numel() > 1
    }
    assert {p.device for p in trainer.model.parameters()} == {host if residency == "module" else CARD}
    assert states == {CARD if residency == "all" else host}
    if trainer.ema is not None:
        assert {p.device for p in trainer.ema.module.parameters()} == {host if residency == "module" else CARD}
