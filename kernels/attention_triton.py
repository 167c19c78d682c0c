"""Triton kernels of `attention`: FlashAttention-2 with an additive bias or a mask, and no atomics.

A probability is exp(score − maximum) · inverse, of two numbers that the forward keeps of each query: the maximum of its
scores and one over the sum of their exponentials above it. Neither factor exceeds 1, whatever the scores are; the
logarithm of the sum would be lost beside a large maximum. Without a bias scores are kept in units of log 2, because exp2
is one instruction; with one in natural units, so that the most negative finite bias stays finite.

Each backward kernel owns what it writes: a program holds a block of queries (d_q), of keys (d_k, d_v) or of the bias, or
a short head's every query. The bias gradient is summed over the heads that a program goes through in order, then over
the programs' partial sums, so two runs give the same bits. Tiles are zero past the ends of N, M and D. A unit of 1 or 8
elements multiplies the strides of q, k, v and d_out: see `_strides`.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlocal.kernels import dispatch
from fastlocal.kernels.cases import CompileCase, cdiv, launch_options, next_power_of_2

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(
    pointer, start, stride, length,
    UNIT: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Pointers to rows start .. start + ROWS of a [length, HEAD_DIM] matrix, and which of them exist."""
    stride *= UNIT
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    pointers = pointer + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    mask = (start + rows < length)[:, None]
    if COLUMNS != HEAD_DIM:
        mask = mask & (columns < HEAD_DIM)[None, :]
    return pointers, mask


