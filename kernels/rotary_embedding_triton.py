"""The Triton kernel of `rotary_embedding`: each program turns the tokens of one head that lie in one block."""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlocal.kernels.cases import CompileCase, cdiv, launch_options, next_power_of_2

BLOCK_ELEMENTS = 4096  # 32 in each of 128 threads
NUM_WARPS = 4


# One binary for all image sizes.
@triton.jit(do_not_specialize=["heads", "tokens", "prefix", "x_batch", "x_head", "x_token"])
def _rotate_kernel(
    x_ptr, table_ptr, out_ptr,
    heads, tokens, prefix,
    x_batch, x_head, x_token,
    HALF: tl.constexpr, INVERSE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """out = x · cosine ∓ x[partner] · sine, the partner being the other channel of the pair. The inverse takes the sine from
    the partner too, and the other sign: that is the transpose."""
    blocks = tl.cdiv(tokens, BLOCK_TOKENS)
    head = tl.cast(tl.program_id(0) // blocks, tl.int64)
    token = tl.program_id(0) % blocks * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    channel = tl.arange(0, BLOCK_DIM)
    if HALF:
        first = channel < HEAD_DIM // 2
        partner = tl.where(first, channel + HEAD_DIM // 2, channel - HEAD_DIM // 2)
    else:
        first = channel % 2 == 0
        partner = channel ^ 1
    mask = (token < tokens)[:, None] & (channel < HEAD_DIM)[None, :]

    has_position = mask & (token >= prefix)[:, None]
    table_ptr += tl.cast(token - prefix, tl.int64)[:, None] * (2 * HEAD_DIM)
    sine = tl.load(table_ptr + (partner if INVERSE else channel)[None, :], mask=has_position, other=0.0)
    cosine = tl.load(table_ptr + HEAD_DIM + channel[None, :], mask=has_position, other=1.0)
    sine = tl.where((first != INVERSE)[None, :], -sine.to(tl.float32), sine.to(tl.float32))

    x_ptr += head // heads * x_batch + head % heads * x_head + tl.cast(token, tl.int64)[:, None] * x_token
    x = tl.load(x_ptr + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    other = tl.load(x_ptr + partner[None, :], mask=mask, other=0.0).to(tl.float32)
    out = x * cosine.to(tl.float32) + other * sine
    out_ptr += (head * tokens + token[:, None]) * HEAD_DIM + channel[None, :]
    tl.store(out_ptr, out.to(out_ptr.dtype.element_ty), mask=mask)


# --- Launcher ---------------------------------------------------------------------------------------------------------


def rotate(x: Tensor, table: Tensor, prefix: int, half: bool, inverse: bool) -> Tensor:
    """See `rotary_embedding`; ``inverse`` is the gradient's direction."""
    batch, heads, tokens, head_dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    constants = _constants(head_dim, half, inverse)
    _rotate_kernel[(batch * heads * cdiv(tokens, constants["BLOCK_TOKENS"]),)](
        x, table.contiguous(), out, heads, tokens, prefix, *x.stride()[:3],
        **constants, **launch_options(x.device, NUM_WARPS, 1),
    )  # fmt: skip
    return out


def _constants(head_dim: int, half: bool, inverse: bool) -> dict[str, int | bool]:
    width = next_power_of_2(head_dim)
    return {
        "HALF": half,
        "INVERSE": inverse,
        "HEAD_DIM": head_dim,
        "BLOCK_TOKENS": max(1, BLOCK_ELEMENTS // width),
        "BLOCK_DIM": width,
    }


# --- What ships -------------------------------------------------------------------------------------------------------

POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def compile_cases() -> list[CompileCase]:
    """Both pairings and directions of EVA-02's and DINOv3's 64 channels, and of 80."""
    cases = []
    for dtype, head_dim, half, inverse in itertools.product(POINTERS, (64, 80), (False, True), (False, True)):
        constants = _constants(head_dim, half, inverse)
        signature = dict.fromkeys((name for name in _rotate_kernel.arg_names if name not in constants), "i32")
        signature |= {"x_ptr": POINTERS[dtype], "table_ptr": "*fp32", "out_ptr": POINTERS[dtype]}
        direction, pairs = "gradient" if inverse else "forward", "halves" if half else "neighbours"
        cases.append(
            CompileCase(
                name=f"rotary_embedding {direction}, pairs of {pairs}, head dimension {head_dim}, {str(dtype)[6:]}",
                kernel=_rotate_kernel,
                signature=signature,
                constexprs=constants,
                num_warps=NUM_WARPS,
                num_stages=1,
                dtype=dtype,
                has_dot=False,
            )
        )
    return cases
