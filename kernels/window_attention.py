"""Shifted-window attention with relative position bias, straight from and to the un-partitioned grid.

Roll, partition, mask, bias, softmax and their reverse are one op that reads qkv once and writes the output once; the
backward saves nothing but its inputs. Reads from the public function down to the PyTorch reference; the Triton kernels
are in `window_attention_triton`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastlocal.kernels import dispatch
from fastlocal.kernels.registration import autocast_dtype, register, without_autocast

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAXIMUM_HEAD_DIM = 128
MAXIMUM_HEAD_DIM_FLOAT32 = 32  # of the Triton kernels: wider ones would need more shared memory than cards have
NORMALIZATION_EPS = 1e-12  # of a length, as F.normalize has it
MASKED = -100.0  # added, as timm does, between tokens that only the cyclic shift brought together


def window_attention(
    qkv: Tensor,
    bias_table: Tensor,
    *,
    num_heads: int,
    window_size: int | tuple[int, int],
    shift: int | tuple[int, int],
    scale: float | None = None,
    logit_scale: Tensor | None = None,
) -> Tensor:
    """``softmax(scale · q kᵀ + bias + mask) v`` within each window of the grid rolled by ``-shift``, rolled back.

    Equal to timm's ``SwinTransformerBlock._attn`` between its qkv and its output projection, and with ``logit_scale`` to
    ``SwinTransformerV2Block._attn``, whose scores are cosines.

    Args:
        qkv: [B, H, W, 3C], the qkv projection of the un-partitioned, un-shifted grid: q, k, v one after the other, each
            ``num_heads`` × (C / num_heads). float16, bfloat16, float32 or float64, any strides (other than contiguous
            costs a copy); at most 128 channels per head; fewer than 2**31 elements per image, any number in the batch.
            Under autocast it is cast to autocast's dtype. Softmax and sums are float32; float64 always runs the PyTorch
            reference, and in float64; the Triton kernels take float32 with at most 32 channels per head.
        bias_table: [(2h − 1)(2w − 1), num_heads] for windows of h × w, any of these dtypes: entry
            ``(row_q − row_k + h − 1)(2w − 1) + column_q − column_k + w − 1`` is added to the scaled score of q and k.
            Its gradient is summed in float32, in a fixed order, and rounded once. A query whose biases are all −inf
            gets zeros.
        window_size: side of the windows, or (h, w). H and W must be multiples of it: where timm
            pads, pad the grid *before* the qkv projection, as `accelerate` does, so that pad tokens carry its bias.
        shift: of the grid before partition, or (rows, columns), 0 ≤ shift < window_size. Scores between tokens that the
            shift brought together over an edge get −100, as in timm.
        scale: default ``(C / num_heads) ** -0.5``.
        logit_scale: [num_heads], any of these dtypes: each head's scale, and q and k are divided by their lengths (at
            least 1e-12, as `torch.nn.functional.normalize` does). Its gradient is summed as the table's is. Takes the
            place of ``scale``.

    Returns:
        [B, H, W, C], contiguous, in the dtype of qkv. Differentiable once, in reverse mode, under torch.func too.

    Source: Liu et al., "Swin Transformer" (arXiv 2103.14030).

    Raises:
        ValueError: an argument's shape, dtype or device is not one of the above.
        RuntimeError: kernels="triton" was asked for and cannot run here.
    """
    window_h, window_w = _pair("window_size", window_size)
    shift_h, shift_w = _pair("shift", shift)
    _check(qkv, bias_table, logit_scale, num_heads, (window_h, window_w), (shift_h, shift_w))
    if scale is not None and logit_scale is not None:
        raise ValueError(f"scale must not be given beside logit_scale, which takes its place, got {scale}.")
    if scale is None:
        scale = (qkv.shape[-1] // (3 * num_heads)) ** -0.5
    elif isinstance(scale, Tensor):
        raise ValueError("scale must be a number, which gets no gradient, got a tensor: multiply q by a learnt scale.")
    # The autocast rule. Not torch.library's: that would also cast the table, and round its gradient's sum with it.
    if (autocast := autocast_dtype(qkv.device)) is not None and qkv.dtype != torch.float64:
        qkv = qkv.to(autocast)
    return _forward(
        qkv, bias_table, logit_scale, num_heads, window_h, window_w, shift_h, shift_w, scale, dispatch.choice()
    )


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(side, int) for side in pair):
        raise ValueError(f"{name} must be an integer or a pair of them, got {value!r}.")
    return pair[0], pair[1]


def _check(
    qkv: Tensor,
    bias_table: Tensor,
    logit_scale: Tensor | None,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
) -> None:
    if qkv.ndim != 4 or qkv.numel() == 0:
        raise ValueError(f"qkv must be [B, H, W, 3C] with no empty dimension, got {list(qkv.shape)}.")
    if qkv.dtype not in DTYPES:
        raise ValueError(f"qkv must be float16, bfloat16, float32 or float64, got {qkv.dtype}.")
    _, height, width, channels = qkv.shape
    if num_heads < 1 or channels % (3 * num_heads) or channels // (3 * num_heads) > MAXIMUM_HEAD_DIM:
        raise ValueError(
            f"num_heads must divide qkv's last dimension 3C = {channels} into q, k and v of at most {MAXIMUM_HEAD_DIM} "
            f"channels per head, got {num_heads}."
        )
    if min(window) < 1:
        raise ValueError(f"window_size must be at least 1 × 1, got {window[0]} × {window[1]}.")
    if height % window[0] or width % window[1]:
        raise ValueError(
            f"qkv's grid must be a multiple of window_size = {window[0]} × {window[1]}, got {height} × {width}; pad "
            "the tokens before their qkv projection."
        )
    if not all(0 <= by < side for by, side in zip(shift, window, strict=True)):
        raise ValueError(f"shift must be from 0 to less than window_size = {window}, got {shift}.")
    if height * width * channels >= 2**31:
        raise ValueError(f"qkv must have fewer than 2**31 elements per image, got {height} × {width} × {channels}.")
    expected = [(2 * window[0] - 1) * (2 * window[1] - 1), num_heads]
    if list(bias_table.shape) != expected:
        raise ValueError(
            f"bias_table must be [(2h − 1)(2w − 1), num_heads] = {expected}, got {list(bias_table.shape)}."
        )
    if logit_scale is not None and list(logit_scale.shape) != [num_heads]:
        raise ValueError(f"logit_scale must be [num_heads] = [{num_heads}], got {list(logit_scale.shape)}.")
    for name, tensor in (("bias_table", bias_table), ("logit_scale", logit_scale)):
        if tensor is not None and tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}.")
        if tensor is not None and tensor.device != qkv.device:
            raise ValueError(f"{name} must be on qkv's device, {qkv.device}, got {tensor.device}.")


# --- Registration -----------------------------------------------------------------------------------------------------


_GEOMETRY = "int num_heads, int window_h, int window_w, int shift_h, int shift_w, float scale, str kernels"


def _run(
    qkv: Tensor,
    bias_table: Tensor,
    logit_scale: Tensor | None,
    num_heads: int,
    window_h: int,
    window_w: int,
    shift_h: int,
    shift_w: int,
    scale: float,
    kernels: dispatch.Choice,
) -> Tensor:
    window, shift = (window_h, window_w), (shift_h, shift_w)
    if _implementation(qkv, num_heads, kernels) == "triton":
        from fastlocal.kernels import window_attention_triton

        return window_attention_triton.forward(qkv, bias_table, logit_scale, num_heads, window, shift, scale)
    with without_autocast(qkv.device):
        return _reference(qkv, bias_table, logit_scale, num_heads, window, shift, scale)


def _fake(qkv: Tensor, *_: object) -> Tensor:
    return qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))


def _run_backward(
    d_out: Tensor,
    qkv: Tensor,
    bias_table: Tensor,
    logit_scale: Tensor | None,
    num_heads: int,
    window_h: int,
    window_w: int,
    shift_h: int,
    shift_w: int,
    scale: float,
    kernels: dispatch.Choice,
    needs_table: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, bias_table and logit_scale; the second is empty unless needed, the third without logit_scale."""
    window, shift = (window_h, window_w), (shift_h, shift_w)
    if _implementation(qkv, num_heads, kernels) == "triton":
        from fastlocal.kernels import window_attention_triton

        d_qkv, d_table, d_scale = window_attention_triton.backward(
            d_out, qkv, bias_table, logit_scale, num_heads, window, shift, scale, needs_table
        )
    else:
        with without_autocast(qkv.device):
            d_qkv, d_table, d_scale = _reference_backward(
                d_out, qkv, bias_table, logit_scale, num_heads, window, shift, scale, needs_table
            )
    return d_qkv, d_table, d_scale if logit_scale is None else d_scale.to(logit_scale.dtype)


