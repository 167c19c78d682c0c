"""The decoder's last projection, the pixel shuffle and the reconstruction loss in one op.

The reconstruction is never in memory whole: the forward reduces it tile by tile to one number per sample; the backward
computes a tile again, as the gradient of its loss, multiplies it by weight and hidden, and drops it. Reads from the
public function down to the PyTorch reference; the Triton kernel is in `reconstruction_loss_triton`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastlocal.kernels import dispatch
from fastlocal.kernels.registration import autocast_dtype, register, without_autocast

Kind = Literal["mse", "l1", "smooth_l1"]
Reduction = Literal["mean", "sample"]
NORMALIZATION_EPS = 1e-6

# The tile of the reconstruction that exists at one time. On a card it grows with the number of multiprocessors: enough
# to fill the card and to hide the launches, and no more (16 MiB of bfloat16 on 132 of them, 2.5 MiB on 20).
TILE_ELEMENTS = 2**18
TILE_ELEMENTS_PER_MULTIPROCESSOR = 2**16


def reconstruction_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    upsample: int = 1,
    kind: Kind = "mse",
    normalize_target: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """Loss between ``target`` and the pixel-shuffled linear projection of ``hidden``, without the projection in memory.

    Equal to ``F.mse_loss(shuffle(F.linear(hidden, weight, bias)), target)`` (or ``l1_loss``, ``smooth_l1_loss`` with
    beta 1), where ``shuffle`` moves [B, h, w, (r_row, r_column, Ct)] to [B, (h, r_row), (w, r_column), Ct]: each token
    becomes an r × r patch, and row ``(i * r + j) * Ct + c`` of ``weight`` predicts channel ``c`` of its pixel (i, j).

    Args:
        hidden: [B, h, w, Ck], float16, bfloat16, float32 or float64, unit last stride. Tokens [B, N, Ck] go in as
            [B, N, 1, Ck]. The matrix products are computed in its dtype (under autocast in autocast's), everything
            else, sums included, in float32. float64 always runs the PyTorch reference, and in float64.
        weight: [r * r * Ct, Ck], any of these dtypes; its gradient is accumulated in float32 and rounded once.
        bias: [r * r * Ct] or None.
        target: [B, h * r, w * r, Ct], any of these dtypes and any strides (an NCHW image permuted to NHWC needs no
            copy). A constant: it gets no gradient.
        upsample: r, the side of the patch a token predicts.
        kind: ``"mse"``, ``"l1"`` or ``"smooth_l1"``.
        normalize_target: give each target position zero mean and unit (population) variance over its Ct channels, with
            eps 1e-6, as masked autoencoders do for patches [B, N, 1, r * r * 3] at ``upsample=1``.
        reduction: ``"mean"`` over everything, or ``"sample"``, the mean of each sample, which lets parts of a batch add
            up to the whole.

    Returns:
        float32 (float64 for float64 ``hidden``): a scalar for ``"mean"``, [B] for ``"sample"``. Differentiable once.

    Raises:
        ValueError: an argument's shape, stride, dtype, device or value is not one of the above, or ``target`` requires
            grad.
        RuntimeError: kernels="triton" was asked for and cannot run here.
    """
    _check(hidden, weight, bias, target, upsample, kind, reduction)
    # The autocast rule. Not torch.library's: that would copy the target, which is as large as the reconstruction, and
    # the weight, whose gradient would be rounded.
    if (autocast := autocast_dtype(hidden.device)) is not None and hidden.dtype != torch.float64:
        hidden = hidden.to(autocast)
    losses = _forward(hidden, weight, bias, target, upsample, kind, normalize_target, dispatch.choice())
    return losses.mean() if reduction == "mean" else losses


def workspace_bytes(hidden: Tensor, weight: Tensor, target: Tensor) -> int:
    """Bytes the op allocates and frees inside one call beside its outputs, at most, on the implementation chosen now.

    Reads shapes, dtypes and the device alone, so it works on fake tensors, whose memory a dispatch mode cannot see
    inside a custom op.
    """
    outputs, channels = weight.shape
    tokens, pixels = hidden.numel() // channels, outputs // target.shape[-1]
    elements = min(tokens, _tile_tokens(outputs, channels, hidden.device)) * max(outputs, channels)
    sums = _accumulate_dtype(hidden.dtype).itemsize
    if (
        _implementation(hidden, dispatch.choice()) == "triton"
    ):  # the gradient, hidden where it must be copied, and the kernel's small sums
        small = tokens * (8 * pixels + 4 * -(-outputs // 64)) + elements // 16
        tile = 2 * hidden.dtype.itemsize * elements + small
    else:  # the residual, the target and the normalized target
        tile = 3 * sums * elements
    cast_weight = weight.numel() * hidden.dtype.itemsize * (weight.dtype != hidden.dtype)
    return tile + cast_weight + 2 * sums * weight.numel()  # the weight gradient's sum and one addend


# --- Checks -----------------------------------------------------------------------------------------------------------

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, upsample: int, kind: str, reduction: str
) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}.")
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {', '.join(get_args(Reduction))}, got {reduction!r}.")
    if not isinstance(upsample, int) or upsample < 1:
        raise ValueError(f"upsample must be a positive integer, got {upsample!r}.")
    tensors = {"hidden": hidden, "weight": weight, "bias": bias, "target": target}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}.")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on hidden's device, {hidden.device}, got {tensor.device}.")
    if hidden.ndim != 4 or hidden.numel() == 0:
        raise ValueError(f"hidden must be [B, h, w, Ck] with no empty dimension, got {list(hidden.shape)}.")
    if hidden.stride(-1) != 1 and hidden.shape[-1] > 1:
        raise ValueError(f"hidden must have unit stride in its last dimension, got strides {hidden.stride()}.")
    batch, height, width, channels = hidden.shape
    expected = [batch, height * upsample, width * upsample]
    if target.ndim != 4 or list(target.shape[:3]) != expected or target.shape[3] == 0:
        raise ValueError(
            f"target must be [{', '.join(map(str, expected))}, Ct] for hidden {list(hidden.shape)} and upsample "
            f"{upsample}, got {list(target.shape)}."
        )
    outputs = upsample**2 * target.shape[3]
    if list(weight.shape) != [outputs, channels]:
        raise ValueError(
            f"weight must be [upsample² · Ct, Ck] = [{outputs}, {channels}] for upsample {upsample}, "
            f"target {list(target.shape)} and hidden {list(hidden.shape)}, got {list(weight.shape)}."
        )
    if bias is not None and list(bias.shape) != [outputs]:
        raise ValueError(f"bias must be [upsample² · Ct] = [{outputs}] or None, got {list(bias.shape)}.")
    if target.requires_grad:
        raise ValueError("target must not require grad: the loss treats it as a constant, so pass target.detach().")


# --- Registration -----------------------------------------------------------------------------------------------------

# What to keep for the backward: the inputs, or the gradients for a unit upstream gradient, computed in the forward? The
# second saves one of four matrix products (6 NKM FLOPs instead of 8 for N tokens, Ck = K, r²·Ct = M: 1-3 % of the step
# of a Swin stage), but holds d_hidden and a float32 d_weight where the first holds hidden: never fewer bytes. It cannot
# serve one upstream gradient per sample either, and would do the backward's work in evaluation. So: the inputs.


_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, int upsample, str kind, bool normalize_target, "
    "str kernels"
)


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    upsample: int,
    kind: str,
    normalize_target: bool,
    kernels: dispatch.Choice,
) -> Tensor:
    """The mean loss of each sample, [B]."""
    weight = weight.to(hidden.dtype)
    patches = _patches(target, upsample)
    if _implementation(hidden, kernels) == "triton":
        from fastlocal.kernels import reconstruction_loss_triton

        losses = reconstruction_loss_triton.loss_sums(hidden, weight, bias, patches, kind, normalize_target)
    else:
        losses = hidden.new_zeros(hidden.shape[0], dtype=_accumulate_dtype(hidden.dtype))
        for tile in _tiles(hidden, weight.shape[0]):
            losses[tile[0]] += _reference_loss(hidden[tile], weight, bias, patches[tile], kind, normalize_target)
    return losses.div_(math.prod(target.shape[1:]))


def _fake(hidden: Tensor, *_: object) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=_accumulate_dtype(hidden.dtype))


def _run_backward(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    upsample: int,
    kind: str,
    normalize_target: bool,
    kernels: dispatch.Choice,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; those not ``needed`` are empty."""
    needs_hidden, needs_weight, needs_bias = needed
    sums = _accumulate_dtype(hidden.dtype)
    d_hidden = torch.empty(hidden.shape if needs_hidden else 0, dtype=hidden.dtype, device=hidden.device)
    d_weight = d_bias = None
    tile_gradient: Callable[..., tuple[Tensor, Tensor | None]] = _reference_gradient
    if _implementation(hidden, kernels) == "triton":
        from fastlocal.kernels import reconstruction_loss_triton

        tile_gradient = reconstruction_loss_triton.tile_gradient

    upstream = upstream / math.prod(target.shape[1:])
    cast_weight = weight.to(hidden.dtype)
    patches = _patches(target, upsample)
    for tile in _tiles(hidden, weight.shape[0]):
        tokens = _in_tile(hidden, tile)
        gradient, bias_sum = tile_gradient(
            tokens,
            cast_weight,
            bias,
            _in_tile(patches, tile),
            _in_tile(upstream, tile[:1]),
            kind,
            normalize_target,
            needs_bias,
        )
        if needs_hidden:
            torch.mm(gradient, cast_weight, out=_in_tile(d_hidden, tile).view(-1, hidden.shape[-1]))
        if needs_weight:
            d_weight = _add_product(d_weight, gradient, tokens.reshape(-1, hidden.shape[-1]), sums)
        if bias_sum is not None:
            d_bias = _add(d_bias, bias_sum)
    d_weight = weight.new_empty(0) if d_weight is None else d_weight.to(weight.dtype)
    d_bias = weight.new_empty(0) if d_bias is None or bias is None else d_bias.to(bias.dtype)
    return d_hidden, d_weight, d_bias


def _fake_backward(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    upsample: int,
    kind: str,
    normalize_target: bool,
    kernels: str,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    d_hidden = torch.empty(hidden.shape if needed[0] else 0, dtype=hidden.dtype, device=hidden.device)
    d_weight = weight.new_empty(weight.shape if needed[1] else 0)
    d_bias = (weight if bias is None else bias).new_empty(weight.shape[0] if needed[2] else 0)
    return d_hidden, d_weight, d_bias


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    hidden, weight, bias, target, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, bias, target)


def _autograd(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:3]
    gradients = _backward(upstream, *ctx.saved_tensors, *ctx.options, needed)
    return *(gradient if need else None for gradient, need in zip(gradients, needed, strict=True)), *[None] * 5


_backward = register(
    f"reconstruction_loss_backward(Tensor upstream, {_INPUTS}, bool[] needed) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_forward = register(
    f"reconstruction_loss({_INPUTS}) -> Tensor", _run, _fake, setup_context=_setup_context, backward=_autograd
)


@register_flop_formula(torch.ops.fastlocal.reconstruction_loss)
def _forward_flops(hidden: torch.Size, weight: torch.Size, *args: object, **kwargs: object) -> int:
    return 2 * math.prod(hidden[:3]) * math.prod(weight)


@register_flop_formula(torch.ops.fastlocal.reconstruction_loss_backward)
def _backward_flops(upstream: torch.Size, hidden: torch.Size, weight: torch.Size, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    needs_hidden, needs_weight, _ = args[-1]
    return _forward_flops(hidden, weight) * (1 + needs_hidden + needs_weight)


def _implementation(hidden: Tensor, kernels: dispatch.Choice) -> str:
    if hidden.dtype == torch.float64:
        return "reference"
    return dispatch.implementation(hidden.device, None, kernels)


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _patches(target: Tensor, upsample: int) -> Tensor:
    """View [B, h·r, w·r, Ct] as [B, h, w, r, r, Ct]: the patch of each token."""
    batch, rows, columns, channels = target.shape
    return target.view(batch, rows // upsample, upsample, columns // upsample, upsample, channels).transpose(2, 3)


def _tile_tokens(outputs: int, channels: int, device: torch.device) -> int:
    elements = TILE_ELEMENTS
    if device.type == "cuda":
        elements = TILE_ELEMENTS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, elements // max(outputs, channels))


def _tiles(hidden: Tensor, outputs: int) -> Iterator[tuple[slice, slice, slice]]:
    """Cut tokens [B, h, w] into boxes of at most `_tile_tokens`: whole samples, else whole rows of one sample."""
    *shape, channels = hidden.shape
    tokens = _tile_tokens(outputs, channels, hidden.device)
    steps: list[int] = []
    for size in reversed(shape):
        steps.insert(0, min(size, max(1, tokens)))
        tokens //= size
    ranges = [
        [slice(None)] if step == n else [slice(i, i + step) for i in range(0, n, step)]
        for n, step in zip(shape, steps, strict=True)
    ]
    yield from itertools.product(*ranges)


def _in_tile(tensor: Tensor, tile: tuple[slice, ...]) -> Tensor:
    """``tensor[tile]``, without a view where that is all of it: with one tile, views would cost the processor more than the
    products."""
    return tensor if all(part == slice(None) for part in tile) else tensor[tile]


def _add(total: Tensor | None, addend: Tensor) -> Tensor:
    """``total += addend``; the first addend is the total, which saves two launches where there is one tile."""
    return addend if total is None else total.add_(addend)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``total += leftᵀ · right``, with every sum in ``dtype``."""
    if left.is_cuda and left.dtype != dtype:
        return _add(total, torch.mm(left.t(), right, out_dtype=dtype))
    left, right = left.t().to(dtype), right.to(dtype)
    return left @ right if total is None else total.addmm_(left, right)


# --- Reference: one tile in plain PyTorch -----------------------------------------------------------------------------


def _reference_residual(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, normalize: bool) -> Tensor:
    """Reconstruction minus target for tokens [b, h, w, Ck] and patches [b, h, w, r, r, Ct]: [b, tokens, r·r·Ct]."""
    with without_autocast(hidden.device):
        residual = (hidden.flatten(1, 2) @ weight.t()).to(_accumulate_dtype(hidden.dtype))
    if bias is not None:
        residual += bias
    target = target.to(residual.dtype, memory_format=torch.contiguous_format)
    if normalize:
        target = F.layer_norm(target, target.shape[-1:], eps=NORMALIZATION_EPS)
    return residual.sub_(target.reshape(residual.shape))


def _reference_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, kind: str, normalize: bool
) -> Tensor:
    """The loss of each sample's tokens, summed: [b]."""
    residual = _reference_residual(hidden, weight, bias, target, normalize)
    if kind == "mse":
        residual.square_()
    elif kind == "l1":
        residual.abs_()
    else:
        clipped = residual.clamp(-1, 1)
        residual.sub_(clipped, alpha=0.5).mul_(clipped)  # r²/2 inside [−1, 1], |r| − 1/2 outside
    return residual.sum(dim=(1, 2))


def _reference_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    upstream: Tensor,
    kind: str,
    normalize: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor | None]:
    """The loss's gradient by the reconstruction, [tokens, r·r·Ct] in hidden's dtype, for ``upstream`` [b]; if it is needed,
    its sum over the tokens."""
    slope = _reference_residual(hidden, weight, bias, target, normalize)
    if kind == "mse":
        slope.mul_(2)
    elif kind == "l1":
        not_a_number = slope.isnan()
        slope.sign_().masked_fill_(not_a_number, math.nan)  # sign(NaN) is 0: a diverged loss with a gradient of zeros
    else:
        slope.clamp_(-1, 1)
    slope = slope.mul_(upstream[:, None, None]).flatten(0, 1)
    return slope.to(hidden.dtype), slope.sum(0) if needs_bias else None
