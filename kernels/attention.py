"""Scaled dot-product attention with an optional additive bias that gets a deterministic gradient.

Flash-style: the forward keeps the output and one log-sum-exp per query, the backward computes the probabilities again.
Reads from the public function down to the PyTorch reference; the Triton kernels are in `attention_triton`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastlocal.kernels import dispatch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HEAD_DIMS = range(16, 129)


def attention(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """``softmax(scale · q kᵀ + bias) v`` for each sample and head, with the probabilities never in memory.

    Args:
        q, k, v: [B, heads, N, D], float16, bfloat16, float32 or float64, all three the same; any N; D from 16 to 128;
            any strides with a unit last one, so that timm's ``qkv.reshape(...).permute(...)`` needs no copy. Under
            autocast they are cast to its dtype. Softmax and sums are float32; float64 always runs the PyTorch
            reference, and in float64.
        bias: [heads, N, N] or [1, heads, N, N], added to the scaled scores of every sample; any of these dtypes and any
            strides. Its gradient is summed over the batch in float32, in a fixed order, and rounded once. A query
            whose biases are all −inf gets zeros.
        scale: default D ** -0.5.

    Returns:
        [B, heads, N, D] in the dtype of q, laid out so that ``.transpose(1, 2).reshape(B, N, heads * D)`` needs no
        copy. Differentiable once.

    CUDA cards without Triton tensor cores (compute capability below 8.0) run ``F.scaled_dot_product_attention``.

    Source: Dao, "FlashAttention-2" (arXiv 2307.08691).

    Raises:
        ValueError: an argument's shape, stride, dtype or device is not one of the above.
        RuntimeError: kernels="triton" was asked for and cannot run here.
    """
    _check(q, k, v, bias)
    if bias is not None and bias.ndim == 4:
        bias = bias[0]
    if scale is None:
        scale = q.shape[-1] ** -0.5
    device_type = q.device.type
    # The autocast rule. Not torch.library's: that would also cast the bias, and round the gradient's sum with it.
    if torch.is_autocast_enabled(device_type) and q.dtype != torch.float64:
        q, k, v = (tensor.to(torch.get_autocast_dtype(device_type)) for tensor in (q, k, v))
    if _sdpa_instead(q.device):
        return F.scaled_dot_product_attention(q, k, v, None if bias is None else bias.to(q.dtype), scale=scale)
    return _forward(q, k, v, bias, scale)[0]


@torch.compiler.assume_constant_result
def _sdpa_instead(device: torch.device) -> bool:
    return device.type == "cuda" and dispatch.implementation(device) == "reference"


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
    if q.ndim != 4 or q.numel() == 0:
        raise ValueError(f"q must be [B, heads, N, D] with no empty dimension, got {list(q.shape)}.")
    if q.shape[-1] not in HEAD_DIMS:
        raise ValueError(f"q must have a head dimension D from {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}, got {q.shape[-1]}.")
    if q.dtype not in DTYPES:
        raise ValueError(f"q must be float16, bfloat16, float32 or float64, got {q.dtype}.")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != q.shape:
            raise ValueError(f"{name} must have q's shape {list(q.shape)}, got {list(tensor.shape)}.")
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} must have q's dtype {q.dtype}, got {tensor.dtype}.")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} must have unit stride in its last dimension, got strides {tensor.stride()}.")
    if bias is not None:
        _, heads, length, _ = q.shape
        expected = [heads, length, length]
        if list(bias.shape) not in (expected, [1, *expected]):
            raise ValueError(f"bias must be [heads, N, N] = {expected} or [1, heads, N, N], got {list(bias.shape)}.")
        if bias.dtype not in DTYPES:
            raise ValueError(f"bias must be float16, bfloat16, float32 or float64, got {bias.dtype}.")
    for name, other in (("k", k), ("v", v), ("bias", bias)):
        if other is not None and other.device != q.device:
            raise ValueError(f"{name} must be on q's device, {q.device}, got {other.device}.")


# --- Registration -----------------------------------------------------------------------------------------------------


def _tokens_first(q: Tensor) -> Tensor:
    """An uninitialized [B, heads, N, D] whose memory is [B, N, heads, D]."""
    batch, heads, length, head_dim = q.shape
    return torch.empty((batch, length, heads, head_dim), dtype=q.dtype, device=q.device).transpose(1, 2)


@torch.library.custom_op("fastlocal::attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The output and the scores' log-sum-exp [B, heads, N]."""
    out = _tokens_first(q)
    if _implementation(q) == "triton":
        from fastlocal.kernels import attention_triton

        with torch.cuda.device_of(q):  # Triton launches on the current device
            return out, attention_triton.forward(q, k, v, bias, scale, out)
    probabilities, lse = _reference_probabilities(q, k, bias, scale)
    return out.copy_(_multiply(probabilities, v)), lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return _tokens_first(q), q.new_empty(q.shape[:3], dtype=_accumulate_dtype(q.dtype))