def _fake_backward(
    d_out: Tensor, qkv: Tensor, bias_table: Tensor, logit_scale: Tensor | None, *geometry: object
) -> tuple[Tensor, Tensor, Tensor]:
    d_table = bias_table.new_empty(bias_table.shape if geometry[-1] else 0)
    d_scale = qkv.new_empty(0, dtype=torch.float32) if logit_scale is None else logit_scale.new_empty(logit_scale.shape)
    return qkv.new_empty(qkv.shape), d_table, d_scale


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    qkv, bias_table, logit_scale, *ctx.geometry = inputs
    ctx.save_for_backward(qkv, bias_table, logit_scale)


def _autograd(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:3]
    gradients = _backward(d_out, *ctx.saved_tensors, *ctx.geometry, needed[1])
    return *(d if need else None for d, need in zip(gradients, needed, strict=True)), *([None] * len(ctx.geometry))


_TENSORS = "Tensor qkv, Tensor bias_table, Tensor? logit_scale"

_backward = register(
    f"window_attention_backward(Tensor d_out, {_TENSORS}, {_GEOMETRY}, bool needs_table) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_forward = register(
    f"window_attention({_TENSORS}, {_GEOMETRY}) -> Tensor",
    _run,
    _fake,
    setup_context=_setup_context,
    backward=_autograd,
)


