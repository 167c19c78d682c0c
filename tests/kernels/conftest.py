"""What every kernel test has: poisoned allocations, relative errors, and a compiler state of its own."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.utils._device

# torch lists the functions that `torch.device(...)` contexts steer once and for all; it must see them before they are patched.
torch.utils._device._device_constructors()


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``allocate``, but what `fastlocal.kernels` gets from it is full of NaN (integers: a large negative number)."""

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if sys._getframe(1).f_globals.get("__name__", "").startswith("fastlocal.kernels"):
            tensor.fill_(float("nan") if tensor.is_floating_point() else -(2**30))
        return tensor

    return poisoned


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that leaves an element of its output unwritten, or reads one before writing it, gives NaN."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """torch.compile starts from nothing in each test, so no test depends on what another one compiled."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def relative_error() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """``relative_error(out, reference)``: ||out - reference|| / ||reference|| in float64, never against zeros."""

    def error(out: torch.Tensor, reference: torch.Tensor) -> float:
        norm = reference.double().norm()
        assert norm > 0, "comparing with zeros proves nothing"
        return ((out.double() - reference.double()).norm() / norm).item()

    return error
