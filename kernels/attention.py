"""Scaled dot-product attention with an optional additive bias that gets a deterministic gradient.

Flash-style: the forward keeps the output and two numbers per query, the maximum of its scores and one over the sum of
their exponentials above it; the backward computes the probabilities again. Reads from the public function down to the
PyTorch reference; the Triton kernels are in `attention_triton`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastlocal.kernels import dispatch
from fastlocal.kernels.registration import autocast_dtype, register

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAXIMUM_HEAD_DIM = 256


def attention(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """``softmax(scale · q kᵀ + bias) v`` for each sample and head, with the probabilities never in memory.

    Args:
        q: [B, heads, N, D], float16, bfloat16, float32 or float64; any N; D up to 256; any strides with a unit last one,
            so that timm's ``qkv.reshape(...).permute(...)`` needs no copy. Under autocast q, k and v are cast to its
            dtype. Softmax and sums are float32; float64 always runs the PyTorch reference, and in float64.
        k, v: [B, groups, M, D] in q's dtype: M need not be N, and heads that share keys and values (heads a multiple of
            groups) stand next to each other.
        bias: broadcast to [B, heads, N, M], on each sample or on all. Of a floating dtype it is added to the scaled
            scores; its gradient is summed in float32, in a fixed order, and rounded once. Of dtype bool it says which
            keys a query sees. A query that sees none (all False, all −inf) gets zeros.
        scale: a number; default D ** -0.5.

    Returns:
        [B, heads, N, D] in the dtype of q, from Triton laid out so that ``.transpose(1, 2).reshape(B, N, heads * D)``
        needs no copy. Differentiable once, in reverse mode, under torch.func too.

    Where Triton cannot run and was not asked for (CPU, MPS, XPU, CUDA below compute capability 8.0) this is
    ``F.scaled_dot_product_attention``. Sequences of several lengths in one batch: pad them, and hide the padding's keys
    with a bool ``bias`` of [B, 1, 1, M].

    Source: Dao, "FlashAttention-2" (arXiv 2307.08691).

    Raises:
        ValueError: an argument's shape, stride, dtype or device is not one of the above.
        RuntimeError: kernels="triton" was asked for and cannot run here.
        NotImplementedError: forward-mode differentiation.
    """
    _check(q, k, v, bias, scale)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    # The autocast rule. Not torch.library's: that would also cast the bias, and round the gradient's sum with it.
    if (autocast := autocast_dtype(q.device)) is not None and q.dtype != torch.float64:
        q, k, v = (tensor.to(autocast) for tensor in (q, k, v))
    if bias is not None:
        bias = bias[(None,) * (4 - bias.ndim)]
    choice = dispatch.choice()
    if q.dtype != torch.float64 and choice == "auto" and _sdpa_instead(q.device):
        mask = None if bias is None or bias.dtype == torch.bool else _rounded(bias, q.dtype)
        mask = bias if mask is None else mask
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=k.shape[1] != q.shape[1])
    if bias is not None:
        bias = bias.expand(-1, -1, q.shape[2], k.shape[2])
    return _forward(q, k, v, bias, scale, choice)[0]


@torch.compiler.assume_constant_result
def _sdpa_instead(device: torch.device) -> bool:
    return dispatch.implementation(device, choice="auto") == "reference"


def _rounded(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """``bias`` in ``dtype``, its finite numbers finite: −1e9 must not become −inf in float16."""
    if torch.finfo(bias.dtype).max <= torch.finfo(dtype).max:
        return bias.to(dtype)
    largest = torch.finfo(dtype).max
    return torch.where(bias.isinf(), bias, bias.clamp(-largest, largest)).to(dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> None:
    if q.ndim != 4 or q.numel() == 0:
        raise ValueError(f"q must be [B, heads, N, D] with no empty dimension, got {list(q.shape)}.")
    if q.shape[-1] > MAXIMUM_HEAD_DIM:
        raise ValueError(f"q must have a head dimension D of at most {MAXIMUM_HEAD_DIM}, got {q.shape[-1]}.")
    if q.dtype not in DTYPES:
        raise ValueError(f"q must be float16, bfloat16, float32 or float64, got {q.dtype}.")
    batch, heads, queries, head_dim = q.shape
    if k.ndim != 4 or k.numel() == 0 or (k.shape[0], k.shape[3]) != (batch, head_dim) or heads % k.shape[1]:
        raise ValueError(
            f"k must be [B, groups, M, D] with q's B and D and groups that divide its heads, q being {list(q.shape)}, "
            f"got {list(k.shape)}."
        )
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {list(k.shape)}, got {list(v.shape)}.")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} must have q's dtype {q.dtype}, got {tensor.dtype}.")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride(-1) != 1 and head_dim > 1:
            raise ValueError(f"{name} must have unit stride in its last dimension, got strides {tensor.stride()}.")
    if bias is not None:
        expected = [batch, heads, queries, k.shape[2]]
        trailing = zip(reversed(bias.shape), reversed(expected), strict=False)
        if bias.ndim > 4 or any(size not in (1, whole) for size, whole in trailing):
            raise ValueError(f"bias must broadcast to [B, heads, N, M] = {expected}, got {list(bias.shape)}.")
        if bias.dtype not in (*DTYPES, torch.bool):
            raise ValueError(f"bias must be bool, float16, bfloat16, float32 or float64, got {bias.dtype}.")
    for name, other in (("k", k), ("v", v), ("bias", bias)):
        if other is not None and other.device != q.device:
            raise ValueError(f"{name} must be on q's device, {q.device}, got {other.device}.")
    if isinstance(scale, Tensor):
        raise ValueError("scale must be a number, which gets no gradient, got a tensor: multiply q by a learnt scale.")


# --- Registration -----------------------------------------------------------------------------------------------------


def _tokens_first(x: Tensor) -> Tensor:
    """An uninitialized tensor of x's shape [B, heads, N, D] whose memory is [B, N, heads, D]."""
    batch, heads, length, head_dim = x.shape
    return torch.empty((batch, length, heads, head_dim), dtype=x.dtype, device=x.device).transpose(1, 2)


