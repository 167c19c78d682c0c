"""The Triton kernels of `fastlocal.kernels.window_attention`; imported when one is first asked for.

One program owns one head (and, of a window too large for its registers, one tile of it) and walks over a slice of the
windows. For each window it loads q, k and v straight from the un-partitioned grid; the relative position bias is read
from the table by computed index; scores live in registers, so nothing but the output is written.

The backward recomputes the probabilities. dS is summed over a slice of the windows in registers and written once: the
bias gradient is the ordered sum of those partial sums, without atomics. A window of one tile takes one kernel and five
products; larger ones take three kernels, since d_q sums over keys, d_k and d_v over queries, and d_bias over windows.

Probabilities are at most 1 by construction, however large the scores: ``exp2((score − largest) · log2 e)`` with the
difference rounded first and never positive, times ``1 / total ≤ 1``; both are kept, never their logarithm.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlocal.kernels import dispatch
from fastlocal.kernels.cases import CompileCase, cdiv, launch_options, next_power_of_2

SUM_BLOCKS = {"BLOCK_ENTRIES": 16, "BLOCK_N": 64}  # of `_sum_by_relative_position`

LOG2_E = tl.constexpr(1.4426950408889634)  # the softmax is computed with exp2, which the hardware has
MASKED = tl.constexpr(-100.0)  # added between tokens that only the shift brought together, as timm does
EPS = tl.constexpr(1e-12)  # of a length, as torch.nn.functional.normalize has it
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32: what -inf is compared with, so that no difference is NaN

# --- Pieces. WINDOW and SHIFT are (height, width) pairs known at compile time: dividing is cheap. ---------------


@triton.jit
def _dot(a, b, UPCAST: tl.constexpr):
    """a @ b accumulated in fp32. The interpreter multiplies bf16 wrongly, so there the operands are upcast."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _position(window, height, width, WINDOW: tl.constexpr):
    """A window's image (in 64 bits: a batch may exceed 2**31 elements), and its place in it, counted in windows."""
    window = tl.cast(window, tl.int32)  # a Python integer where the kernel is interpreted
    across = width // WINDOW[1]
    row = window // across
    down = height // WINDOW[0]
    return (row // down).to(tl.int64), row % down, window % across


@triton.jit
def _locate(down, across, token, height, width, WINDOW: tl.constexpr, SHIFT: tl.constexpr):
    """Where each token of a window lies in its image's grid, before the cyclic shift."""
    row = down * WINDOW[0] + token // WINDOW[1] + SHIFT[0]
    column = across * WINDOW[1] + token % WINDOW[1] + SHIFT[1]
    return tl.where(row >= height, row - height, row) * width + tl.where(column >= width, column - width, column)


@triton.jit
def _mask(scores, down, across, query, key, height, width, WINDOW: tl.constexpr, SHIFT: tl.constexpr):
    """``scores`` with `MASKED` added between tokens on different sides of the seams that the cyclic shift left."""
    if SHIFT[0] + SHIFT[1] > 0:
        seams = (down == height // WINDOW[0] - 1).to(tl.int32) + 2 * (across == width // WINDOW[1] - 1).to(tl.int32)
        if seams != 0:  # 1: the horizontal one runs through this window, 2: the vertical one, 3: both
            scores += tl.where(_side(seams, query, WINDOW, SHIFT) == _side(seams, key, WINDOW, SHIFT), 0.0, MASKED)
    return scores


@triton.jit
def _side(seams, token, WINDOW: tl.constexpr, SHIFT: tl.constexpr):
    """On which side of its window's seams each token lies."""
    below = (token >= (WINDOW[0] - SHIFT[0]) * WINDOW[1]).to(tl.int32)
    right = (token % WINDOW[1] >= WINDOW[1] - SHIFT[1]).to(tl.int32)
    return (below + 2 * right) & seams


@triton.jit
def _relative_position_bias(bias_table, entry_stride, query, key, WINDOW: tl.constexpr):
    """One head's bias between queries and keys (broadcast together); -inf for keys beyond the window."""
    TOKENS: tl.constexpr = WINDOW[0] * WINDOW[1]
    CENTER: tl.constexpr = (WINDOW[0] - 1) * (2 * WINDOW[1] - 1) + WINDOW[1] - 1  # the entry of a token and itself
    entry = _table_place(query, WINDOW) - _table_place(key, WINDOW) + CENTER
    bias = tl.load(bias_table + entry * entry_stride, mask=(query < TOKENS) & (key < TOKENS), other=0.0)
    return tl.where(key < TOKENS, bias.to(tl.float32), float("-inf"))


@triton.jit
def _table_place(token, WINDOW: tl.constexpr):
    """Differences of these are distances between entries of the table."""
    return token // WINDOW[1] * (2 * WINDOW[1] - 1) + token % WINDOW[1]


@triton.jit
def _load(rows, location, inside, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """One head of the tokens at ``location``, [tokens, BLOCK_D]; zero outside the window and beyond the head."""
    channel = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (channel < HEAD_DIM)[None, :]
    return tl.load(rows + location[:, None] * STRIDE + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _load_unit(
    rows, location, inside, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, COSINE: tl.constexpr
):
    """What `_load` loads, for cosine attention with every row divided by its length."""
    value = _load(rows, location, inside, STRIDE, HEAD_DIM, BLOCK_D)
    if COSINE:
        value = (value.to(tl.float32) * _inverse_length(value)[:, None]).to(value.dtype)
    return value


@triton.jit
def _inverse_length(value):
    value = value.to(tl.float32)
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(value * value, 1)), EPS)


@triton.jit
def _store_gradient(
    rows, source, value, unit, location, inside,
    STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """The gradient of the rows at ``source``, of which ``value`` is the gradient; of their ``unit`` vectors, if cosine."""
    if COSINE:
        unit = unit.to(tl.float32)
        inverse = _inverse_length(_load(source, location, inside, STRIDE, HEAD_DIM, BLOCK_D))
        value = (value - unit * tl.sum(value * unit, 1)[:, None]) * inverse[:, None]
    _store(rows, value, location, inside, STRIDE, HEAD_DIM, BLOCK_D)


@triton.jit
def _store(rows, value, location, inside, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    channel = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (channel < HEAD_DIM)[None, :]
    tl.store(rows + location[:, None] * STRIDE + channel[None, :], value.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def _probability(scores, largest, inverse):
    """At most 1: computed again, maybe transposed, a score may exceed its row's largest by rounding. NaN stays NaN."""
    return tl.exp2(tl.minimum(scores - largest, 0.0, propagate_nan=tl.PropagateNan.ALL) * LOG2_E) * inverse


@triton.jit
def _store_partial(d_bias, value, query, key, WINDOW: tl.constexpr, HEADS: tl.constexpr, PITCH: tl.constexpr):
    """A tile of this slice's and head's sum. Rows are whole tiles wide: whole vectors to store."""
    TOKENS: tl.constexpr = WINDOW[0] * WINDOW[1]
    partial = d_bias + (tl.program_id(1) * HEADS + tl.program_id(0)).to(tl.int64) * (TOKENS * PITCH)
    tl.store(partial + query[:, None] * PITCH + key[None, :], value, mask=(query < TOKENS)[:, None])


# --- Kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["windows", "height", "width"])
def _forward(
    qkv, bias_table, logit_scale, out,
    windows, height, width, entry_stride, head_stride, scale,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, COSINE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out, for one tile of BLOCK_M queries of each window: an online softmax over tiles of BLOCK_N keys.

    Where one tile holds all keys, the bias is the same for every window and read once.
    """
    TOKENS: tl.constexpr = WINDOW[0] * WINDOW[1]
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM
    head = tl.program_id(0)
    table = bias_table + head * head_stride
    if COSINE:
        scale = tl.load(logit_scale + head)
    query = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    bias = _relative_position_bias(table, entry_stride, query[:, None], tl.arange(0, BLOCK_N)[None, :], WINDOW)

    for window in range(tl.program_id(1), windows, tl.num_programs(1)):
        image, down, across = _position(window, height, width, WINDOW)
        q_at = _locate(down, across, query, height, width, WINDOW, SHIFT)
        source = qkv + image * (height * width * 3 * CHANNELS) + head * HEAD_DIM
        q = _load_unit(source, q_at, query < TOKENS, 3 * CHANNELS, HEAD_DIM, BLOCK_D, COSINE)
        largest = tl.full((BLOCK_M,), LOWEST, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

        for start in range(0, TOKENS, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            k_at = _locate(down, across, key, height, width, WINDOW, SHIFT)
            k = _load_unit(source + CHANNELS, k_at, key < TOKENS, 3 * CHANNELS, HEAD_DIM, BLOCK_D, COSINE)
            v = _load(source + 2 * CHANNELS, k_at, key < TOKENS, 3 * CHANNELS, HEAD_DIM, BLOCK_D)
            if BLOCK_N < TOKENS:
                bias = _relative_position_bias(table, entry_stride, query[:, None], key[None, :], WINDOW)
            scores = _dot(q, tl.trans(k), UPCAST) * scale + bias
            scores = _mask(scores, down, across, query[:, None], key[None, :], height, width, WINDOW, SHIFT)
            larger = tl.maximum(largest, tl.max(scores, 1))
            p = tl.exp2((scores - larger[:, None]) * LOG2_E)
            rescale = tl.exp2((largest - larger) * LOG2_E)
            total = total * rescale + tl.sum(p, 1)
            mixed = mixed * rescale[:, None] + _dot(p.to(v.dtype), v, UPCAST)
            largest = larger

        mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]  # 0 where all scores are -inf
        target = out + image * (height * width * CHANNELS) + head * HEAD_DIM
        _store(target, mixed, q_at, query < TOKENS, CHANNELS, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["windows", "height", "width"])
def _backward(
    d_out, qkv, bias_table, logit_scale, d_qkv, d_bias, d_logit_scale,
    windows, height, width, entry_stride, head_stride, scale,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, COSINE: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Every gradient of windows that one tile holds; d_bias summed over this program's windows."""
    TOKENS: tl.constexpr = WINDOW[0] * WINDOW[1]
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM
    head = tl.program_id(0)
    query = tl.arange(0, BLOCK_M)
    key = tl.arange(0, BLOCK_N)
    table = bias_table + head * head_stride
    if COSINE:
        scale = tl.load(logit_scale + head)
    bias = _relative_position_bias(table, entry_stride, query[:, None], key[None, :], WINDOW)
    if BIAS_GRADIENT:
        d_bias_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if COSINE:
        d_scale_sum = 0.0

    for window in range(tl.program_id(1), windows, tl.num_programs(1)):
        image, down, across = _position(window, height, width, WINDOW)
        q_at = _locate(down, across, query, height, width, WINDOW, SHIFT)
        k_at = _locate(down, across, key, height, width, WINDOW, SHIFT)
        source = qkv + image * (height * width * 3 * CHANNELS) + head * HEAD_DIM
        target = d_qkv + image * (height * width * 3 * CHANNELS) + head * HEAD_DIM
        d_rows = d_out + image * (height * width * CHANNELS) + head * HEAD_DIM
        q = _load_unit(source, q_at, query < TOKENS, 3 * CHANNELS, HEAD_DIM, BLOCK_D, COSINE)
        k = _load_unit(source + CHANNELS, k_at, key < TOKENS, 3 * CHANNELS, HEAD_DIM, BLOCK_D, COSINE)
        d_mixed = _load(d_rows, q_at, query < TOKENS, CHANNELS, HEAD_DIM, BLOCK_D)

        scores = _dot(q, tl.trans(k), UPCAST) * scale + bias
        scores = _mask(scores, down, across, query[:, None], key[None, :], height, width, WINDOW, SHIFT)
        largest = tl.maximum(tl.max(scores, 1), LOWEST)
        p = tl.exp2((scores - largest[:, None]) * LOG2_E)
        total = tl.sum(p, 1)
        p *= (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]  # 0 where all scores are -inf

        # Each product is stored before the next begins, and v is loaded late: registers are what this kernel lacks.
        d_v = _dot(tl.trans(p.to(q.dtype)), d_mixed, UPCAST)
        _store(target + 2 * CHANNELS, d_v, k_at, key < TOKENS, 3 * CHANNELS, HEAD_DIM, BLOCK_D)
        v = _load(source + 2 * CHANNELS, k_at, key < TOKENS, 3 * CHANNELS, HEAD_DIM, BLOCK_D)
        d_p = _dot(d_mixed, tl.trans(v), UPCAST)
        d_scores = p * (d_p - tl.sum(p * d_p, 1)[:, None])
        if BIAS_GRADIENT:
            d_bias_sum += d_scores
        d_scores = d_scores.to(q.dtype)
        d_q = _dot(d_scores, k, UPCAST)
        if COSINE:
            d_scale_sum += tl.sum(d_q * q.to(tl.float32))  # a score is its scale times q · k
        _store_gradient(target, source, d_q * scale, q, q_at, query < TOKENS, 3 * CHANNELS, HEAD_DIM, BLOCK_D, COSINE)
        d_k = _dot(tl.trans(d_scores), q, UPCAST) * scale
        _store_gradient(
            target + CHANNELS, source + CHANNELS, d_k, k, k_at, key < TOKENS, 3 * CHANNELS, HEAD_DIM, BLOCK_D, COSINE
        )

    if COSINE:
        tl.store(d_logit_scale + tl.program_id(1) * HEADS + head, d_scale_sum)
    if BIAS_GRADIENT:
        _store_partial(d_bias, d_bias_sum, query, key, WINDOW, HEADS, BLOCK_N)


# Windows of several tiles: three kernels, of which each owns what it writes, as in `attention_triton`.


@triton.jit(do_not_specialize=["windows", "height", "width"])
def _backward_queries(
    d_out, qkv, bias_table, logit_scale, d_qkv, d_logit_scale, row_largest, row_inverse, row_delta,
    windows, height, width, entry_stride, head_stride, scale,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, COSINE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """d_q of one tile of BLOCK_M queries, and for the next two kernels each row's largest score, 1 / total and delta.

    Twice over the keys: an online softmax that also averages d_p (delta), then d_q.
    """
    TOKENS: tl.constexpr = WINDOW[0] * WINDOW[1]
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM
    head = tl.program_id(0)
    table = bias_table + head * head_stride
    if COSINE:
        scale = tl.load(logit_scale + head)
    query = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    if COSINE:
        d_scale_sum = 0.0

    for window in range(tl.program_id(1), windows, tl.num_programs(1)):
        image, down, across = _position(window, height, width, WINDOW)
        q_at = _locate(down, across, query, height, width, WINDOW, SHIFT)
        source = qkv + image * (height * width * 3 * CHANNELS) + head * HEAD_DIM
        target = d_qkv + image * (height * width * 3 * CHANNELS) + head * HEAD_DIM
        d_rows = d_out + image * (height * width * CHANNELS) + head * HEAD_DIM
        q = _load_unit(source, q_at, query < TOKENS, 3 * CHANNELS, HEAD_DIM, BLOCK_D, COSINE)
        d_mixed = _load(d_rows, q_at, query < TOKENS, CHANNELS, HEAD_DIM, BLOCK_D)

        largest = tl.full((BLOCK_M,), LOWEST, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        delta = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, TOKENS, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            k_at = _locate(down, across, key, height, width, WINDOW, SHIFT)
            k = _load_unit(source + CHANNELS, k_at, key < TOKENS, 3 * CHANNELS, HEAD_DIM, BLOCK_D, COSINE)
            v = _load(source + 2 * CHANNELS, k_at, key < TOKENS, 3 * CHANNELS, HEAD_DIM, BLOCK_D)
            scores = _dot(q, tl.trans(k), UPCAST) * scale
            scores += _relative_position_bias(table, entry_stride, query[:, None], key[None, :], WINDOW)
            scores = _mask(scores, down, across, query[:, None], key[None, :], height, width, WINDOW, SHIFT)
            larger = tl.maximum(largest, tl.max(scores, 1))
            p = tl.exp2((scores - larger[:, None]) * LOG2_E)
            rescale = tl.exp2((largest - larger) * LOG2_E)
            total = total * rescale + tl.sum(p, 1)
            delta = delta * rescale + tl.sum(p * _dot(d_mixed, tl.trans(v), UPCAST), 1)
            largest = larger
        inverse = 1.0 / tl.where(total == 0.0, 1.0, total)  # 0 where all scores are -inf
        delta *= inverse
        row = (tl.cast(window, tl.int64) * HEADS + head) * TOKENS + query
        tl.store(row_largest + row, largest, mask=query < TOKENS)
        tl.store(row_inverse + row, inverse, mask=query < TOKENS)
        tl.store(row_delta + row, delta, mask=query < TOKENS)

        d_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for start in range(0, TOKENS, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            k_at = _locate(down, across, key, height, width, WINDOW, SHIFT)
            k = _load_unit(source + CHANNELS, k_at, key < TOKENS, 3 * CHANNELS, HEAD_DIM, BLOCK_D, COSINE)
            v = _load(source + 2 * CHANNELS, k_at, key < TOKENS, 3 * CHANNELS, HEAD_DIM, BLOCK_D)
            scores = _dot(q, tl.trans(k), UPCAST) * scale
            scores += _relative_position_bias(table, entry_stride, query[:, None], key[None, :], WINDOW)
            scores = _mask(scores, down, across, query[:, None], key[None, :], height, width, WINDOW, SHIFT)
            p = _probability(scores, largest[:, None], inverse[:, None])
            d_scores = p * (_dot(d_mixed, tl.trans(v), UPCAST) - delta[:, None])
            d_q += _dot(d_scores.to(k.dtype), k, UPCAST)
        if COSINE:
            d_scale_sum += tl.sum(d_q * q.to(tl.float32))
        _store_gradient(target, source, d_q * scale, q, q_at, query < TOKENS, 3 * CHANNELS, HEAD_DIM, BLOCK_D, COSINE)

    if COSINE:
        place = (tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)) * HEADS + head
        tl.store(d_logit_scale + place, d_scale_sum)


@triton.jit(do_not_specialize=["windows", "height", "width"])
def _backward_keys(
    d_out, qkv, bias_table, logit_scale, d_qkv, row_largest, row_inverse, row_delta,
    windows, height, width, entry_stride, head_stride, scale,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, COSINE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """d_k and d_v of one tile of BLOCK_N keys. Scores are transposed here, [keys, queries]."""
    TOKENS: tl.constexpr = WINDOW[0] * WINDOW[1]
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM
    head = tl.program_id(0)
    table = bias_table + head * head_stride
    if COSINE:
        scale = tl.load(logit_scale + head)
    key = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)

    for window in range(tl.program_id(1), windows, tl.num_programs(1)):
        image, down, across = _position(window, height, width, WINDOW)
        k_at = _locate(down, across, key, height, width, WINDOW, SHIFT)
        source = qkv + image * (height * width * 3 * CHANNELS) + head * HEAD_DIM
        target = d_qkv + image * (height * width * 3 * CHANNELS) + head * HEAD_DIM
        d_rows = d_out + image * (height * width * CHANNELS) + head * HEAD_DIM
        k = _load_unit(source + CHANNELS, k_at, key < TOKENS, 3 * CHANNELS, HEAD_DIM, BLOCK_D, COSINE)
        v = _load(source + 2 * CHANNELS, k_at, key < TOKENS, 3 * CHANNELS, HEAD_DIM, BLOCK_D)
        d_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        d_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)

        for start in range(0, TOKENS, BLOCK_M):
            query = start + tl.arange(0, BLOCK_M)
            q_at = _locate(down, across, query, height, width, WINDOW, SHIFT)
            q = _load_unit(source, q_at, query < TOKENS, 3 * CHANNELS, HEAD_DIM, BLOCK_D, COSINE)
            d_mixed = _load(d_rows, q_at, query < TOKENS, CHANNELS, HEAD_DIM, BLOCK_D)
            row = (tl.cast(window, tl.int64) * HEADS + head) * TOKENS + query
            largest = tl.load(row_largest + row, mask=query < TOKENS, other=0.0)
            inverse = tl.load(row_inverse + row, mask=query < TOKENS, other=0.0)
            delta = tl.load(row_delta + row, mask=query < TOKENS, other=0.0)
            scores = _dot(k, tl.trans(q), UPCAST) * scale
            scores += _relative_position_bias(table, entry_stride, query[None, :], key[:, None], WINDOW)
            scores = _mask(scores, down, across, query[None, :], key[:, None], height, width, WINDOW, SHIFT)
            p = _probability(scores, largest[None, :], inverse[None, :])
            d_v += _dot(p.to(q.dtype), d_mixed, UPCAST)
            d_scores = p * (_dot(v, tl.trans(d_mixed), UPCAST) - delta[None, :])
            d_k += _dot(d_scores.to(q.dtype), q, UPCAST)

        _store_gradient(
            target + CHANNELS, source + CHANNELS, d_k * scale, k, k_at, key < TOKENS,
            3 * CHANNELS, HEAD_DIM, BLOCK_D, COSINE,
        )  # fmt: skip
        _store(target + 2 * CHANNELS, d_v, k_at, key < TOKENS, 3 * CHANNELS, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["windows", "height", "width"])
def _backward_bias(
    d_out, qkv, bias_table, logit_scale, d_bias, row_largest, row_inverse, row_delta,
    windows, height, width, entry_stride, head_stride, scale,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, COSINE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of d_bias, summed over this program's windows: the tile's scores are computed once more, which takes less
    than adding every window's gradient to a sum in memory."""
    TOKENS: tl.constexpr = WINDOW[0] * WINDOW[1]
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM
    TILES: tl.constexpr = (TOKENS + BLOCK_N - 1) // BLOCK_N
    head = tl.program_id(0)
    table = bias_table + head * head_stride
    if COSINE:
        scale = tl.load(logit_scale + head)
    query = tl.program_id(2) // TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    key = tl.program_id(2) % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    bias = _relative_position_bias(table, entry_stride, query[:, None], key[None, :], WINDOW)
    d_bias_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    for window in range(tl.program_id(1), windows, tl.num_programs(1)):
        image, down, across = _position(window, height, width, WINDOW)
        q_at = _locate(down, across, query, height, width, WINDOW, SHIFT)
        k_at = _locate(down, across, key, height, width, WINDOW, SHIFT)
        source = qkv + image * (height * width * 3 * CHANNELS) + head * HEAD_DIM
        d_rows = d_out + image * (height * width * CHANNELS) + head * HEAD_DIM
        q = _load_unit(source, q_at, query < TOKENS, 3 * CHANNELS, HEAD_DIM, BLOCK_D, COSINE)
        k = _load_unit(source + CHANNELS, k_at, key < TOKENS, 3 * CHANNELS, HEAD_DIM, BLOCK_D, COSINE)
        row = (tl.cast(window, tl.int64) * HEADS + head) * TOKENS + query
        largest = tl.load(row_largest + row, mask=query < TOKENS, other=0.0)
        inverse = tl.load(row_inverse + row, mask=query < TOKENS, other=0.0)
        delta = tl.load(row_delta + row, mask=query < TOKENS, other=0.0)
        scores = _dot(q, tl.trans(k), UPCAST) * scale + bias
        scores = _mask(scores, down, across, query[:, None], key[None, :], height, width, WINDOW, SHIFT)
        p = _probability(scores, largest[:, None], inverse[:, None])
        d_mixed = _load(d_rows, q_at, query < TOKENS, CHANNELS, HEAD_DIM, BLOCK_D)
        v = _load(source + 2 * CHANNELS, k_at, key < TOKENS, 3 * CHANNELS, HEAD_DIM, BLOCK_D)
        d_bias_sum += p * (_dot(d_mixed, tl.trans(v), UPCAST) - delta[:, None])

    _store_partial(d_bias, d_bias_sum, query, key, WINDOW, HEADS, TILES * BLOCK_N)


@triton.jit
def _sum_by_relative_position(
    d_bias,
    d_bias_table,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Each entry of the table is the sum over the pairs at its relative position: at most one pair for each key."""
    TOKENS: tl.constexpr = WINDOW[0] * WINDOW[1]
    ENTRIES: tl.constexpr = (2 * WINDOW[0] - 1) * (2 * WINDOW[1] - 1)
    head = tl.program_id(0)
    entry = tl.program_id(1) * BLOCK_ENTRIES + tl.arange(0, BLOCK_ENTRIES)
    total = tl.zeros((BLOCK_ENTRIES,), tl.float32)
    for start in range(0, TOKENS, BLOCK_N):
        key = (start + tl.arange(0, BLOCK_N))[None, :]
        row = key // WINDOW[1] + (entry // (2 * WINDOW[1] - 1) - (WINDOW[0] - 1))[:, None]
        column = key % WINDOW[1] + (entry % (2 * WINDOW[1] - 1) - (WINDOW[1] - 1))[:, None]
        pair = (row >= 0) & (row < WINDOW[0]) & (column >= 0) & (column < WINDOW[1]) & (key < TOKENS)
        source = d_bias + head.to(tl.int64) * (TOKENS * PITCH) + (row * WINDOW[1] + column) * PITCH + key
        total += tl.sum(tl.load(source, mask=pair, other=0.0), 1)
    tl.store(d_bias_table + entry * HEADS + head, total.to(d_bias_table.dtype.element_ty), mask=entry < ENTRIES)


# --- Launchers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Blocks:
    """How one kernel is cut into programs."""

    queries: int  # BLOCK_M
    keys: int  # BLOCK_N
    num_warps: int
    num_stages: int  # 2 loads the next window, or its next tile, while it works on this one
    resident: int  # programs that one multiprocessor holds at a time, by their registers


def _in_tiles(tokens: int, head_dim: int) -> bool:
    """Whether the backward of a window is too much for the registers of one program."""
    return tokens > 64 or (tokens > 16 and head_dim > 32)


def _blocks(kernel: Any, tokens: int, head_dim: int, dtype: torch.dtype) -> _Blocks:
    """Chosen so that 16-bit tensors spill no register on any supported card; the compile report checks it."""
    row = max(16, next_power_of_2(tokens))
    if dtype == torch.float32:  # no tensor cores, twice the bytes
        side = min(row, 64)
        return _Blocks(side, side, num_warps=1 if side == 16 else 8, num_stages=1, resident=1)
    if row == 16:
        return _Blocks(16, 16, num_warps=1, num_stages=2 if kernel is _forward else 1, resident=12)
    if kernel is _backward:
        return _Blocks(row, row, num_warps=row // 16, num_stages=1, resident=2)
    if kernel is _forward and row <= 64:
        wide = head_dim > 64
        return _Blocks(row, row, num_warps=row // 8 if wide else row // 16, num_stages=2, resident=1 if wide else 3)
    if kernel is _forward:
        # Of windows this large, Triton 3.6 and 3.8 each spill one if its keys are loaded in one stage (on sm_86).
        stages = 2 if tokens > 256 and head_dim <= 32 else 1
        return _Blocks(64, 32, num_warps=4, num_stages=stages, resident=2)
    if kernel is _backward_keys:
        queries, keys = (32, 64) if head_dim <= 32 else (64, 32) if head_dim <= 64 else (32, 32)
        return _Blocks(queries, keys, num_warps=4, num_stages=1, resident=2)
    return _Blocks(64, 64 if head_dim <= 32 else 32, num_warps=8 if head_dim > 64 else 4, num_stages=1, resident=2)


def _constants(
    num_heads: int, head_dim: int, window: tuple[int, int], shift: tuple[int, int], cosine: bool, blocks: _Blocks
) -> dict[str, Any]:
    return {
        "WINDOW": window,
        "SHIFT": shift,
        "HEADS": num_heads,
        "HEAD_DIM": head_dim,
        "COSINE": cosine,
        "BLOCK_M": blocks.queries,
        "BLOCK_N": blocks.keys,
        "BLOCK_D": max(16, next_power_of_2(head_dim)),
        "UPCAST": dispatch.interpreting(),
    }


def _grid(kernel: Any, blocks: _Blocks, qkv: Tensor, num_heads: int, tokens: int) -> tuple[int, int, int]:
    """Heads, slices of the windows, and tiles of a window."""
    rows, columns = cdiv(tokens, blocks.queries), cdiv(tokens, blocks.keys)
    tiles = rows * columns if kernel is _backward_bias else columns if kernel is _backward_keys else rows
    windows = qkv[..., 0].numel() // tokens
    return num_heads, _slices(qkv.device, windows, num_heads * tiles, blocks.resident), tiles


def _slices(device: torch.device, windows: int, programs: int, resident: int) -> int:
    """How many times ``programs`` fill the card, each with as many windows as the next one."""
    processors = 4 if device.type == "cpu" else _processors(device)
    slices = min(windows, cdiv(processors * resident, programs))
    return cdiv(windows, cdiv(windows, slices))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _table(bias_table: Tensor, read_often: bool) -> Tensor:
    """[heads, entries]; each head's entries together where it is read for every window and tile."""
    return bias_table.t().contiguous() if read_often else bias_table.t()


def forward(
    qkv: Tensor, bias_table: Tensor, logit_scale: Tensor | None, num_heads: int,
    window: tuple[int, int], shift: tuple[int, int], scale: float,
) -> Tensor:  # fmt: skip
    batch, height, width, channels = qkv.shape
    tokens, head_dim = window[0] * window[1], channels // (3 * num_heads)
    blocks = _blocks(_forward, tokens, head_dim, qkv.dtype)
    table = _table(bias_table, blocks.keys < tokens)
    out = torch.empty((batch, height, width, channels // 3), dtype=qkv.dtype, device=qkv.device)
    _forward[_grid(_forward, blocks, qkv, num_heads, tokens)](
        qkv.contiguous(), table, table if logit_scale is None else logit_scale.contiguous(), out,
        batch * height * width // tokens, height, width, table.stride(1), table.stride(0), scale,
        **_constants(num_heads, head_dim, window, shift, logit_scale is not None, blocks),
        **launch_options(qkv.device, blocks.num_warps, blocks.num_stages),
    )  # fmt: skip
    return out


def backward(
    d_out: Tensor, qkv: Tensor, bias_table: Tensor, logit_scale: Tensor | None, num_heads: int,
    window: tuple[int, int], shift: tuple[int, int], scale: float, needs_table: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of qkv, bias_table and logit_scale; the second is empty unless needed, the third without logit_scale."""
    batch, height, width, channels = qkv.shape
    tokens, head_dim = window[0] * window[1], channels // (3 * num_heads)
    windows = batch * height * width // tokens
    cosine = logit_scale is not None
    d_out, qkv, table = d_out.contiguous(), qkv.contiguous(), _table(bias_table, _in_tiles(tokens, head_dim))
    scales = table if logit_scale is None else logit_scale.contiguous()

    def cut(kernel: Any) -> tuple[Any, _Blocks, tuple[int, int, int]]:
        blocks = _blocks(kernel, tokens, head_dim, qkv.dtype)
        return kernel, blocks, _grid(kernel, blocks, qkv, num_heads, tokens)

    def launch(kernel: Any, blocks: _Blocks, grid: tuple[int, int, int], **others: Tensor | bool) -> None:
        kernel[grid](
            d_out, qkv, table, scales, windows=windows, height=height, width=width,
            entry_stride=table.stride(1), head_stride=table.stride(0), scale=scale, **others,
            **_constants(num_heads, head_dim, window, shift, cosine, blocks),
            **launch_options(qkv.device, blocks.num_warps, blocks.num_stages),
        )  # fmt: skip

    in_tiles = _in_tiles(tokens, head_dim)
    for_queries = cut(_backward_queries if in_tiles else _backward)
    for_bias = cut(_backward_bias) if in_tiles else for_queries
    _, slices, tiles = for_queries[2]
    pitch = cdiv(tokens, for_bias[1].keys) * for_bias[1].keys
    d_qkv = torch.empty_like(qkv)
    # A sum for each slice of the windows. What is not needed stands for nothing, but a launch needs pointers.
    d_bias = qkv.new_empty((for_bias[2][1] if needs_table else 0, num_heads, tokens, pitch), dtype=torch.float32)
    d_scale = qkv.new_empty((slices * tiles if cosine else 0, num_heads), dtype=torch.float32)
    if in_tiles:
        rows = qkv.new_empty((3, windows, num_heads, tokens), dtype=torch.float32)
        statistics: dict[str, Any] = {"row_largest": rows[0], "row_inverse": rows[1], "row_delta": rows[2]}
        launch(*for_queries, d_qkv=d_qkv, d_logit_scale=d_scale, **statistics)
        launch(*cut(_backward_keys), d_qkv=d_qkv, **statistics)
        if needs_table:
            launch(*for_bias, d_bias=d_bias, **statistics)
    else:
        launch(*for_queries, d_qkv=d_qkv, d_bias=d_bias, d_logit_scale=d_scale, BIAS_GRADIENT=needs_table)

    d_table = torch.empty(bias_table.shape if needs_table else 0, dtype=bias_table.dtype, device=bias_table.device)
    if needs_table:
        _sum_by_relative_position[(num_heads, cdiv(len(bias_table), SUM_BLOCKS["BLOCK_ENTRIES"]))](
            d_bias.sum(0), d_table, WINDOW=window, HEADS=num_heads, PITCH=pitch, **SUM_BLOCKS,
            **launch_options(qkv.device, 4, 1),
        )  # fmt: skip
    return d_qkv, d_table, d_scale.sum(0) if cosine else d_scale.flatten()


# --- What ships -------------------------------------------------------------------------------------------------------

_SWIN_TINY = [  # stages 1 and 4: the number of heads is a stride, no more
    # window, shift, heads, head dimension
    (7, 0, 3, 32),
    (7, 3, 3, 32),
    (7, 0, 24, 32),
]
_OTHERS = [(window, window // 2, 4, 32) for window in (4, 6, 8, 12, 16, 24)]
_OTHERS += [(7, 3, 4, 16), (7, 3, 4, 64), (7, 3, 4, 128), (12, 6, 4, 128)]
_SWIN_V2 = [(window, window // 2, 4, 32) for window in (8, 16)]


def compile_cases() -> list[CompileCase]:
    """Swin-T's stages in every dtype; other windows and head dimensions in bfloat16, whose code float16's is."""
    pointers = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
    cases = []
    for dtype, pointer in pointers.items():
        shapes = [(*shape, False) for shape in _SWIN_TINY]
        if dtype == torch.bfloat16:
            shapes += [(*shape, False) for shape in _OTHERS] + [(*shape, True) for shape in _SWIN_V2]
        for window, shift, heads, head_dim, cosine in shapes:
            tokens = window * window
            in_tiles = _in_tiles(tokens, head_dim)
            kernels = (_backward_queries, _backward_keys, _backward_bias) if in_tiles else (_backward,)
            for kernel in (_forward, *kernels):
                blocks = _blocks(kernel, tokens, head_dim, dtype)
                constants = _constants(heads, head_dim, (window, window), (shift, shift), cosine, blocks) | {
                    "UPCAST": False
                }
                if kernel is _backward:
                    constants |= {"BIAS_GRADIENT": True}
                if in_tiles if kernel is not _forward else blocks.keys < tokens:
                    constants |= {"entry_stride": 1}
                signature = {name: "*fp32" for name in kernel.arg_names if name not in constants}
                signature |= {name: pointer for name in ("qkv", "out", "d_out", "d_qkv") if name in signature}
                integers = ("windows", "height", "width", "entry_stride", "head_stride")
                signature |= {name: "i32" for name in integers if name in signature} | {"scale": "fp32"}
                cases.append(
                    CompileCase(
                        name=f"window_attention {kernel.__name__.strip('_')}, window {window}, shift {shift}, "
                        f"{heads} heads of {head_dim}, {'cosine, ' * cosine}{str(dtype).removeprefix('torch.')}",
                        kernel=kernel,
                        signature=signature,
                        constexprs=constants,
                        num_warps=blocks.num_warps,
                        num_stages=blocks.num_stages,
                        dtype=dtype,
                        has_dot=True,
                    )
                )
    for window, heads in ((7, 3), (7, 24), (24, 4)):
        cases.append(
            CompileCase(
                name=f"window_attention sum_by_relative_position, window {window}, {heads} heads",
                kernel=_sum_by_relative_position,
                signature={"d_bias": "*fp32", "d_bias_table": "*fp32"},
                constexprs={
                    "WINDOW": (window, window), "HEADS": heads, "PITCH": -(-(window**2) // 64) * 64, **SUM_BLOCKS
                },
                num_warps=4,
                num_stages=1,
                dtype=torch.float32,
                has_dot=False,
            )
        )  # fmt: skip
    return cases