# Counted as torch counts scaled_dot_product_attention: two products forward, five backward.
@register_flop_formula(torch.ops.fastlocal.window_attention)
def _forward_flops(
    qkv: torch.Size,
    bias_table: torch.Size,
    logit_scale: torch.Size | None,
    num_heads: int,
    window_h: int,
    window_w: int,
    *args: object,
    **_: object,
) -> int:
    return 4 * math.prod(qkv) // 3 * window_h * window_w


@register_flop_formula(torch.ops.fastlocal.window_attention_backward)
def _backward_flops(d_out: torch.Size, *args: torch.Size, **_: object) -> int:
    return _forward_flops(*args) * 5 // 2  # type: ignore[arg-type]  # the arguments of the op, as torch hands them over


def _implementation(qkv: Tensor, num_heads: int, kernels: dispatch.Choice) -> str:
    if qkv.dtype == torch.float64:
        return "reference"
    head_dim = qkv.shape[3] // (3 * num_heads)
    limit = None
    if qkv.dtype == torch.float32 and head_dim > MAXIMUM_HEAD_DIM_FLOAT32 and not dispatch.interpreting():
        limit = f"window_attention's take at most {MAXIMUM_HEAD_DIM_FLOAT32} channels per float32 head, not {head_dim}."
    return dispatch.implementation(qkv.device, limit, kernels)


# --- Reference --------------------------------------------------------------------------------------------------------


def _reference(
    qkv: Tensor,
    bias_table: Tensor,
    logit_scale: Tensor | None,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
) -> Tensor:
    q, k, v = _partition(qkv, window, shift, 3 * num_heads).chunk(3, dim=2)
    scales: float | Tensor = scale
    if logit_scale is not None:
        scales, q, k = logit_scale.view(-1, 1, 1), F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    p = _probabilities(q, k, bias_table, qkv.shape[1:3], window, shift, scales)
    return _reverse(p.to(v.dtype) @ v, window, shift, qkv.shape[1:3])


