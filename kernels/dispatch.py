"""Which implementation of a fused op runs, and why.

Every op has two: ``"reference"`` (plain PyTorch, the oracle and the CPU path) and ``"triton"``. ``"auto"`` takes Triton
wherever it can run and the reference elsewhere; an explicit ``"triton"`` runs Triton or raises, it never falls back.
Nothing here imports triton: it is imported by an op's ``*_triton`` file, the first time that file is needed.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Choice = Literal["auto", "triton", "reference"]
CHOICES: tuple[Choice, ...] = ("auto", "triton", "reference")

# Triton >= 3.3 emits no tensor-core instructions below compute capability 8.0 (triton pull request 5066).
MINIMUM_CAPABILITY = (8, 0)

_choice: Choice = "auto"


@contextmanager
def use_kernels(choice: Choice) -> Iterator[None]:
    """Run the fused ops in this block with ``choice``: ``"auto"``, ``"triton"`` or ``"reference"``.

    The setting is process-wide, because autograd runs backward ops on threads of its own.

    Raises:
        ValueError: ``choice`` is none of the three.
    """
    previous = _choice
    set_kernels(choice)
    try:
        yield
    finally:
        set_kernels(previous)


def set_kernels(choice: Choice) -> None:
    """Choose for the whole process; see `use_kernels`."""
    global _choice
    if choice not in CHOICES:
        raise ValueError(f"kernels must be one of {', '.join(CHOICES)}, got {choice!r}.")
    _choice = choice


def choice() -> Choice:
    """What is chosen now. A forward hands it to its backward, which must run the same implementation whenever it runs."""
    return _choice


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not_triton(device: torch.device) -> str | None:
    """The reason Triton kernels cannot run on ``device`` in one sentence, or None if they can."""
    if not _triton_is_installed():
        return "Triton is not installed."
    if interpreting():
        return None
    if device.type != "cuda":
        return f"Triton kernels run on CUDA devices (or anywhere with TRITON_INTERPRET=1), not on {device.type!r}."
    return _why_not_card(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _why_not_card(index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) < MINIMUM_CAPABILITY:
        return f"Triton has no tensor cores below compute capability 8.0, and this card has {major}.{minor}."
    return None


def implementation(
    device: torch.device, limit: str | None = None, choice: Choice | None = None
) -> Literal["triton", "reference"]:
    """The implementation that runs on ``device``.

    ``"auto"`` on a CPU is the reference even when interpreting: the interpreter is for tests, which ask for it.

    Args:
        limit: what keeps an op's Triton kernels from these inputs, in one sentence; None if nothing does.
        choice: None for the current one.

    Raises:
        RuntimeError: ``"triton"`` was asked for and cannot run on ``device``.
    """
    choice = choice or _choice
    if choice == "reference" or (choice == "auto" and device.type == "cpu"):
        return "reference"
    reason = why_not_triton(device) or limit
    if reason is None:
        return "triton"
    if choice == "triton":
        raise RuntimeError(f"kernels='triton' was asked for, but {reason[0].lower()}{reason[1:]}")
    return "reference"