def _run(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, kernels: dispatch.Choice
) -> tuple[Tensor, Tensor]:
    """The output, and of each query the maximum of its scores and one over their sum: [2, B, heads, N]."""
    out = _tokens_first(q)
    if _implementation(q, kernels) == "triton":
        from fastlocal.kernels import attention_triton

        return out, attention_triton.forward(q, k, v, bias, scale, out)
    out.copy_(_multiply(_probabilities(q, k, bias, scale), _of_every_head(v, q)))
    return out, q.new_zeros(2, *q.shape[:3], dtype=_accumulate_dtype(q.dtype))  # computed again in the backward


def _fake(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, kernels: dispatch.Choice
) -> tuple[Tensor, Tensor]:
    return _tokens_first(q), q.new_empty(2, *q.shape[:3], dtype=_accumulate_dtype(q.dtype))


def _run_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    statistics: Tensor,
    scale: float,
    kernels: dispatch.Choice,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and bias; the last is empty unless needed."""
    d_q, d_k, d_v, d_bias = _fake_backward(d_out, q, k, v, bias, out, statistics, scale, kernels, needs_bias)
    if _implementation(q, kernels) == "triton":
        from fastlocal.kernels import attention_triton

        attention_triton.backward(d_out, q, k, v, bias, out, statistics, scale, d_q, d_k, d_v, d_bias)
        return d_q, d_k, d_v, d_bias
    probabilities = _probabilities(q, k, bias, scale)
    d_v.copy_(_of_every_group(_multiply(probabilities.mT, d_out), v))
    d_scores = _multiply(d_out, _of_every_head(v, q).mT)
    d_scores -= (d_out.to(d_scores.dtype) * out.to(d_scores.dtype)).sum(-1, keepdim=True)
    d_scores *= probabilities
    if needs_bias:
        d_bias.copy_(d_scores.sum_to_size(d_bias.shape))
    d_scores *= scale
    d_q.copy_(_multiply(d_scores, _of_every_head(k, q)))
    d_k.copy_(_of_every_group(_multiply(d_scores.mT, q), k))
    return d_q, d_k, d_v, d_bias


def _fake_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    statistics: Tensor,
    scale: float,
    kernels: dispatch.Choice,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_bias = q.new_empty(0)
    if bias is not None and needs_bias:
        d_bias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    return _tokens_first(q), _tokens_first(k), _tokens_first(v), d_bias


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, ctx.scale, ctx.kernels = inputs
    ctx.save_for_backward(q, k, v, bias, *output)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, d_out: Tensor | None, d_statistics: None) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * 6
    needs_bias = ctx.needs_input_grad[3]
    *gradients, d_bias = _backward(d_out, *ctx.saved_tensors, ctx.scale, ctx.kernels, needs_bias)
    return *gradients, d_bias if needs_bias else None, None, None


_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? bias"

_backward = register(
    f"attention_backward(Tensor d_out, {_TENSORS}, Tensor out, Tensor statistics, float scale, str kernels, "
    "bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_forward = register(
    f"attention({_TENSORS}, float scale, str kernels) -> (Tensor, Tensor)",
    _run,
    _fake,
    setup_context=_setup_context,
    backward=_autograd,
)


# Counted as torch counts scaled_dot_product_attention: two products forward, five backward.
@register_flop_formula(torch.ops.fastlocal.attention)
def _forward_flops(q: torch.Size, k: torch.Size, *args: object, **kwargs: object) -> int:
    batch, heads, queries, head_dim = q
    return 4 * batch * heads * queries * k[2] * head_dim


@register_flop_formula(torch.ops.fastlocal.attention_backward)
def _backward_flops(d_out: torch.Size, q: torch.Size, k: torch.Size, *args: object, **kwargs: object) -> int:
    return _forward_flops(q, k) * 5 // 2


def _implementation(q: Tensor, kernels: dispatch.Choice) -> str:
    if q.dtype == torch.float64:
        return "reference"
    return dispatch.implementation(q.device, choice=kernels)


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# --- Reference --------------------------------------------------------------------------------------------------------


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """The matrix product in the accumulation dtype, whatever autocast says."""
    dtype = _accumulate_dtype(torch.promote_types(left.dtype, right.dtype))
    with torch.autocast(left.device.type, enabled=False):
        return left.to(dtype) @ right.to(dtype)


def _of_every_head(shared: Tensor, q: Tensor) -> Tensor:
    """Keys or values [B, groups, M, D] as [B, heads, M, D]."""
    return shared.repeat_interleave(q.shape[1] // shared.shape[1], 1)


def _of_every_group(gradient: Tensor, shared: Tensor) -> Tensor:
    """The sum of [B, heads, M, D] over the heads that share a group: [B, groups, M, D]."""
    return gradient.unflatten(1, (shared.shape[1], -1)).sum(2)


def _probabilities(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """softmax(scale · q kᵀ + bias), zeros where every score is −inf."""
    scores = _multiply(q, _of_every_head(k, q).mT) * scale
    if bias is None:
        return scores.softmax(-1)
    scores = scores.masked_fill_(~bias, -math.inf) if bias.dtype == torch.bool else scores.add_(bias)
    return scores.softmax(-1).masked_fill_((scores == -math.inf).all(-1, keepdim=True), 0)
