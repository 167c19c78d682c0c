"""What the engine refuses, each with one sentence that names the argument, what was given and what is accepted."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

import torch
from torch import Tensor

from fastlocal import memory
from fastlocal.backbones import Backbone
from fastlocal.geometry import Geometry


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError, with the nearest suggestion, unless ``value`` is one of ``choices``."""
    if value not in choices:
        close = get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}{hint}")


def check_autocast(dtype: torch.dtype | None, device: torch.device) -> None:
    """Raise ValueError unless ``device`` can compute under autocast to ``dtype``."""
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"amp_dtype must be torch.bfloat16, torch.float16 or None, got {dtype}.")
    if (
        dtype == torch.bfloat16
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise ValueError("amp_dtype: this card has no bfloat16; use torch.float16.")


def check_images(images: Tensor, expected: Geometry) -> None:
    """Raise ValueError unless ``images`` are a batch of ``expected``, floating or uint8, and finite."""
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1:] != expected.shape or shape[0] == 0:
        wanted = "×".join(map(str, expected.shape))
        raise ValueError(f"images must be [batch, {wanted}] for this model, got {list(shape)}.")
    if not images.is_floating_point() and images.dtype != torch.uint8:
        raise ValueError(f"images must be floating or uint8, got {images.dtype}.")
    if _may_look(images) and images.is_floating_point() and not bool(torch.isfinite(images).all()):
        raise ValueError("images: a pixel is NaN or infinite.")


def check_labels(labels: Tensor, batch: int, classes: int) -> None:
    """Raise ValueError unless ``labels`` are ``batch`` class indices, or probabilities of ``classes``."""
    if labels.ndim == 2 and labels.is_floating_point():
        if labels.shape != (batch, classes):
            raise ValueError(f"labels must be [{batch}, {classes}] probabilities, got {list(labels.shape)}.")
        if _may_look(labels):
            off = (labels.double().sum(1) - 1).abs().max().item()
            if not (off <= 0.01 and labels.min() >= 0):
                raise ValueError("labels: a row holds no probabilities; each must be from 0 to 1, and their sum 1.")
        return
    if labels.shape != (batch,) or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be {batch} int64 class indices or [{batch}, {classes}] probabilities, got"
            f" {list(labels.shape)} of {labels.dtype}."
        )
    if _may_look(labels):
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise ValueError(f"labels must be from 0 to {classes - 1} for this model, got {low if low < 0 else high}.")


def check_batch_norm(backbone: Backbone, micro_batch: int | None, batch: int) -> None:
    """Raise ValueError if parts of a batch would be normalized each with statistics of its own."""
    if micro_batch is not None and micro_batch < batch and backbone.batch_norms:
        raise ValueError(
            f"micro_batch must be None, or at least the batch of {batch}, for {type(backbone.model).__name__}: its BatchNorm"
            f" layers normalize over what they are given together, so parts of {micro_batch} would train another model."
        )


def check_fit(what: str, theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    """Raise ValueError, naming a tensor, unless the saved state ``theirs`` has the names and shapes of ``ours``."""
    for name in ours.keys() ^ theirs.keys():
        where = "missing from" if name in ours else "only in"
        raise ValueError(f"state: {what} parameter {name} is {where} the saved state; it is of another model.")
    for name, value in ours.items():
        if value.shape != theirs[name].shape:
            raise ValueError(
                f"state: {what} parameter {name} is {list(theirs[name].shape)} in the saved state and"
                f" {list(value.shape)} here; it is of another model."
            )


def _may_look(tensor: Tensor) -> bool:
    """Looking at a tensor on a card would make the host wait for it; in a dry run there are no values to look at."""
    return tensor.device.type == "cpu" and not memory.is_dry_run()