def _reference_backward(
    d_out: Tensor,
    qkv: Tensor,
    bias_table: Tensor,
    logit_scale: Tensor | None,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
    needs_table: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grid = qkv.shape[1:3]
    whole_q, whole_k, v = _partition(qkv, window, shift, 3 * num_heads).chunk(3, dim=2)
    d_mixed = _partition(d_out, window, shift, num_heads)
    q, k = whole_q, whole_k
    scales: float | Tensor = scale
    if logit_scale is not None:
        scales, q, k = logit_scale.view(-1, 1, 1), F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    p = _probabilities(q, k, bias_table, grid, window, shift, scales)
    d_v = p.to(v.dtype).mT @ d_mixed
    d_p = _multiply(d_mixed, v.mT)
    d_scores = p * (d_p - (p * d_p).sum(-1, keepdim=True))
    d_bias_table = bias_table.new_empty(0)
    if needs_table:
        d_bias_table = _sum_by_relative_position(d_scores.sum((0, 1)), window).to(bias_table.dtype)
    if logit_scale is None:
        d_scores = (d_scores * scale).to(q.dtype)
        d_q, d_k, d_scale = d_scores @ k, d_scores.mT @ q, d_scores.new_empty(0)
    else:
        d_q = _multiply(d_scores, k)
        d_scale = (d_q * q).sum((0, 1, 3, 4))  # a score is its scale times q · k
        d_q = _gradient_of_rows(d_q * scales, q, whole_q)
        d_k = _gradient_of_rows(_multiply(d_scores.mT, q) * scales, k, whole_k)
    return _reverse(torch.cat([d_q, d_k, d_v], 2), window, shift, grid), d_bias_table, d_scale


def _gradient_of_rows(d_unit: Tensor, unit: Tensor, rows: Tensor) -> Tensor:
    """The gradient of ``rows`` from that of their unit vectors."""
    across = d_unit - unit * (d_unit * unit).sum(-1, keepdim=True)
    return (across / rows.to(across.dtype).norm(dim=-1, keepdim=True).clamp_min(NORMALIZATION_EPS)).to(rows.dtype)


def _probabilities(
    q: Tensor,
    k: Tensor,
    bias_table: Tensor,
    grid: torch.Size,
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float | Tensor,
) -> Tensor:
    """[B, windows, heads, tokens, tokens], in float32 at least; zeros for a query whose biases are all −inf."""
    scores = _multiply(q, k.mT) * scale
    bias = bias_table[_relative_position(window, q.device)].permute(2, 0, 1)
    scores += bias
    if any(shift):
        sides = _sides(grid, window, shift, q.device)
        scores += MASKED * (sides[:, None, :, None] != sides[:, None, None, :])
    return scores.softmax(-1).masked_fill_((bias == -math.inf).all(-1, keepdim=True), 0)


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """The product in float32 at least: scores of float16 queries and keys may exceed its range."""
    if left.is_cuda and left.dtype.itemsize == 2:
        product = torch.bmm(left.flatten(0, -3), right.flatten(0, -3), out_dtype=torch.float32)
        return product.unflatten(0, left.shape[:-2])
    dtype = torch.promote_types(left.dtype, torch.float32)
    return left.to(dtype) @ right.to(dtype)


def _partition(x: Tensor, window: tuple[int, int], shift: tuple[int, int], heads: int) -> Tensor:
    """[B, H, W, heads · D] -> [B, windows, heads, tokens, D] of the shifted grid."""
    (height, width), (down, across) = window, (x.shape[1] // window[0], x.shape[2] // window[1])
    x = x.roll((-shift[0], -shift[1]), (1, 2)).unflatten(3, (heads, -1))
    x = x.unflatten(2, (across, width)).unflatten(1, (down, height))  # B, down, height, across, width, heads, D
    return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(1, 2)


def _reverse(x: Tensor, window: tuple[int, int], shift: tuple[int, int], grid: torch.Size) -> Tensor:
    """The inverse of `_partition`, contiguous."""
    down, across = grid[0] // window[0], grid[1] // window[1]
    x = x.unflatten(3, window).unflatten(1, (down, across))  # B, down, across, heads, height, width, D
    x = x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4).flatten(1, 2)
    return x.roll(shift, (1, 2))


def _relative_position(window: tuple[int, int], device: torch.device) -> Tensor:
    """[tokens, tokens]: the entry of the bias table for each pair of query and key."""
    token = torch.arange(window[0] * window[1], device=device)
    row, column = token // window[1], token % window[1]
    down, across = row[:, None] - row + window[0] - 1, column[:, None] - column + window[1] - 1
    return down * (2 * window[1] - 1) + across


def _sum_by_relative_position(d_bias: Tensor, window: tuple[int, int]) -> Tensor:
    """[heads, tokens, tokens] -> [entries, heads]. By gathering: CUDA's index_add adds in any order."""
    height, width = window
    key = torch.arange(height * width, device=d_bias.device)
    entry = torch.arange((2 * height - 1) * (2 * width - 1), device=d_bias.device)[:, None]
    row = key // width + entry // (2 * width - 1) - (height - 1)
    column = key % width + entry % (2 * width - 1) - (width - 1)
    pair = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    query = (row * width + column) * pair
    return (d_bias[:, query, key] * pair).sum(-1).T.contiguous()


def _sides(grid: torch.Size, window: tuple[int, int], shift: tuple[int, int], device: torch.device) -> Tensor:
    """[windows, tokens]: on which side of the shift's two seams each token of the shifted grid lies."""
    below = torch.arange(grid[0], device=device) >= grid[0] - shift[0]
    right = torch.arange(grid[1], device=device) >= grid[1] - shift[1]
    sides = below[:, None] + 2 * right
    return _partition(sides[None, :, :, None], window, (0, 0), 1)[0, :, 0, :, 0]
