"""Rotary position embedding of queries or keys in one pass.

Eager PyTorch takes a dozen, most of them in float32. It is not inside the attention kernel, where every block of queries
would turn every key again: at 64 channels that is more arithmetic than the softmax. Reads from the public function down to
the PyTorch reference; the Triton kernel is in `rotary_embedding_triton`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlocal.kernels import dispatch
from fastlocal.kernels.attention import DTYPES
from fastlocal.kernels.registration import register


def rotary_embedding(x: Tensor, table: Tensor, *, prefix: int = 0, half: bool = False) -> Tensor:
    """Turn pairs of channels of each token by angles of its position: ``x · cosines + turned(x) · sines``.

    ``turned`` makes (−b, a) of a pair (a, b): of neighbours, as EVA-02, or of channels half the head dimension apart, as
    DINOv3.

    Args:
        x: [B, heads, N, D], float16, bfloat16, float32 or float64, D even; any strides with a unit last one. Computed in
            float32 and rounded once; float64 always runs the PyTorch reference, and in float64.
        table: [N - prefix, 2 · D], the sines and then the cosines of each position, as timm's rotary embeddings; a
            constant: it gets no gradient.
        prefix: first tokens (class, registers) that have no position and stay as they are.
        half: pair channels half the head dimension apart.

    Returns:
        [B, heads, N, D] in the dtype of x. Differentiable in reverse mode, under torch.func too.

    Source: Su et al., "RoFormer" (arXiv 2104.09864).

    Raises:
        ValueError: an argument's shape, stride, dtype, device or value is not one of the above, or ``table`` requires grad.
        RuntimeError: kernels="triton" was asked for and cannot run here.
        NotImplementedError: forward-mode differentiation.
    """
    _check(x, table, prefix)
    return _rotate(x, table, prefix, half, False, dispatch.choice())


def _check(x: Tensor, table: Tensor, prefix: int) -> None:
    if x.ndim != 4 or x.numel() == 0 or x.shape[3] % 2:
        raise ValueError(f"x must be [B, heads, N, D] with no empty dimension and an even D, got {list(x.shape)}.")
    if x.stride(-1) != 1:
        raise ValueError(f"x must have unit stride in its last dimension, got strides {x.stride()}.")
    if not 0 <= prefix <= x.shape[2]:
        raise ValueError(f"prefix must be from 0 to N = {x.shape[2]}, got {prefix}.")
    expected = [x.shape[2] - prefix, 2 * x.shape[3]]
    if list(table.shape) != expected:
        raise ValueError(f"table must be [N - prefix, 2 · D] = {expected}, got {list(table.shape)}.")
    for name, tensor in (("x", x), ("table", table)):
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}.")
    if table.device != x.device:
        raise ValueError(f"table must be on x's device, {x.device}, got {table.device}.")
    if table.requires_grad:
        raise ValueError("table must not require grad: the rotation treats it as a constant.")


# --- Registration -----------------------------------------------------------------------------------------------------


def _run(x: Tensor, table: Tensor, prefix: int, half: bool, inverse: bool, kernels: dispatch.Choice) -> Tensor:
    """The rotation, or where ``inverse`` its transpose: its gradient, and for sines and cosines of angles its inverse."""
    if x.dtype != torch.float64 and dispatch.implementation(x.device, None, kernels) == "triton":
        from fastlocal.kernels import rotary_embedding_triton

        return rotary_embedding_triton.rotate(x, table, prefix, half, inverse)
    return _reference(x, table, prefix, half, inverse)


def _fake(x: Tensor, table: Tensor, prefix: int, half: bool, inverse: bool, kernels: dispatch.Choice) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, table, *ctx.options, ctx.inverse, ctx.kernels = inputs
    ctx.save_for_backward(table)


def _autograd(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    (table,) = ctx.saved_tensors
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    return _rotate(d_out, table, *ctx.options, not ctx.inverse, ctx.kernels), *[None] * 5


_rotate = register(
    "rotary_embedding(Tensor x, Tensor table, int prefix, bool half, bool inverse, str kernels) -> Tensor",
    _run,
    _fake,
    setup_context=_setup_context,
    backward=_autograd,
)


# --- Reference --------------------------------------------------------------------------------------------------------


def _reference(x: Tensor, table: Tensor, prefix: int, half: bool, inverse: bool) -> Tensor:
    sines, cosines = table.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    tokens = x[:, :, prefix:].to(sines.dtype)
    turned = -_turned(tokens * sines, half) if inverse else _turned(tokens, half) * sines
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out[:, :, :prefix] = x[:, :, :prefix]
    out[:, :, prefix:] = turned.addcmul_(tokens, cosines)
    return out


def _turned(x: Tensor, half: bool) -> Tensor:
    """(−b, a) of each pair of channels (a, b)."""
    if half:
        a, b = x.chunk(2, -1)
        return torch.cat([-b, a], -1)
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
