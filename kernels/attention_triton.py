"""Triton kernels of `attention`: FlashAttention-2 with an additive bias, and no atomics.

Scores are kept in units of log 2, because exp2 is one instruction. Each backward kernel owns what it writes: a program
holds a block of queries (d_q), of keys (d_k, d_v) or of the bias (d_bias, summed over the batch in order), or a short
head's every query, so two runs give the same bits. Tiles are zero past the ends of N and D. A unit of 1 or 8 elements
multiplies the strides of q, k, v and d_out: see `_strides`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlocal.kernels import dispatch
from fastlocal.kernels.cases import CompileCase

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


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
def _load_bias(pointer, row, column, stride, length, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A [ROWS, COLUMNS] tile of one head's bias, in units of log 2."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    pointers = pointer + tl.cast(row, tl.int64) * stride + column + rows[:, None] * stride + columns[None, :]
    mask = (row + rows < length)[:, None] & (column + columns < length)[None, :]
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32) * LOG2E


@triton.jit
def _head(pointer, index, heads, batch_stride, head_stride, UNIT: tl.constexpr):
    """The first element of head ``index`` of B · heads."""
    sample = tl.cast(index // heads, tl.int64)
    head = tl.cast(index % heads, tl.int64)
    return pointer + (sample * batch_stride + head * head_stride) * UNIT


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr,
    scale, heads, length,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, bias_head, bias_row,
    HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(length, BLOCK_Q)
    index = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks * BLOCK_Q
    q_ptr = _head(q_ptr, index, heads, q_batch, q_head, UNIT)
    q = _load(q_ptr, start, q_row, length, UPCAST, UNIT, BLOCK_Q, HEAD_DIM, BLOCK_D)
    k_ptr = _head(k_ptr, index, heads, k_batch, k_head, UNIT)
    v_ptr = _head(v_ptr, index, heads, v_batch, v_head, UNIT)
    bias_ptr += tl.cast(index % heads, tl.int64) * bias_head

    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    out = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for key in range(0, length, BLOCK_K):
        k = _load(k_ptr, key, k_row, length, UPCAST, UNIT, BLOCK_K, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        if HAS_BIAS:
            scores += _load_bias(bias_ptr, start, key, bias_row, length, BLOCK_Q, BLOCK_K)
        scores = tl.where((key + tl.arange(0, BLOCK_K) < length)[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        shift = higher
        if HAS_BIAS:  # a bias of -inf may hide every key so far, and -inf - -inf is NaN
            shift = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(scores - shift[:, None])
        rescale = tl.exp2(highest - shift)
        total = total * rescale + tl.sum(p, 1)
        v = _load(v_ptr, key, v_row, length, UPCAST, UNIT, BLOCK_K, HEAD_DIM, BLOCK_D)
        out = tl.dot(p.to(v.dtype), v, out * rescale[:, None], input_precision="ieee")
        highest = higher

    lse = (highest + tl.log2(total)) * LN2
    if HAS_BIAS:  # all hidden: zeros out, and exp(score - inf) = 0 in the backward
        lse = tl.where(total == 0.0, float("inf"), lse)
        total = tl.where(total == 0.0, 1.0, total)
    rows = start + tl.arange(0, BLOCK_Q)
    tl.store(lse_ptr + tl.cast(index, tl.int64) * length + rows, lse, mask=rows < length)
    out_row = heads * HEAD_DIM
    out_ptr = _head(out_ptr, index, heads, tl.cast(length, tl.int64) * out_row, HEAD_DIM, 1)
    pointers, mask = _tile(out_ptr, start, out_row, length, 1, BLOCK_Q, HEAD_DIM, BLOCK_D)
    tl.store(pointers, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _head_gradient_kernel(
    d_out_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, d_q_ptr, d_k_ptr, d_v_ptr,
    scale, heads, length,
    d_out_batch, d_out_head, d_out_row,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    UPCAST: tl.constexpr, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d_q, d_k and d_v of a head whose queries all fit one block: every tensor is read once and no score twice."""
    index = tl.program_id(0)
    rows = tl.arange(0, BLOCK_Q)
    out_row = heads * HEAD_DIM
    out_batch = tl.cast(length, tl.int64) * out_row
    d_out_ptr = _head(d_out_ptr, index, heads, d_out_batch, d_out_head, UNIT)
    d_out = _load(d_out_ptr, 0, d_out_row, length, UPCAST, UNIT, BLOCK_Q, HEAD_DIM, BLOCK_D)
    out_ptr = _head(out_ptr, index, heads, out_batch, HEAD_DIM, 1)
    out = _load(out_ptr, 0, out_row, length, UPCAST, 1, BLOCK_Q, HEAD_DIM, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    lse = tl.load(lse_ptr + tl.cast(index, tl.int64) * length + rows, mask=rows < length, other=float("inf")) * LOG2E
    q_ptr = _head(q_ptr, index, heads, q_batch, q_head, UNIT)
    q = _load(q_ptr, 0, q_row, length, UPCAST, UNIT, BLOCK_Q, HEAD_DIM, BLOCK_D)
    k_ptr = _head(k_ptr, index, heads, k_batch, k_head, UNIT)
    v_ptr = _head(v_ptr, index, heads, v_batch, v_head, UNIT)
    d_k_ptr = _head(d_k_ptr, index, heads, out_batch, HEAD_DIM, 1)
    d_v_ptr = _head(d_v_ptr, index, heads, out_batch, HEAD_DIM, 1)

    d_q = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for key in range(0, length, BLOCK_K):
        k = _load(k_ptr, key, k_row, length, UPCAST, UNIT, BLOCK_K, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        scores = tl.where((key + tl.arange(0, BLOCK_K) < length)[None, :], scores, float("-inf"))
        p = tl.exp2(scores - lse[:, None])
        d_v = tl.dot(tl.trans(p.to(d_out.dtype)), d_out, input_precision="ieee")
        pointers, mask = _tile(d_v_ptr, key, out_row, length, 1, BLOCK_K, HEAD_DIM, BLOCK_D)
        tl.store(pointers, d_v.to(d_v_ptr.dtype.element_ty), mask=mask)
        v = _load(v_ptr, key, v_row, length, UPCAST, UNIT, BLOCK_K, HEAD_DIM, BLOCK_D)
        d_scores = p * (tl.dot(d_out, tl.trans(v), input_precision="ieee") - delta[:, None])
        d_scores = d_scores.to(q.dtype)
        d_k = tl.dot(tl.trans(d_scores), q, input_precision="ieee") * scale
        pointers, mask = _tile(d_k_ptr, key, out_row, length, 1, BLOCK_K, HEAD_DIM, BLOCK_D)
        tl.store(pointers, d_k.to(d_k_ptr.dtype.element_ty), mask=mask)
        d_q = tl.dot(d_scores, k, d_q, input_precision="ieee")

    d_q_ptr = _head(d_q_ptr, index, heads, out_batch, HEAD_DIM, 1)
    pointers, mask = _tile(d_q_ptr, 0, out_row, length, 1, BLOCK_Q, HEAD_DIM, BLOCK_D)
    tl.store(pointers, (d_q * scale).to(d_q_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _query_gradient_kernel(
    d_out_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr, delta_ptr, d_q_ptr,
    scale, heads, length,
    d_out_batch, d_out_head, d_out_row,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, bias_head, bias_row,
    HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d_q, and for the kernels after it delta = Σ out · d_out of each query."""
    blocks = tl.cdiv(length, BLOCK_Q)
    index = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks * BLOCK_Q
    rows = start + tl.arange(0, BLOCK_Q)
    row_mask = rows < length
    out_row = heads * HEAD_DIM
    out_batch = tl.cast(length, tl.int64) * out_row
    d_out_ptr = _head(d_out_ptr, index, heads, d_out_batch, d_out_head, UNIT)
    d_out = _load(d_out_ptr, start, d_out_row, length, UPCAST, UNIT, BLOCK_Q, HEAD_DIM, BLOCK_D)
    out_ptr = _head(out_ptr, index, heads, out_batch, HEAD_DIM, 1)
    out = _load(out_ptr, start, out_row, length, UPCAST, 1, BLOCK_Q, HEAD_DIM, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(delta_ptr + tl.cast(index, tl.int64) * length + rows, delta, mask=row_mask)
    lse = tl.load(lse_ptr + tl.cast(index, tl.int64) * length + rows, mask=row_mask, other=float("inf")) * LOG2E
    q_ptr = _head(q_ptr, index, heads, q_batch, q_head, UNIT)
    q = _load(q_ptr, start, q_row, length, UPCAST, UNIT, BLOCK_Q, HEAD_DIM, BLOCK_D)
    k_ptr = _head(k_ptr, index, heads, k_batch, k_head, UNIT)
    v_ptr = _head(v_ptr, index, heads, v_batch, v_head, UNIT)
    bias_ptr += tl.cast(index % heads, tl.int64) * bias_head

    d_q = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for key in range(0, length, BLOCK_K):
        k = _load(k_ptr, key, k_row, length, UPCAST, UNIT, BLOCK_K, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        if HAS_BIAS:
            scores += _load_bias(bias_ptr, start, key, bias_row, length, BLOCK_Q, BLOCK_K)
        scores = tl.where((key + tl.arange(0, BLOCK_K) < length)[None, :], scores, float("-inf"))
        p = tl.exp2(scores - lse[:, None])
        v = _load(v_ptr, key, v_row, length, UPCAST, UNIT, BLOCK_K, HEAD_DIM, BLOCK_D)
        d_scores = p * (tl.dot(d_out, tl.trans(v), input_precision="ieee") - delta[:, None])
        d_q = tl.dot(d_scores.to(k.dtype), k, d_q, input_precision="ieee")

    d_q_ptr = _head(d_q_ptr, index, heads, out_batch, HEAD_DIM, 1)
    pointers, mask = _tile(d_q_ptr, start, out_row, length, 1, BLOCK_Q, HEAD_DIM, BLOCK_D)
    tl.store(pointers, (d_q * scale).to(d_q_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _key_gradient_kernel(
    d_out_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, lse_ptr, delta_ptr, d_k_ptr, d_v_ptr,
    scale, heads, length,
    d_out_batch, d_out_head, d_out_row,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, bias_head, bias_row,
    HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d_k and d_v. Scores are transposed here, [keys, queries], so that both products take them as they are."""
    blocks = tl.cdiv(length, BLOCK_K)
    index = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks * BLOCK_K
    k_ptr = _head(k_ptr, index, heads, k_batch, k_head, UNIT)
    k = _load(k_ptr, start, k_row, length, UPCAST, UNIT, BLOCK_K, HEAD_DIM, BLOCK_D)
    v_ptr = _head(v_ptr, index, heads, v_batch, v_head, UNIT)
    v = _load(v_ptr, start, v_row, length, UPCAST, UNIT, BLOCK_K, HEAD_DIM, BLOCK_D)
    q_ptr = _head(q_ptr, index, heads, q_batch, q_head, UNIT)
    d_out_ptr = _head(d_out_ptr, index, heads, d_out_batch, d_out_head, UNIT)
    bias_ptr += tl.cast(index % heads, tl.int64) * bias_head
    lse_ptr += tl.cast(index, tl.int64) * length
    delta_ptr += tl.cast(index, tl.int64) * length

    d_k = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    d_v = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for query in range(0, length, BLOCK_Q):
        rows = query + tl.arange(0, BLOCK_Q)
        q = _load(q_ptr, query, q_row, length, UPCAST, UNIT, BLOCK_Q, HEAD_DIM, BLOCK_D)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E)
        if HAS_BIAS:
            scores += tl.trans(_load_bias(bias_ptr, query, start, bias_row, length, BLOCK_Q, BLOCK_K))
        lse = tl.load(lse_ptr + rows, mask=rows < length, other=float("inf")) * LOG2E
        p = tl.exp2(scores - lse[None, :])  # 0 past the last query
        d_out = _load(d_out_ptr, query, d_out_row, length, UPCAST, UNIT, BLOCK_Q, HEAD_DIM, BLOCK_D)
        d_v = tl.dot(p.to(d_out.dtype), d_out, d_v, input_precision="ieee")
        delta = tl.load(delta_ptr + rows, mask=rows < length, other=0.0)
        d_scores = p * (tl.dot(v, tl.trans(d_out), input_precision="ieee") - delta[None, :])
        d_k = tl.dot(d_scores.to(q.dtype), q, d_k, input_precision="ieee")

    row = heads * HEAD_DIM
    d_k_ptr = _head(d_k_ptr, index, heads, tl.cast(length, tl.int64) * row, HEAD_DIM, 1)
    pointers, mask = _tile(d_k_ptr, start, row, length, 1, BLOCK_K, HEAD_DIM, BLOCK_D)
    tl.store(pointers, (d_k * scale).to(d_k_ptr.dtype.element_ty), mask=mask)
    d_v_ptr = _head(d_v_ptr, index, heads, tl.cast(length, tl.int64) * row, HEAD_DIM, 1)
    pointers, mask = _tile(d_v_ptr, start, row, length, 1, BLOCK_K, HEAD_DIM, BLOCK_D)
    tl.store(pointers, d_v.to(d_v_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bias_gradient_kernel(
    d_out_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, lse_ptr, delta_ptr, d_bias_ptr,
    scale, batch, heads, length,
    d_out_batch, d_out_head, d_out_row,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, bias_head, bias_row,
    UPCAST: tl.constexpr, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of one head's d_bias: the scores' gradient, summed over the batch in order."""
    key_blocks = tl.cdiv(length, BLOCK_K)
    tiles = tl.cdiv(length, BLOCK_Q) * key_blocks
    head = tl.program_id(0) // tiles
    start = tl.program_id(0) % tiles // key_blocks * BLOCK_Q
    key = tl.program_id(0) % key_blocks * BLOCK_K
    rows = start + tl.arange(0, BLOCK_Q)
    columns = key + tl.arange(0, BLOCK_K)
    bias_ptr += tl.cast(head, tl.int64) * bias_head
    bias = _load_bias(bias_ptr, start, key, bias_row, length, BLOCK_Q, BLOCK_K)

    d_bias = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for sample in range(batch):
        index = sample * heads + head
        sample_q = _head(q_ptr, index, heads, q_batch, q_head, UNIT)
        q = _load(sample_q, start, q_row, length, UPCAST, UNIT, BLOCK_Q, HEAD_DIM, BLOCK_D)
        sample_k = _head(k_ptr, index, heads, k_batch, k_head, UNIT)
        k = _load(sample_k, key, k_row, length, UPCAST, UNIT, BLOCK_K, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E) + bias
        vector = tl.cast(index, tl.int64) * length + rows
        lse = tl.load(lse_ptr + vector, mask=rows < length, other=float("inf")) * LOG2E
        p = tl.exp2(scores - lse[:, None])
        sample_d_out = _head(d_out_ptr, index, heads, d_out_batch, d_out_head, UNIT)
        d_out = _load(sample_d_out, start, d_out_row, length, UPCAST, UNIT, BLOCK_Q, HEAD_DIM, BLOCK_D)
        sample_v = _head(v_ptr, index, heads, v_batch, v_head, UNIT)
        v = _load(sample_v, key, v_row, length, UPCAST, UNIT, BLOCK_K, HEAD_DIM, BLOCK_D)
        delta = tl.load(delta_ptr + vector, mask=rows < length, other=0.0)
        d_bias += p * (tl.dot(d_out, tl.trans(v), input_precision="ieee") - delta[:, None])

    pointers = d_bias_ptr + (tl.cast(head, tl.int64) * length + rows[:, None]) * length + columns[None, :]
    mask = (rows < length)[:, None] & (columns < length)[None, :]
    tl.store(pointers, d_bias.to(d_bias_ptr.dtype.element_ty), mask=mask)


# --- Block sizes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    queries: int
    keys: int
    num_warps: int
    num_stages: int


FORWARD, HEAD, QUERY, KEY, BIAS = "forward", "d_q, d_k and d_v", "d_q", "d_k and d_v", "d_bias"


# (kernel, head dimension above 64, bias) for two-byte dtypes. Every row fits 99 KiB of shared memory (compute
# capabilities 8.6, 8.9, 12.0) and 255 registers on every architecture from 8.0: no spills.
BLOCKS = {
    (FORWARD, False, False): Blocks(128, 64, 8, 2),
    (FORWARD, False, True): Blocks(64, 64, 8, 2),
    (FORWARD, True, False): Blocks(128, 64, 8, 2),
    (FORWARD, True, True): Blocks(64, 64, 8, 2),
    (QUERY, False, False): Blocks(64, 32, 4, 2),
    (QUERY, False, True): Blocks(64, 64, 8, 2),
    (QUERY, True, False): Blocks(128, 32, 8, 2),
    (QUERY, True, True): Blocks(64, 64, 8, 2),
    (KEY, False, False): Blocks(32, 64, 4, 2),
    (KEY, False, True): Blocks(32, 64, 8, 2),
    (KEY, True, False): Blocks(64, 64, 8, 2),
    (KEY, True, True): Blocks(32, 64, 8, 2),
    (BIAS, False, True): Blocks(64, 64, 8, 1),
    (BIAS, True, True): Blocks(64, 32, 8, 1),
}


def _head_blocks(length: int, head_dim: int, dtype: torch.dtype) -> Blocks | None:
    """For the kernel that holds a head's every query, or None where they do not fit the registers."""
    queries = max(32, triton.next_power_of_2(length))
    if head_dim > 64 or queries > (64 if dtype == torch.float32 else 256):
        return None
    return Blocks(queries, 32, 8 if queries == 256 else 4, 1)


def _blocks(kernel: str, head_dim: int, dtype: torch.dtype, has_bias: bool) -> Blocks:
    if dtype == torch.float32:  # exact products run without tensor cores: small tiles
        return Blocks(32, 32, 4, 1)
    return BLOCKS[kernel, head_dim > 64, has_bias]


# --- Launchers --------------------------------------------------------------------------------------------------------


def _constants(blocks: Blocks, head_dim: int, dtype: torch.dtype) -> dict[str, int | bool]:
    return {
        "UPCAST": dispatch.interpreting() and dtype == torch.bfloat16,  # interpreted bfloat16 products are wrong
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
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


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, out: Tensor) -> Tensor:
    """Fills ``out`` (memory [B, N, heads, D]) and returns the log-sum-exp [B, heads, N]."""
    batch, heads, length, head_dim = q.shape
    has_bias = bias is not None
    bias = q if bias is None else _unit_last_stride(bias)  # without a bias the kernel never reads it
    unit, strides = _strides(q, k, v)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=q.device)
    blocks = _blocks(FORWARD, head_dim, q.dtype, has_bias)
    _forward_kernel[(triton.cdiv(length, blocks.queries) * batch * heads,)](
        q, k, v, bias, out, lse, scale, heads, length, *strides, *bias.stride()[:2],
        HAS_BIAS=has_bias, UNIT=unit, **_constants(blocks, head_dim, q.dtype),
        num_warps=blocks.num_warps, num_stages=blocks.num_stages,
    )  # fmt: skip
    return lse


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, out: Tensor, lse: Tensor,
    d_q: Tensor, d_k: Tensor, d_v: Tensor, d_bias: Tensor,
) -> None:  # fmt: skip
    """Fills the gradients (memory [B, N, heads, D]); ``d_bias`` unless it is empty."""
    batch, heads, length, head_dim = q.shape
    has_bias = bias is not None
    bias = q if bias is None else _unit_last_stride(bias)
    d_out = _unit_last_stride(d_out)
    unit, strides = _strides(d_out, q, k, v)
    one_block = None if has_bias else _head_blocks(length, head_dim, q.dtype)
    if one_block is not None:
        _head_gradient_kernel[(batch * heads,)](
            d_out, q, k, v, out, lse, d_q, d_k, d_v, scale, heads, length, *strides,
            UNIT=unit, **_constants(one_block, head_dim, q.dtype),
            num_warps=one_block.num_warps, num_stages=one_block.num_stages,
        )  # fmt: skip
        return

    delta = torch.empty_like(lse)
    sizes = (heads, length, *strides, *bias.stride()[:2])

    blocks = _blocks(QUERY, head_dim, q.dtype, has_bias)
    _query_gradient_kernel[(triton.cdiv(length, blocks.queries) * batch * heads,)](
        d_out, q, k, v, bias, out, lse, delta, d_q, scale, *sizes,
        HAS_BIAS=has_bias, UNIT=unit, **_constants(blocks, head_dim, q.dtype),
        num_warps=blocks.num_warps, num_stages=blocks.num_stages,
    )  # fmt: skip
    blocks = _blocks(KEY, head_dim, q.dtype, has_bias)
    _key_gradient_kernel[(triton.cdiv(length, blocks.keys) * batch * heads,)](
        d_out, q, k, v, bias, lse, delta, d_k, d_v, scale, *sizes,
        HAS_BIAS=has_bias, UNIT=unit, **_constants(blocks, head_dim, q.dtype),
        num_warps=blocks.num_warps, num_stages=blocks.num_stages,
    )  # fmt: skip
    if d_bias.numel() == 0:
        return
    blocks = _blocks(BIAS, head_dim, q.dtype, has_bias)
    _bias_gradient_kernel[(heads * triton.cdiv(length, blocks.queries) * triton.cdiv(length, blocks.keys),)](
        d_out, q, k, v, bias, lse, delta, d_bias, scale, batch, *sizes,
        UNIT=unit, **_constants(blocks, head_dim, q.dtype),
        num_warps=blocks.num_warps, num_stages=blocks.num_stages,
    )  # fmt: skip


# --- What ships -------------------------------------------------------------------------------------------------------


POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def compile_cases() -> list[CompileCase]:
    """Every kernel at the head dimensions of Swin, ViT and ViT-H and at the widest, with and without bias."""
    kernels = {
        FORWARD: _forward_kernel,
        QUERY: _query_gradient_kernel,
        KEY: _key_gradient_kernel,
        BIAS: _bias_gradient_kernel,
    }
    cases = []
    for dtype, head_dim in itertools.product(POINTERS, (32, 64, 80, 128)):
        for (name, kernel), has_bias in itertools.product(kernels.items(), (False, True)):
            if (name, has_bias) != (BIAS, False):
                blocks = _blocks(name, head_dim, dtype, has_bias)
                cases.append(_compile_case(name + ", bias" * has_bias, kernel, blocks, head_dim, dtype, has_bias))
        for length in (64, 128, 256):
            head_blocks = _head_blocks(length, head_dim, dtype)
            if head_blocks is not None:
                name = f"{HEAD}, N up to {length}"
                cases.append(_compile_case(name, _head_gradient_kernel, head_blocks, head_dim, dtype, False))
    return cases


def _compile_case(
    name: str, kernel: Any, blocks: Blocks, head_dim: int, dtype: torch.dtype, has_bias: bool
) -> CompileCase:
    constants = _constants(blocks, head_dim, dtype) | {"HAS_BIAS": has_bias, "UNIT": 8, "UPCAST": False}
    constexprs = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = dict.fromkeys((key for key in kernel.arg_names if key not in constexprs), "i32")
    signature |= {key: POINTERS[dtype] for key in signature if key.endswith("_ptr")}
    signature |= {key: "*fp32" for key in ("lse_ptr", "delta_ptr", "bias_ptr", "d_bias_ptr") if key in signature}
    return CompileCase(
        name=f"attention {name}, head dimension {head_dim}, {str(dtype).removeprefix('torch.')}",
        kernel=kernel,
        signature=signature | {"scale": "fp32"},
        constexprs=constexprs,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        dtype=dtype,
        has_dot=True,
    )