@torch.library.custom_op("fastlocal::attention_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and bias; the last is empty unless needed."""
    d_q, d_k, d_v = (_tokens_first(q) for _ in range(3))
    d_bias = _empty_bias_gradient(q, bias, needs_bias)
    if _implementation(q) == "triton":
        from fastlocal.kernels import attention_triton

        with torch.cuda.device_of(q):
            attention_triton.backward(d_out, q, k, v, bias, scale, out, lse, d_q, d_k, d_v, d_bias)
        return d_q, d_k, d_v, d_bias
    probabilities, _ = _reference_probabilities(q, k, bias, scale)
    d_v.copy_(_multiply(probabilities.mT, d_out))
    d_scores = _multiply(d_out, v.mT)
    d_scores -= (d_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1, keepdim=True)
    d_scores *= probabilities
    if needs_bias:
        d_bias.copy_(d_scores.sum(0))
    d_scores *= scale
    d_q.copy_(_multiply(d_scores, k))
    d_k.copy_(_multiply(d_scores.mT, q))
    return d_q, d_k, d_v, d_bias


@_backward.register_fake
def _(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _tokens_first(q), _tokens_first(q), _tokens_first(q), _empty_bias_gradient(q, bias, needs_bias)


def _empty_bias_gradient(q: Tensor, bias: Tensor | None, needed: bool) -> Tensor:
    if bias is None or not needed:
        return q.new_empty(0)
    return torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:  # type: ignore[no-untyped-def]
    q, k, v, bias, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, bias, *output)
    ctx.set_materialize_grads(False)


def _autograd(ctx, d_out: Tensor | None, d_lse: None) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    if d_out is None:
        return (None,) * 5
    q, k, v, bias, out, lse = ctx.saved_tensors
    needs_bias = ctx.needs_input_grad[3]
    d_q, d_k, d_v, d_bias = _backward(d_out, q, k, v, bias, ctx.scale, out, lse, needs_bias)
    return d_q, d_k, d_v, d_bias if needs_bias else None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


# Counted as torch counts scaled_dot_product_attention: two products forward, five backward.
@register_flop_formula(torch.ops.fastlocal.attention)
def _forward_flops(q: torch.Size, *args: object, **kwargs: object) -> int:
    batch, heads, length, head_dim = q
    return 4 * batch * heads * length**2 * head_dim


@register_flop_formula(torch.ops.fastlocal.attention_backward)
def _backward_flops(d_out: torch.Size, *args: object, **kwargs: object) -> int:
    return _forward_flops(d_out) * 5 // 2


def _implementation(q: Tensor) -> str:
    if q.dtype == torch.float64:
        return "reference"
    return dispatch.implementation(q.device)


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- Reference --------------------------------------------------------------------------------------------------------


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """The matrix product in the accumulation dtype, whatever autocast says."""
    dtype = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    with torch.autocast(left.device.type, enabled=False):
        return left.to(dtype) @ right.to(dtype)


def _reference_probabilities(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ + bias) and the scores' log-sum-exp, +inf where every score is −inf."""
    scores = _multiply(q, k.mT) * scale
    if bias is not None:
        scores += bias
    lse = scores.logsumexp(-1)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    return torch.exp(scores - lse[..., None]), lse