@triton.jit
def _load(
    pointer, start, stride, length, UPCAST: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    pointers, mask = _tile(pointer, start, stride, length, UNIT, ROWS, HEAD_DIM, COLUMNS)
    tile = tl.load(pointers, mask=mask, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _bias_tile(pointer, row, column, stride, queries, keys, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to a [ROWS, COLUMNS] tile of one head's [queries, keys] bias, and which of them exist."""
    rows = tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    pointers = pointer + tl.cast(row, tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    return pointers, (row + rows < queries)[:, None] & (columns < keys)[None, :]


@triton.jit
def _biased(
    scores, pointer, row, column, stride, queries, keys,
    TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Scores plus their bias, or hidden where their mask is 0."""
    pointers, exists = _bias_tile(pointer, row, column, stride, queries, keys, ROWS, COLUMNS)
    bias = tl.load(pointers, mask=exists, other=0)
    if TRANSPOSED:
        bias = tl.trans(bias)
    if pointer.dtype.element_ty == tl.uint8:
        scores = tl.where(bias != 0, scores, float("-inf"))
    else:
        scores += bias.to(tl.float32)
    return scores


@triton.jit
def _exp(x, NATURAL: tl.constexpr):
    """e ** x, of natural units; 2 ** x, of units of log 2."""
    if NATURAL:
        x *= LOG2E
    return tl.exp2(x)


@triton.jit
def _probability(scores, highest, inverse, NATURAL: tl.constexpr):
    """At most 1: the scores, computed again, may exceed their maximum by rounding, and that is clamped."""
    return _exp(tl.minimum(scores - highest, 0.0), NATURAL) * inverse


@triton.jit
def _head(pointer, index, heads, batch_stride, head_stride, UNIT: tl.constexpr, SHARED_BY: tl.constexpr):
    """The first element of head ``index`` of B · heads, of which ``SHARED_BY`` neighbours share one."""
    sample = tl.cast(index // heads, tl.int64)
    head = tl.cast(index % heads // SHARED_BY, tl.int64)
    return pointer + (sample * batch_stride + head * head_stride) * UNIT


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, highest_ptr, inverse_ptr,
    scale, heads, queries, keys,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, bias_batch, bias_head, bias_row,
    HAS_BIAS: tl.constexpr, SHARED_BY: tl.constexpr, UPCAST: tl.constexpr, UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries, BLOCK_Q)
    index = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks * BLOCK_Q
    q_ptr = _head(q_ptr, index, heads, q_batch, q_head, UNIT, 1)
    q = _load(q_ptr, start, q_row, queries, UPCAST, UNIT, BLOCK_Q, HEAD_DIM, BLOCK_D)
    k_ptr = _head(k_ptr, index, heads, k_batch, k_head, UNIT, SHARED_BY)
    v_ptr = _head(v_ptr, index, heads, v_batch, v_head, UNIT, SHARED_BY)
    bias_ptr = _head(bias_ptr, index, heads, bias_batch, bias_head, 1, 1)
    if not HAS_BIAS:
        scale *= LOG2E

    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    out = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for key in range(0, keys, BLOCK_K):
        k = _load(k_ptr, key, k_row, keys, UPCAST, UNIT, BLOCK_K, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if HAS_BIAS:
            scores = _biased(scores, bias_ptr, start, key, bias_row, queries, keys, False, BLOCK_Q, BLOCK_K)
        scores = tl.where((key + tl.arange(0, BLOCK_K) < keys)[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        shift = higher
        if HAS_BIAS:  # a bias of -inf may hide every key so far, and -inf - -inf is NaN
            shift = tl.where(higher == float("-inf"), 0.0, higher)
        p = _exp(scores - shift[:, None], HAS_BIAS)
        rescale = _exp(highest - shift, HAS_BIAS)
        total = total * rescale + tl.sum(p, 1)
        v = _load(v_ptr, key, v_row, keys, UPCAST, UNIT, BLOCK_K, HEAD_DIM, BLOCK_D)
        out = tl.dot(p.to(v.dtype), v, out * rescale[:, None], input_precision="ieee")
        highest = higher

    inverse = 1.0 / total
    if HAS_BIAS:  # all hidden: zeros out, and exp(-inf - 0) * 0 = 0 in the backward
        inverse = tl.where(total == 0.0, 0.0, inverse)
        highest = tl.where(total == 0.0, 0.0, highest)
    rows = start + tl.arange(0, BLOCK_Q)
    vector = tl.cast(index, tl.int64) * queries + rows
    tl.store(highest_ptr + vector, highest, mask=rows < queries)
    tl.store(inverse_ptr + vector, inverse, mask=rows < queries)
    out_row = heads * HEAD_DIM
    out_ptr = _head(out_ptr, index, heads, tl.cast(queries, tl.int64) * out_row, HEAD_DIM, 1, 1)
    pointers, mask = _tile(out_ptr, start, out_row, queries, 1, BLOCK_Q, HEAD_DIM, BLOCK_D)
    tl.store(pointers, (out * inverse[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _head_gradient_kernel(
    d_out_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, highest_ptr, inverse_ptr,
    d_q_ptr, d_k_ptr, d_v_ptr, d_bias_ptr,
    scale, all_heads, heads, queries, keys,
    d_out_batch, d_out_head, d_out_row,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, bias_batch, bias_head, bias_row,
    HAS_BIAS: tl.constexpr, BIAS_GRADIENT: tl.constexpr, SHARED_BY: tl.constexpr, UPCAST: tl.constexpr,
    UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Every gradient of a head whose queries all fit one block: every tensor is read once and no score twice.

    A program goes through the same head of several samples, and its sum of d_bias, which no other program touches,
    stays in the cache.
    """
    rows = tl.arange(0, BLOCK_Q)
    out_row = heads * HEAD_DIM
    out_batch = tl.cast(queries, tl.int64) * out_row
    key_batch = tl.cast(keys, tl.int64) * out_row
    score_scale = scale
    if not HAS_BIAS:
        score_scale *= LOG2E
    d_bias_ptr += tl.cast(tl.program_id(0), tl.int64) * queries * keys

    step = tl.num_programs(0)
    if not BIAS_GRADIENT:  # one head a program: the compiler drops the loop, and the registers it takes
        step = 1
        all_heads = tl.program_id(0) + 1
    for index in range(tl.program_id(0), all_heads, step):
        sample_d_out = _head(d_out_ptr, index, heads, d_out_batch, d_out_head, UNIT, 1)
        d_out = _load(sample_d_out, 0, d_out_row, queries, UPCAST, UNIT, BLOCK_Q, HEAD_DIM, BLOCK_D)
        sample_out = _head(out_ptr, index, heads, out_batch, HEAD_DIM, 1, 1)
        out = _load(sample_out, 0, out_row, queries, UPCAST, 1, BLOCK_Q, HEAD_DIM, BLOCK_D)
        delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
        vector = tl.cast(index, tl.int64) * queries + rows
        highest = tl.load(highest_ptr + vector, mask=rows < queries, other=0.0)
        inverse = tl.load(inverse_ptr + vector, mask=rows < queries, other=0.0)
        sample_q = _head(q_ptr, index, heads, q_batch, q_head, UNIT, 1)
        q = _load(sample_q, 0, q_row, queries, UPCAST, UNIT, BLOCK_Q, HEAD_DIM, BLOCK_D)
        sample_k = _head(k_ptr, index, heads, k_batch, k_head, UNIT, SHARED_BY)
        sample_v = _head(v_ptr, index, heads, v_batch, v_head, UNIT, SHARED_BY)
        sample_bias = _head(bias_ptr, index, heads, bias_batch, bias_head, 1, 1)
        sample_d_k = _head(d_k_ptr, index, heads, key_batch, HEAD_DIM, 1, 1)
        sample_d_v = _head(d_v_ptr, index, heads, key_batch, HEAD_DIM, 1, 1)

        d_q = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        for key in range(0, keys, BLOCK_K):
            k = _load(sample_k, key, k_row, keys, UPCAST, UNIT, BLOCK_K, HEAD_DIM, BLOCK_D)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * score_scale
            if HAS_BIAS:
                scores = _biased(scores, sample_bias, 0, key, bias_row, queries, keys, False, BLOCK_Q, BLOCK_K)
            scores = tl.where((key + tl.arange(0, BLOCK_K) < keys)[None, :], scores, float("-inf"))
            p = _probability(scores, highest[:, None], inverse[:, None], HAS_BIAS)
            d_v = tl.dot(tl.trans(p.to(d_out.dtype)), d_out, input_precision="ieee")
            pointers, mask = _tile(sample_d_v, key, out_row, keys, 1, BLOCK_K, HEAD_DIM, BLOCK_D)
            tl.store(pointers, d_v.to(d_v_ptr.dtype.element_ty), mask=mask)
            v = _load(sample_v, key, v_row, keys, UPCAST, UNIT, BLOCK_K, HEAD_DIM, BLOCK_D)
            d_scores = p * (tl.dot(d_out, tl.trans(v), input_precision="ieee") - delta[:, None])
            if BIAS_GRADIENT:
                pointers, mask = _bias_tile(d_bias_ptr, 0, key, keys, queries, keys, BLOCK_Q, BLOCK_K)
                # A vector, because the interpreter of Triton 3.9 makes integers of a scalar truth that it broadcasts.
                added = tl.full([BLOCK_Q, 1], index, tl.int32) >= tl.num_programs(0)
                former = tl.load(pointers, mask=mask & added, other=0.0)
                tl.store(pointers, former + d_scores, mask=mask)
            d_scores = d_scores.to(q.dtype)
            d_k = tl.dot(tl.trans(d_scores), q, input_precision="ieee") * scale
            pointers, mask = _tile(sample_d_k, key, out_row, keys, 1, BLOCK_K, HEAD_DIM, BLOCK_D)
            tl.store(pointers, d_k.to(d_k_ptr.dtype.element_ty), mask=mask)
            d_q = tl.dot(d_scores, k, d_q, input_precision="ieee")

        sample_d_q = _head(d_q_ptr, index, heads, out_batch, HEAD_DIM, 1, 1)
        pointers, mask = _tile(sample_d_q, 0, out_row, queries, 1, BLOCK_Q, HEAD_DIM, BLOCK_D)
        tl.store(pointers, (d_q * scale).to(d_q_ptr.dtype.element_ty), mask=mask)
        if BIAS_GRADIENT:
            tl.debug_barrier()  # what one thread stored another may add to


@triton.jit
def _query_gradient_kernel(
    d_out_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, highest_ptr, inverse_ptr, delta_ptr, d_q_ptr,
    scale, heads, queries, keys,
    d_out_batch, d_out_head, d_out_row,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, bias_batch, bias_head, bias_row,
    HAS_BIAS: tl.constexpr, SHARED_BY: tl.constexpr, UPCAST: tl.constexpr, UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d_q, and for the kernels after it delta = Σ out · d_out of each query."""
    blocks = tl.cdiv(queries, BLOCK_Q)
    index = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks * BLOCK_Q
    rows = start + tl.arange(0, BLOCK_Q)
    row_mask = rows < queries
    vector = tl.cast(index, tl.int64) * queries + rows
    out_row = heads * HEAD_DIM
    out_batch = tl.cast(queries, tl.int64) * out_row
    d_out_ptr = _head(d_out_ptr, index, heads, d_out_batch, d_out_head, UNIT, 1)
    d_out = _load(d_out_ptr, start, d_out_row, queries, UPCAST, UNIT, BLOCK_Q, HEAD_DIM, BLOCK_D)
    out_ptr = _head(out_ptr, index, heads, out_batch, HEAD_DIM, 1, 1)
    out = _load(out_ptr, start, out_row, queries, UPCAST, 1, BLOCK_Q, HEAD_DIM, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(delta_ptr + vector, delta, mask=row_mask)
    highest = tl.load(highest_ptr + vector, mask=row_mask, other=0.0)
    inverse = tl.load(inverse_ptr + vector, mask=row_mask, other=0.0)
    q_ptr = _head(q_ptr, index, heads, q_batch, q_head, UNIT, 1)
    q = _load(q_ptr, start, q_row, queries, UPCAST, UNIT, BLOCK_Q, HEAD_DIM, BLOCK_D)
    k_ptr = _head(k_ptr, index, heads, k_batch, k_head, UNIT, SHARED_BY)
    v_ptr = _head(v_ptr, index, heads, v_batch, v_head, UNIT, SHARED_BY)
    bias_ptr = _head(bias_ptr, index, heads, bias_batch, bias_head, 1, 1)
    score_scale = scale
    if not HAS_BIAS:
        score_scale *= LOG2E

    d_q = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for key in range(0, keys, BLOCK_K):
        k = _load(k_ptr, key, k_row, keys, UPCAST, UNIT, BLOCK_K, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * score_scale
        if HAS_BIAS:
            scores = _biased(scores, bias_ptr, start, key, bias_row, queries, keys, False, BLOCK_Q, BLOCK_K)
        scores = tl.where((key + tl.arange(0, BLOCK_K) < keys)[None, :], scores, float("-inf"))
        p = _probability(scores, highest[:, None], inverse[:, None], HAS_BIAS)
        v = _load(v_ptr, key, v_row, keys, UPCAST, UNIT, BLOCK_K, HEAD_DIM, BLOCK_D)
        d_scores = p * (tl.dot(d_out, tl.trans(v), input_precision="ieee") - delta[:, None])
        d_q = tl.dot(d_scores.to(k.dtype), k, d_q, input_precision="ieee")

    d_q_ptr = _head(d_q_ptr, index, heads, out_batch, HEAD_DIM, 1, 1)
    pointers, mask = _tile(d_q_ptr, start, out_row, queries, 1, BLOCK_Q, HEAD_DIM, BLOCK_D)
    tl.store(pointers, (d_q * scale).to(d_q_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _key_gradient_kernel(
    d_out_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, highest_ptr, inverse_ptr, delta_ptr, d_k_ptr, d_v_ptr,
    scale, heads, queries, keys,
    d_out_batch, d_out_head, d_out_row,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, bias_batch, bias_head, bias_row,
    HAS_BIAS: tl.constexpr, SHARED_BY: tl.constexpr, UPCAST: tl.constexpr, UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d_k and d_v. Scores are transposed here, [keys, queries], so that both products take them as they are."""
    blocks = tl.cdiv(keys, BLOCK_K)
    index = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks * BLOCK_K
    k_ptr = _head(k_ptr, index, heads, k_batch, k_head, UNIT, SHARED_BY)
    k = _load(k_ptr, start, k_row, keys, UPCAST, UNIT, BLOCK_K, HEAD_DIM, BLOCK_D)
    v_ptr = _head(v_ptr, index, heads, v_batch, v_head, UNIT, SHARED_BY)
    v = _load(v_ptr, start, v_row, keys, UPCAST, UNIT, BLOCK_K, HEAD_DIM, BLOCK_D)
    q_ptr = _head(q_ptr, index, heads, q_batch, q_head, UNIT, 1)
    d_out_ptr = _head(d_out_ptr, index, heads, d_out_batch, d_out_head, UNIT, 1)
    bias_ptr = _head(bias_ptr, index, heads, bias_batch, bias_head, 1, 1)
    score_scale = scale
    if not HAS_BIAS:
        score_scale *= LOG2E

    d_k = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    d_v = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for query in range(0, queries, BLOCK_Q):
        rows = query + tl.arange(0, BLOCK_Q)
        vector = tl.cast(index, tl.int64) * queries + rows
        q = _load(q_ptr, query, q_row, queries, UPCAST, UNIT, BLOCK_Q, HEAD_DIM, BLOCK_D)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * score_scale
        if HAS_BIAS:
            scores = _biased(scores, bias_ptr, query, start, bias_row, queries, keys, True, BLOCK_Q, BLOCK_K)
        highest = tl.load(highest_ptr + vector, mask=rows < queries, other=0.0)
        inverse = tl.load(inverse_ptr + vector, mask=rows < queries, other=0.0)
        p = _probability(scores, highest[None, :], inverse[None, :], HAS_BIAS)  # 0 past the last query
        d_out = _load(d_out_ptr, query, d_out_row, queries, UPCAST, UNIT, BLOCK_Q, HEAD_DIM, BLOCK_D)
        d_v = tl.dot(p.to(d_out.dtype), d_out, d_v, input_precision="ieee")
        delta = tl.load(delta_ptr + vector, mask=rows < queries, other=0.0)
        d_scores = p * (tl.dot(v, tl.trans(d_out), input_precision="ieee") - delta[None, :])
        d_k = tl.dot(d_scores.to(q.dtype), q, d_k, input_precision="ieee")

    row = heads * HEAD_DIM
    d_k_ptr = _head(d_k_ptr, index, heads, tl.cast(keys, tl.int64) * row, HEAD_DIM, 1, 1)
    pointers, mask = _tile(d_k_ptr, start, row, keys, 1, BLOCK_K, HEAD_DIM, BLOCK_D)
    tl.store(pointers, (d_k * scale).to(d_k_ptr.dtype.element_ty), mask=mask)
    d_v_ptr = _head(d_v_ptr, index, heads, tl.cast(keys, tl.int64) * row, HEAD_DIM, 1, 1)
    pointers, mask = _tile(d_v_ptr, start, row, keys, 1, BLOCK_K, HEAD_DIM, BLOCK_D)
    tl.store(pointers, d_v.to(d_v_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bias_gradient_kernel(
    d_out_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, highest_ptr, inverse_ptr, delta_ptr, d_bias_ptr,
    scale, all_heads, slots, heads, queries, keys,
    d_out_batch, d_out_head, d_out_row,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, bias_batch, bias_head, bias_row,
    SHARED_BY: tl.constexpr, UPCAST: tl.constexpr, UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of the scores' gradient, summed in order over every ``slots``-th of all heads."""
    key_blocks = tl.cdiv(keys, BLOCK_K)
    tiles = tl.cdiv(queries, BLOCK_Q) * key_blocks
    slot = tl.program_id(0) // tiles
    start = tl.program_id(0) % tiles // key_blocks * BLOCK_Q
    key = tl.program_id(0) % key_blocks * BLOCK_K
    rows = start + tl.arange(0, BLOCK_Q)

    d_bias = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for index in range(slot, all_heads, slots):
        sample_q = _head(q_ptr, index, heads, q_batch, q_head, UNIT, 1)
        q = _load(sample_q, start, q_row, queries, UPCAST, UNIT, BLOCK_Q, HEAD_DIM, BLOCK_D)
        sample_k = _head(k_ptr, index, heads, k_batch, k_head, UNIT, SHARED_BY)
        k = _load(sample_k, key, k_row, keys, UPCAST, UNIT, BLOCK_K, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        sample_bias = _head(bias_ptr, index, heads, bias_batch, bias_head, 1, 1)
        scores = _biased(scores, sample_bias, start, key, bias_row, queries, keys, False, BLOCK_Q, BLOCK_K)
        vector = tl.cast(index, tl.int64) * queries + rows
        highest = tl.load(highest_ptr + vector, mask=rows < queries, other=0.0)
        inverse = tl.load(inverse_ptr + vector, mask=rows < queries, other=0.0)
        p = _probability(scores, highest[:, None], inverse[:, None], True)
        sample_d_out = _head(d_out_ptr, index, heads, d_out_batch, d_out_head, UNIT, 1)
        d_out = _load(sample_d_out, start, d_out_row, queries, UPCAST, UNIT, BLOCK_Q, HEAD_DIM, BLOCK_D)
        sample_v = _head(v_ptr, index, heads, v_batch, v_head, UNIT, SHARED_BY)
        v = _load(sample_v, key, v_row, keys, UPCAST, UNIT, BLOCK_K, HEAD_DIM, BLOCK_D)
        delta = tl.load(delta_ptr + vector, mask=rows < queries, other=0.0)
        d_bias += p * (tl.dot(d_out, tl.trans(v), input_precision="ieee") - delta[:, None])

    d_bias_ptr += tl.cast(slot, tl.int64) * queries * keys
    pointers, mask = _bias_tile(d_bias_ptr, start, key, keys, queries, keys, BLOCK_Q, BLOCK_K)
    tl.store(pointers, d_bias, mask=mask)


# --- Block sizes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    queries: int
    keys: int
    num_warps: int
    num_stages: int


FORWARD, HEAD, QUERY, KEY, BIAS = "forward", "d_q, d_k and d_v", "d_q", "d_k and d_v", "d_bias"


# (kernel, widest head dimension, bias) for two-byte dtypes. Every row fits 99 KiB of shared memory (compute
# capabilities 8.6, 8.9, 12.0), 255 registers on every architecture from 8.0 and AMD's gfx942's 512: no spills.
BLOCKS = {
    (FORWARD, 64, False): Blocks(128, 32, 4, 3),
    (FORWARD, 64, True): Blocks(64, 64, 8, 2),
    (FORWARD, 128, False): Blocks(128, 64, 8, 2),
    (FORWARD, 128, True): Blocks(64, 64, 8, 2),
    (FORWARD, 256, False): Blocks(64, 32, 8, 2),
    (FORWARD, 256, True): Blocks(64, 32, 8, 2),
    (QUERY, 64, False): Blocks(64, 32, 4, 2),
    (QUERY, 64, True): Blocks(64, 64, 8, 2),
    (QUERY, 128, False): Blocks(128, 32, 8, 2),
    (QUERY, 128, True): Blocks(64, 64, 8, 2),
    (QUERY, 256, False): Blocks(32, 16, 4, 1),
    (QUERY, 256, True): Blocks(32, 32, 8, 1),
    (KEY, 64, False): Blocks(32, 64, 4, 2),
    (KEY, 64, True): Blocks(32, 64, 8, 2),
    (KEY, 128, False): Blocks(32, 64, 8, 2),
    (KEY, 128, True): Blocks(32, 64, 8, 2),
    (KEY, 256, False): Blocks(32, 32, 8, 1),
    (KEY, 256, True): Blocks(16, 32, 8, 1),
    (BIAS, 64, True): Blocks(64, 32, 8, 1),
    (BIAS, 128, True): Blocks(64, 32, 8, 1),
    (BIAS, 256, True): Blocks(32, 16, 4, 1),
}
HEAD_DIMS = (64, 128, 256)  # of the rows


def _head_blocks(queries: int, head_dim: int, dtype: torch.dtype, has_bias: bool) -> Blocks | None:
    """For the kernel that holds a head's every query, or None where they do not fit the registers."""
    block = max(32, next_power_of_2(queries))
    # On an H100, 256 queries of 64 channels at a time are half as fast again in the two kernels that share the work.
    widest = 64 if dtype == torch.float32 else 128 if has_bias or head_dim > 32 else 256
    if head_dim > 64 or block > widest:
        return None
    if has_bias:
        return Blocks(block, 16 if block == 128 else 32, 8, 1)
    if dtype != torch.float32 and block <= 64:
        return Blocks(block, 32, 4, 2)
    return Blocks(block, 32, 8 if block > 64 else 4, 1)


def _blocks(kernel: str, head_dim: int, dtype: torch.dtype, has_bias: bool) -> Blocks:
    if dtype == torch.float32:  # exact products run without tensor cores: small tiles
        return Blocks(32, 32, 4, 1) if head_dim <= 128 else Blocks(16, 16, 4, 1)
    return BLOCKS[kernel, next(widest for widest in HEAD_DIMS if head_dim <= widest), has_bias]


# --- Launchers --------------------------------------------------------------------------------------------------------


def _constants(blocks: Blocks, head_dim: int, dtype: torch.dtype) -> dict[str, int | bool]:
    return {
        "UPCAST": dispatch.interpreting() and dtype == torch.bfloat16,  # interpreted bfloat16 products are wrong
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, next_power_of_2(head_dim)),  # a product needs 16
        "BLOCK_Q": blocks.queries,
        "BLOCK_K": blocks.keys,
    }


def _strides(*tensors: Tensor) -> tuple[int, list[int]]:
    """A unit, and the batch, head and row strides of [B, heads, N, D] tensors in it.

    8 elements of 2 bytes are one 16-byte load: a kernel that sees ``stride * 8`` knows that its rows are aligned.
    """
    strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    return unit, [stride // unit for stride in strides]


def _unit_last_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _near_rows(*tensors: Tensor) -> list[Tensor]:
    """Copies those whose rows are so far apart that a tile of them spans 2^31 elements: 64-bit offsets of every row
    would cost the kernels registers that they do not have."""
    return [tensor.contiguous() if tensor.stride(2) * 256 >= 2**31 else tensor for tensor in tensors]


def _bias_and_strides(bias: Tensor | None, q: Tensor) -> tuple[Tensor, list[int]]:
    """What a kernel reads of a bias [1 or B, 1 or heads, N, M], stride 0 where it is shared; q stands for none."""
    if bias is None:
        return q, [0, 0, 0]
    bias = _unit_last_stride(bias.view(torch.uint8) if bias.dtype == torch.bool else bias)
    return bias, [0 if size == 1 else stride for size, stride in zip(bias.shape[:3], bias.stride(), strict=False)]


@functools.cache
def _processors(device: torch.device) -> int:
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, out: Tensor) -> Tensor:
    """Fills ``out`` (memory [B, N, heads, D]); returns the maxima and the inverse sums of exponentials [2, B, heads, N]."""
    batch, heads, queries, head_dim = q.shape
    has_bias = bias is not None
    bias, bias_strides = _bias_and_strides(bias, q)
    q, k, v = _near_rows(q, k, v)
    unit, strides = _strides(q, k, v)
    statistics = torch.empty((2, batch, heads, queries), dtype=torch.float32, device=q.device)
    blocks = _blocks(FORWARD, head_dim, q.dtype, has_bias)
    _forward_kernel[(cdiv(queries, blocks.queries) * batch * heads,)](
        q, k, v, bias, out, *statistics, scale, heads, queries, k.shape[2], *strides, *bias_strides,
        HAS_BIAS=has_bias, SHARED_BY=heads // k.shape[1], UNIT=unit, **_constants(blocks, head_dim, q.dtype),
        **launch_options(q.device, blocks.num_warps, blocks.num_stages),
    )  # fmt: skip
    return statistics


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, statistics: Tensor, scale: float,
    d_q: Tensor, d_k: Tensor, d_v: Tensor, d_bias: Tensor,
) -> None:  # fmt: skip
    """Fills the gradients (memory [B, N, heads, D]); ``d_bias`` unless it is empty."""
    if k.shape[1] == q.shape[1]:
        _backward_of_every_head(d_out, q, k, v, bias, out, statistics, scale, d_q, d_k, d_v, d_bias)
        return
    batch, heads, _, head_dim = q.shape
    groups, keys = k.shape[1:3]
    of_heads = torch.empty((2, batch, keys, heads, head_dim), dtype=k.dtype, device=k.device).transpose(2, 3)
    _backward_of_every_head(d_out, q, k, v, bias, out, statistics, scale, d_q, of_heads[0], of_heads[1], d_bias)
    for gradient, parts in zip((d_k, d_v), of_heads, strict=True):
        gradient.copy_(parts.unflatten(1, (groups, -1)).sum(2))


def _backward_of_every_head(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, statistics: Tensor, scale: float,
    d_q: Tensor, d_k: Tensor, d_v: Tensor, d_bias: Tensor,
) -> None:  # fmt: skip
    """d_k and d_v are [B, heads, M, D]: of each head its own."""
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    has_bias = bias is not None
    needs_bias = d_bias.numel() > 0
    bias, bias_strides = _bias_and_strides(bias, q)
    d_out, q, k, v = _near_rows(_unit_last_stride(d_out), q, k, v)
    unit, strides = _strides(d_out, q, k, v)
    sizes = (heads, queries, keys, *strides, *bias_strides)
    shared_by = heads // k.shape[1]

    blocks = _head_blocks(queries, head_dim, q.dtype, has_bias)
    if blocks is not None:
        partial = _partial_sums(d_bias, q, keys, programs=heads) if needs_bias else d_bias
        _head_gradient_kernel[(len(partial) if needs_bias else batch * heads,)](
            d_out, q, k, v, bias, out, *statistics, d_q, d_k, d_v, partial, scale, batch * heads, *sizes,
            HAS_BIAS=has_bias, BIAS_GRADIENT=needs_bias, SHARED_BY=shared_by, UNIT=unit,
            **_constants(blocks, head_dim, q.dtype),
            **launch_options(q.device, blocks.num_warps, blocks.num_stages),
        )  # fmt: skip
        if needs_bias:
            _add_partial_sums(partial, d_bias, heads)
        return

    delta = torch.empty_like(statistics[0])
    blocks = _blocks(QUERY, head_dim, q.dtype, has_bias)
    _query_gradient_kernel[(cdiv(queries, blocks.queries) * batch * heads,)](
        d_out, q, k, v, bias, out, *statistics, delta, d_q, scale, *sizes,
        HAS_BIAS=has_bias, SHARED_BY=shared_by, UNIT=unit, **_constants(blocks, head_dim, q.dtype),
        **launch_options(q.device, blocks.num_warps, blocks.num_stages),
    )  # fmt: skip
    blocks = _blocks(KEY, head_dim, q.dtype, has_bias)
    _key_gradient_kernel[(cdiv(keys, blocks.keys) * batch * heads,)](
        d_out, q, k, v, bias, *statistics, delta, d_k, d_v, scale, *sizes,
        HAS_BIAS=has_bias, SHARED_BY=shared_by, UNIT=unit, **_constants(blocks, head_dim, q.dtype),
        **launch_options(q.device, blocks.num_warps, blocks.num_stages),
    )  # fmt: skip
    if not needs_bias:
        return
    blocks = _blocks(BIAS, head_dim, q.dtype, has_bias)
    tiles = cdiv(queries, blocks.queries) * cdiv(keys, blocks.keys)
    partial = _partial_sums(d_bias, q, keys, programs=heads * tiles)
    _bias_gradient_kernel[(len(partial) * tiles,)](
        d_out, q, k, v, bias, *statistics, delta, partial, scale, batch * heads, len(partial), *sizes,
        SHARED_BY=shared_by, UNIT=unit, **_constants(blocks, head_dim, q.dtype),
        **launch_options(q.device, blocks.num_warps, blocks.num_stages),
    )  # fmt: skip
    _add_partial_sums(partial, d_bias, heads)


def _partial_sums(d_bias: Tensor, q: Tensor, keys: int, programs: int) -> Tensor:
    """[parts of the batch · heads, N, M]: as many parts as fill the card, ``programs`` to each; one per sample if the
    samples have biases of their own."""
    batch, heads, queries, _ = q.shape
    parts = batch if len(d_bias) > 1 else min(batch, cdiv(_processors(q.device), programs))
    return torch.empty((parts * heads, queries, keys), dtype=torch.float32, device=q.device)


def _add_partial_sums(partial: Tensor, d_bias: Tensor, heads: int) -> None:
    """The sum over what shares a bias, in order."""
    d_bias.copy_(partial.unflatten(0, (-1, heads)).sum_to_size(d_bias.shape))


# --- What ships -------------------------------------------------------------------------------------------------------


POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def compile_cases() -> list[CompileCase]:
    """Every kernel at the head dimensions of Swin, ViT and ViT-H (whose blocks are those of 128, with masks besides) and
    at the widest, with and without bias."""
    kernels = {
        FORWARD: _forward_kernel,
        QUERY: _query_gradient_kernel,
        KEY: _key_gradient_kernel,
        BIAS: _bias_gradient_kernel,
    }
    cases = []
    for dtype, head_dim in itertools.product(POINTERS, (32, 64, 80, 256)):
        for (name, kernel), has_bias in itertools.product(kernels.items(), (False, True)):
            if (name, has_bias) != (BIAS, False):
                blocks = _blocks(name, head_dim, dtype, has_bias)
                cases.append(_compile_case(name, kernel, blocks, head_dim, dtype, has_bias))
        for queries, has_bias in itertools.product((64, 128, 256), (False, True)):
            head_blocks = _head_blocks(queries, head_dim, dtype, has_bias)
            if head_blocks is not None:
                name = f"{HEAD}, N up to {queries}"
                cases.append(_compile_case(name, _head_gradient_kernel, head_blocks, head_dim, dtype, has_bias))
    return cases


def _compile_case(
    name: str, kernel: Any, blocks: Blocks, head_dim: int, dtype: torch.dtype, has_bias: bool
) -> CompileCase:
    constants = _constants(blocks, head_dim, dtype) | {"UNIT": 8, "UPCAST": False, "SHARED_BY": 1}
    constants |= {"HAS_BIAS": has_bias, "BIAS_GRADIENT": has_bias}
    constexprs = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = dict.fromkeys((key for key in kernel.arg_names if key not in constexprs), "i32")
    signature |= {key: POINTERS[dtype] for key in signature if key.endswith("_ptr")}
    in_float32 = ("highest_ptr", "inverse_ptr", "delta_ptr", "bias_ptr", "d_bias_ptr")
    signature |= {key: "*fp32" for key in in_float32 if key in signature}
    return CompileCase(
        name=f"attention {name}{', bias' * has_bias}, head dimension {head_dim}, {str(dtype).removeprefix('torch.')}",
        kernel=kernel,
        signature=signature | {"scale": "fp32"},
        constexprs=constexprs,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        dtype=dtype,
        has_dot=True,
    )
