"""The Triton kernel of `reconstruction_loss`: a matrix product whose epilogue reads the target as the shuffle lays it.

One kernel serves both directions. Forward, the epilogue reduces a tile of the reconstruction to one loss per token and
block of outputs; no tile leaves the chip. Backward, it turns the tile into the loss's gradient and stores that, for a
few thousand tokens at a time: the two products that follow are plain ones, and cuBLAS's. Nothing is atomic.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlocal.kernels import dispatch
from fastlocal.kernels.cases import CompileCase, cdiv, launch_options

EPS: tl.constexpr = tl.constexpr(1e-6)


@triton.jit
def _offset(token, height, width, batch_stride, row_stride, column_stride):
    """Where tokens start in a tensor whose first dimensions are [B, height, width]. In 64 bits, as all that a stride
    multiplies: in a layout with the channels first, one stride may be nearly as large as the tensor."""
    sample = tl.cast(token // (height * width), tl.int64)
    row = tl.cast(token // width % height, tl.int64)
    return sample * batch_stride + row * row_stride + tl.cast(token % width, tl.int64) * column_stride


@triton.jit
def _patch_offset(pixel, UPSAMPLE: tl.constexpr, row_stride, column_stride):
    """Where pixels start in the patch of a token."""
    row, column = tl.cast(pixel // UPSAMPLE, tl.int64), tl.cast(pixel % UPSAMPLE, tl.int64)
    return row * row_stride + column * column_stride


# One binary for all image sizes: the rows of hidden are known to be aligned by UNIT.
@triton.jit(do_not_specialize=["tokens", "height", "width", "channels", "hidden_batch", "hidden_row", "hidden_column"])
def _residual_kernel(
    hidden_ptr, weight_ptr, bias_ptr, target_ptr, mean_ptr, rstd_ptr, upstream_ptr, d_bias_ptr, out_ptr,
    tokens, height, width, channels,
    hidden_batch, hidden_row, hidden_column,
    target_batch, target_row, target_column, target_patch_row, target_patch_column, target_channel,
    BACKWARD: tl.constexpr, KIND: tl.constexpr, HAS_BIAS: tl.constexpr, SUM_BIAS: tl.constexpr, NORMALIZE: tl.constexpr,
    UPCAST: tl.constexpr, UNIT: tl.constexpr, UPSAMPLE: tl.constexpr, TARGET_CHANNELS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    OUTPUTS: tl.constexpr = UPSAMPLE * UPSAMPLE * TARGET_CHANNELS
    # Blocks of outputs vary fastest: hidden and target stream through the cache once, the weight stays in it.
    blocks: tl.constexpr = (OUTPUTS + BLOCK_OUTPUTS - 1) // BLOCK_OUTPUTS
    block = tl.program_id(0) % blocks
    token = tl.program_id(0) // blocks * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    output = block * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    token_mask = token < tokens
    output_mask = output < OUTPUTS
    mask = token_mask[:, None] & output_mask[None, :]

    hidden_ptr += _offset(token, height, width, hidden_batch, hidden_row, hidden_column)[:, None] * UNIT
    channels *= UNIT
    weight_ptr += tl.cast(output, tl.int64)[:, None] * channels
    residual = tl.zeros([BLOCK_TOKENS, BLOCK_OUTPUTS], tl.float32)
    for start in range(0, channels, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        channel_mask = (channel < channels)[None, :]
        hidden = tl.load(hidden_ptr + channel[None, :], mask=token_mask[:, None] & channel_mask, other=0.0)
        weight = tl.load(weight_ptr + channel[None, :], mask=output_mask[:, None] & channel_mask, other=0.0)
        if UPCAST:
            hidden = hidden.to(tl.float32)
            weight = weight.to(tl.float32)
        residual = tl.dot(hidden, tl.trans(weight), residual, input_precision="ieee")
    if HAS_BIAS:
        residual += tl.load(bias_ptr + output, mask=output_mask, other=0.0).to(tl.float32)[None, :]

    pixel = output // TARGET_CHANNELS
    patch = _patch_offset(pixel, UPSAMPLE, target_patch_row, target_patch_column)
    patch += tl.cast(output % TARGET_CHANNELS, tl.int64) * target_channel
    position = _offset(token, height, width, target_batch, target_row, target_column)
    target = tl.load(target_ptr + position[:, None] + patch[None, :], mask=mask, other=0.0).to(tl.float32)
    if NORMALIZE:
        statistic = tl.cast(token, tl.int64)[:, None] * (UPSAMPLE * UPSAMPLE) + pixel[None, :]
        target -= tl.load(mean_ptr + statistic, mask=mask, other=0.0)
        target *= tl.load(rstd_ptr + statistic, mask=mask, other=0.0)
    residual = tl.where(mask, residual - target, 0.0)

    # tl.minimum and tl.maximum would make a NaN a number, and a diverged loss have a gradient that looks well.
    clipped = tl.where(residual > 1.0, 1.0, tl.where(residual < -1.0, -1.0, residual))
    if BACKWARD:
        if KIND == "mse":
            gradient = residual * 2.0
        elif KIND == "l1":
            gradient = tl.where(residual > 0.0, 1.0, tl.where(residual < 0.0, -1.0, residual))  # 0 and NaN stay
        else:
            gradient = clipped
        gradient *= tl.load(upstream_ptr + token // (height * width), mask=token_mask, other=0.0)[:, None]
        if SUM_BIAS:
            row = tl.cast(tl.program_id(0) // blocks, tl.int64) * OUTPUTS
            tl.store(d_bias_ptr + row + output, tl.sum(gradient, 0), mask=output_mask)
        out_ptr += tl.cast(token, tl.int64)[:, None] * OUTPUTS + output[None, :]
        tl.store(out_ptr, gradient.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        if KIND == "mse":
            loss = residual * residual
        elif KIND == "l1":
            loss = tl.abs(residual)
        else:
            loss = (residual - 0.5 * clipped) * clipped  # r²/2 inside [-1, 1], |r| - 1/2 outside
        tl.store(out_ptr + tl.cast(block, tl.int64) * tokens + token, tl.sum(loss, 1), mask=token_mask)


@triton.jit(do_not_specialize=["tokens", "height", "width"])
def _statistics_kernel(
    target_ptr, mean_ptr, rstd_ptr,
    tokens, height, width,
    target_batch, target_row, target_column, target_patch_row, target_patch_column, target_channel,
    UPSAMPLE: tl.constexpr, TARGET_CHANNELS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / standard deviation of each target position over its channels, in the order [token, pixel]."""
    position = tl.cast(tl.program_id(0), tl.int64) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
    token = position // (UPSAMPLE * UPSAMPLE)
    pixel = position % (UPSAMPLE * UPSAMPLE)
    position_mask = token < tokens
    target_ptr += _offset(token, height, width, target_batch, target_row, target_column)[:, None]
    target_ptr += _patch_offset(pixel, UPSAMPLE, target_patch_row, target_patch_column)[:, None]
    total = tl.zeros([BLOCK_POSITIONS], tl.float32)
    for start in range(0, TARGET_CHANNELS, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        mask = position_mask[:, None] & (channel < TARGET_CHANNELS)[None, :]
        offset = tl.cast(channel, tl.int64)[None, :] * target_channel
        target = tl.load(target_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(target, 1)
    mean = total / TARGET_CHANNELS
    squares = tl.zeros([BLOCK_POSITIONS], tl.float32)
    for start in range(0, TARGET_CHANNELS, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        mask = position_mask[:, None] & (channel < TARGET_CHANNELS)[None, :]
        offset = tl.cast(channel, tl.int64)[None, :] * target_channel
        target = tl.load(target_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        centered = tl.where(mask, target - mean[:, None], 0.0)
        squares += tl.sum(centered * centered, 1)
    tl.store(mean_ptr + position, mean, mask=position_mask)
    tl.store(rstd_ptr + position, 1.0 / tl.sqrt(squares / TARGET_CHANNELS + EPS), mask=position_mask)


# --- Block sizes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    tokens: int
    outputs: int
    channels: int
    num_warps: int
    num_stages: int


STATISTICS = {"BLOCK_POSITIONS": 32, "BLOCK_CHANNELS": 128}


def _blocks(outputs: int, dtype: torch.dtype, normalize: bool) -> Blocks:
    """Sizes that fit 99 KiB of shared memory (compute capabilities 8.6, 8.9, 12.0) and 255 registers everywhere."""
    if dtype == torch.float32:  # exact products run without tensor cores: small tiles
        return Blocks(64, 32, 32, 4, 1)
    if outputs <= 64 or normalize:  # the statistics of a wider tile do not fit the registers
        return Blocks(64, 64, 32, 4, 3)
    return Blocks(64, 128, 64, 8, 3)


# --- Launchers --------------------------------------------------------------------------------------------------------


def loss_sums(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, patches: Tensor, kind: str, normalize: bool
) -> Tensor:
    """The loss of each sample's tokens, summed: [B]. ``patches`` is the target as [B, h, w, r, r, Ct]."""
    outputs, (batch, height, width, _) = weight.shape[0], hidden.shape
    blocks = cdiv(outputs, _blocks(outputs, hidden.dtype, normalize).outputs)
    losses = torch.empty((blocks, batch, height * width), dtype=torch.float32, device=hidden.device)
    _launch(hidden, weight, bias, patches, losses, losses, kind, normalize, backward=False)
    return losses.sum((0, 2))


def tile_gradient(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, patches: Tensor, upstream: Tensor, kind: str, normalize: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The loss's gradient by the reconstruction, [tokens, r·r·Ct] in hidden's dtype, for ``upstream`` [B]; if it is needed,
    its sum over the tokens."""
    tokens, outputs = math.prod(hidden.shape[:3]), weight.shape[0]
    gradient = torch.empty((tokens, outputs), dtype=hidden.dtype, device=hidden.device)
    sums = None
    if needs_bias:
        blocks = cdiv(tokens, _blocks(outputs, hidden.dtype, normalize).tokens)
        sums = torch.empty((blocks, outputs), dtype=torch.float32, device=hidden.device)
    _launch(hidden, weight, bias, patches, upstream, gradient, kind, normalize, backward=True, bias_sums=sums)
    return gradient, None if sums is None else sums.sum(0)


def _launch(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, patches: Tensor, upstream: Tensor, out: Tensor,
    kind: str, normalize: bool, *, backward: bool, bias_sums: Tensor | None = None,
) -> None:  # fmt: skip
    batch, height, width, upsample, _, target_channels = patches.shape
    tokens = batch * height * width
    mean = rstd = out
    if normalize:
        positions = tokens * upsample**2
        mean, rstd = (torch.empty(positions, dtype=torch.float32, device=hidden.device) for _ in range(2))
        _statistics_kernel[(cdiv(positions, STATISTICS["BLOCK_POSITIONS"]),)](
            patches, mean, rstd, tokens, height, width, *patches.stride(),
            UPSAMPLE=upsample, TARGET_CHANNELS=target_channels, **STATISTICS, **launch_options(hidden.device, 4, 1),
        )  # fmt: skip
    # 8 elements of 2 bytes are one 16-byte load: a kernel that sees ``stride * 8`` knows that its rows are aligned.
    strides = (hidden.shape[-1], *hidden.stride()[:3])
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    blocks = _blocks(weight.shape[0], hidden.dtype, normalize)
    _residual_kernel[(cdiv(tokens, blocks.tokens) * cdiv(weight.shape[0], blocks.outputs),)](
        hidden, weight.contiguous(), out if bias is None else bias.contiguous(), patches, mean, rstd, upstream,
        out if bias_sums is None else bias_sums, out,
        tokens, height, width, *(stride // unit for stride in strides), *patches.stride(),
        BACKWARD=backward, KIND=kind, HAS_BIAS=bias is not None, SUM_BIAS=bias_sums is not None, NORMALIZE=normalize,
        UPCAST=dispatch.interpreting() and hidden.dtype == torch.bfloat16,  # interpreted bfloat16 products are wrong
        UNIT=unit, UPSAMPLE=upsample, TARGET_CHANNELS=target_channels,
        BLOCK_TOKENS=blocks.tokens, BLOCK_OUTPUTS=blocks.outputs, BLOCK_CHANNELS=blocks.channels,
        **launch_options(hidden.device, blocks.num_warps, blocks.num_stages),
    )  # fmt: skip


# --- What ships -------------------------------------------------------------------------------------------------------


# (upsample, Ct) of linear decoders: Swin-T's four stages, ViT-B to features and to the image.
GEOMETRIES = ((4, 3), (2, 96), (2, 192), (2, 384), (1, 768), (16, 3))
KINDS = ("mse", "l1", "smooth_l1")
POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def compile_cases() -> list[CompileCase]:
    """Both directions of every geometry with mse, and of one geometry with every kind on a normalized target."""
    variants = [(geometry, "mse", False) for geometry in GEOMETRIES] + [((2, 96), kind, True) for kind in KINDS]
    cases = []
    for dtype, ((upsample, target_channels), kind, normalize), backward in itertools.product(
        POINTERS, variants, (False, True)
    ):
        blocks = _blocks(upsample**2 * target_channels, dtype, normalize)
        constexprs = {
            "BACKWARD": backward, "KIND": kind, "HAS_BIAS": True, "SUM_BIAS": backward,
            "NORMALIZE": normalize, "UPCAST": False, "UNIT": 8,
            "UPSAMPLE": upsample, "TARGET_CHANNELS": target_channels, "target_channel": 1,
            "BLOCK_TOKENS": blocks.tokens, "BLOCK_OUTPUTS": blocks.outputs, "BLOCK_CHANNELS": blocks.channels,
        }  # fmt: skip
        name = f"{'gradient' if backward else 'loss'}, {kind}, {upsample} x {upsample} x {target_channels}"
        low_precision = {"hidden_ptr", "weight_ptr", "target_ptr"} | ({"out_ptr"} if backward else set())
        cases.append(
            _compile_case(
                name + ", normalized" * normalize,
                _residual_kernel,
                constexprs,
                low_precision,
                dtype,
                blocks.num_warps,
                blocks.num_stages,
                has_dot=True,
            )
        )
    for dtype in POINTERS:
        constexprs = {"UPSAMPLE": 2, "TARGET_CHANNELS": 96, "target_channel": 1, **STATISTICS}
        cases.append(
            _compile_case(
                "target statistics", _statistics_kernel, constexprs, {"target_ptr"}, dtype, 4, 1, has_dot=False
            )
        )
    return cases


def _compile_case(
    name: str, kernel: Any, constexprs: dict[str, Any], low_precision: set[str], dtype: torch.dtype,
    num_warps: int, num_stages: int, *, has_dot: bool,
) -> CompileCase:  # fmt: skip
    signature = dict.fromkeys((argument for argument in kernel.arg_names if argument not in constexprs), "i32")
    signature |= {argument: "*fp32" for argument in signature if argument.endswith("_ptr")}
    signature |= dict.fromkeys(low_precision, POINTERS[dtype])
    return CompileCase(
        name=f"reconstruction_loss {name}, {str(dtype).removeprefix('torch.')}",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=num_warps,
        num_stages=num_stages,
        dtype=dtype,
        has_dot=has_dot,
    )
