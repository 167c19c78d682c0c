"""What the kernel benchmarks run: each fused op at the shapes of real models, beside its rivals on the same work.

Linear layers around attention are the same for everyone and are left out: where timm calls ``qkv`` a stand-in returns
its output, made beforehand, and ``proj`` passes through. What timm does between them is timm's own code, roll,
partition and reverse included.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlocal.kernels import reconstruction_loss, rotary_embedding
from fastlocal.kernels.attention import attention
from fastlocal.kernels.window_attention import window_attention

OURS, UNFUSED, FUSED, FLEX, COMPILED = "fastlocal", "timm unfused", "timm SDPA", "FlexAttention", "torch.compile"


@dataclass(frozen=True)
class Provider:
    """One implementation: ``run`` computes the output from tensors it holds, of which ``leaves`` get gradients."""

    run: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]


@dataclass(frozen=True)
class Problem:
    """One op on one set of inputs.

    ``forward_bytes`` and ``backward_bytes`` are the compulsory traffic: inputs read once, outputs written once. The
    backward reads the inputs again and the output's gradient, and writes a gradient for each input; whatever else an
    implementation saves (a log-sum-exp, the output) is its own choice and counts against it.
    """

    providers: Mapping[str, Provider]
    forward_bytes: int
    backward_bytes: int


@dataclass(frozen=True)
class Workload:
    """An op at the shape a real model gives it; ``problem(batch, dtype, device)`` makes its inputs."""

    op: str
    shape: str  # where the shape comes from, e.g. "Swin-T stage 1"
    problem: Callable[[int, torch.dtype, torch.device], Problem]

    @property
    def name(self) -> str:
        return f"{self.op}, {self.shape}"


def workloads() -> list[Workload]:
    """Swin-T's four stages at 224 pixels (shifted, except where one window is all), ViT-B/16, and the queries of the two
    models of its size that turn them."""
    found = []
    for stage in range(4):
        name = f"Swin-T stage {stage + 1}"
        size, heads = 56 >> stage, 3 << stage
        found.append(Workload("window_attention", name, _window_attention(size, heads, shift=3 if size > 7 else 0)))
    found.append(Workload("attention", "ViT-B/16", _attention(tokens=197, heads=12, head_dim=64)))
    found.append(Workload("rotary_embedding", "EVA-02-B/14", _rotary_embedding(tokens=257, prefix=1, half=False)))
    found.append(Workload("rotary_embedding", "DINOv3-B/16", _rotary_embedding(tokens=201, prefix=5, half=True)))
    # Each stage's output back to its input, as the local module that ends there does; stage 1 gives the image.
    for stage in range(4):
        channels, upsample = 96 << stage, 2 if stage else 4
        shape = (56 >> stage, channels, upsample, channels // 2 if stage else 3)
        found.append(Workload("reconstruction_loss", f"Swin-T stage {stage + 1}", _reconstruction_loss(*shape)))
    found.append(Workload("reconstruction_loss", "ViT-B/16", _reconstruction_loss(14, 768, 1, 768)))
    return found


def _normal(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal values that bfloat16 holds exactly: one seed makes the same problem in every dtype."""
    return torch.randn(shape, device=device).to(torch.bfloat16).to(dtype)


def _parameter(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- Window attention -------------------------------------------------------------------------------------------------


def _window_attention(size: int, heads: int, shift: int, window: int = 7, head_dim: int = 32) -> Callable[..., Problem]:
    """[B, size, size, 3C] cut into windows, as in `SwinTransformerBlock._attn` between ``qkv`` and ``proj``."""

    def problem(batch: int, dtype: torch.dtype, device: torch.device) -> Problem:
        from timm.models.swin_transformer import SwinTransformerBlock, window_partition

        channels = heads * head_dim
        qkv = _normal(batch, size, size, 3 * channels, dtype=dtype, device=device).requires_grad_()
        table = _normal((2 * window - 1) ** 2, heads, dtype=_parameter(dtype), device=device).requires_grad_()

        def ours() -> Tensor:
            return window_attention(qkv, table, num_heads=heads, window_size=window, shift=shift)

        # timm norms, rolls and partitions x before it projects it. x is taken in `dtype`, as with timm's fast norm;
        # without, it would be float32 under autocast and timm would move more.
        x = _normal(batch, size, size, channels, dtype=dtype, device=device).requires_grad_()
        rolled = torch.roll(qkv.detach(), (-shift, -shift), (1, 2))
        windows = window_partition(rolled, (window, window)).flatten(1, 2).requires_grad_()
        d_x = _normal(*windows.shape[:2], channels, dtype=dtype, device=device)

        def timm_block(fused: bool) -> Any:
            with torch.device(device):
                block: Any = SwinTransformerBlock(channels, (size, size), heads, window_size=window, shift_size=shift)
            block.attn.fused_attn = fused
            block.attn.relative_position_bias_table = nn.Parameter(table.detach())
            block.attn.qkv = _Precomputed(windows, d_x)
            block.attn.proj = nn.Identity()
            return block

        def timm_provider(block: Any, function: Callable[[Tensor], Tensor] | None = None) -> Provider:
            function = function or block._attn

            def run() -> Tensor:
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    return function(x)

            return Provider(run, (x, windows, block.attn.relative_position_bias_table))

        flex_block = timm_block(False)
        flex_block.attn.forward = _flex_windows(flex_block)
        compiled_block = timm_block(False)
        element = dtype.itemsize * batch * size * size * channels
        table_bytes = table.numel() * table.itemsize
        return Problem(
            {
                OURS: Provider(ours, (qkv, table)),
                UNFUSED: timm_provider(timm_block(False)),
                FUSED: timm_provider(timm_block(True)),
                FLEX: timm_provider(flex_block),
                COMPILED: timm_provider(compiled_block, torch.compile(compiled_block._attn, dynamic=False)),
            },
            forward_bytes=4 * element + table_bytes,
            backward_bytes=7 * element + 2 * table_bytes,
        )

    return problem


class _Precomputed(nn.Module):
    """Stands in for a linear layer, at no cost: its output and its input's gradient are made beforehand."""

    def __init__(self, output: Tensor, d_input: Tensor) -> None:
        super().__init__()
        self.output, self.d_input = output, d_input

    def forward(self, x: Tensor) -> Tensor:
        return _PrecomputedFunction.apply(x, self.output, self.d_input)


class _PrecomputedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, d_x: Tensor) -> Tensor:
        ctx.save_for_backward(d_x)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor, Tensor, None]:
        (d_x,) = ctx.saved_tensors
        return d_x, d_output, None


def _flex_windows(block: Any) -> Callable[[Tensor, Tensor | None], Tensor]:
    """`WindowAttention.forward` on FlexAttention: the bias and the shift mask as a score modification."""
    attn = block.attn
    index = attn.relative_position_index

    def forward(x: Tensor, mask: Tensor | None = None) -> Tensor:
        table = attn.relative_position_bias_table
        qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)

        def score(value: Tensor, window: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            value = value + table[index[query, key], head]
            return value if mask is None else value + mask[window % mask.shape[0], query, key]

        return _compiled_flex_attention()(*qkv.unbind(0), score_mod=score).transpose(1, 2).flatten(2)

    return forward


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


# --- Attention --------------------------------------------------------------------------------------------------------


def _attention(tokens: int, heads: int, head_dim: int) -> Callable[..., Problem]:
    """q, k, v [B, heads, N, D] to [B, N, C], as in timm's `Attention` between ``qkv`` and ``proj``.

    The three lie in one [B, N, 3C] as the projection leaves them. That their gradients have to be put together again is
    left out for everyone.
    """

    def problem(batch: int, dtype: torch.dtype, device: torch.device) -> Problem:
        from timm.layers import Attention

        qkv = _normal(batch, tokens, 3, heads, head_dim, dtype=dtype, device=device)
        q, k, v = leaves = tuple(tensor.requires_grad_() for tensor in qkv.permute(2, 0, 3, 1, 4).unbind(0))
        x = qkv[:, :, 0].flatten(2)  # timm reads its shape

        def ours() -> Tensor:
            return attention(q, k, v).transpose(1, 2).flatten(2)

        def flex() -> Tensor:
            return _compiled_flex_attention()(q, k, v).transpose(1, 2).flatten(2)

        def timm_attention(fused: bool) -> Callable[[], Tensor]:
            with torch.device(device):
                module: Any = Attention(heads * head_dim, heads)
            module.fused_attn = fused
            module.qkv = _Split(leaves)
            module.proj = nn.Identity()

            def run() -> Tensor:
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    return module(x)

            return run

        element = dtype.itemsize * batch * tokens * heads * head_dim
        unfused = timm_attention(False)
        return Problem(
            {
                OURS: Provider(ours, leaves),
                UNFUSED: Provider(unfused, leaves),
                FUSED: Provider(timm_attention(True), leaves),
                FLEX: Provider(flex, leaves),
                COMPILED: Provider(torch.compile(unfused, dynamic=False), leaves),
            },
            forward_bytes=4 * element,
            backward_bytes=7 * element,
        )

    return problem


class _Split(nn.Module):
    """Stands in for ``qkv`` where timm splits its output with reshape, permute and unbind: q, k, v as they are."""

    def __init__(self, parts: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor) -> _Split:
        return self

    def reshape(self, *shape: int) -> _Split:
        return self

    def permute(self, *order: int) -> _Split:
        return self

    def unbind(self, dim: int) -> tuple[Tensor, ...]:
        return self.parts


# --- Rotary embedding -------------------------------------------------------------------------------------------------


def _rotary_embedding(
    tokens: int, prefix: int, half: bool, heads: int = 12, head_dim: int = 64
) -> Callable[..., Problem]:
    """q [B, heads, N, D], lying in [B, N, 3C] as the projection leaves it, turned as in timm's `EvaAttention`."""

    def problem(batch: int, dtype: torch.dtype, device: torch.device) -> Problem:
        from timm.layers import apply_rot_embed_cat

        q = _normal(batch, tokens, 3, heads, head_dim, dtype=dtype, device=device).permute(2, 0, 3, 1, 4)[0]
        q.requires_grad_()
        angles = _normal(tokens - prefix, head_dim, dtype=_parameter(dtype), device=device)
        table = torch.cat([angles.sin(), angles.cos()], -1)

        def eager() -> Tensor:
            return torch.cat([q[:, :, :prefix], apply_rot_embed_cat(q[:, :, prefix:], table, half=half)], 2).to(dtype)

        def ours() -> Tensor:
            return rotary_embedding(q, table, prefix=prefix, half=half)

        moved = 2 * q.numel() * q.itemsize + table.numel() * table.itemsize
        return Problem(
            {
                OURS: Provider(ours, (q,)),
                UNFUSED: Provider(eager, (q,)),
                COMPILED: Provider(torch.compile(eager, dynamic=False), (q,)),
            },
            forward_bytes=moved,
            backward_bytes=moved,
        )

    return problem


# --- Reconstruction loss ----------------------------------------------------------------------------------------------


def _reconstruction_loss(size: int, channels: int, upsample: int, target_channels: int) -> Callable[..., Problem]:
    """[B, size, size, channels] to the loss against [B, size · r, size · r, target_channels], mse."""

    def problem(batch: int, dtype: torch.dtype, device: torch.device) -> Problem:
        outputs = upsample**2 * target_channels
        large = size * upsample
        hidden = _normal(batch, size, size, channels, dtype=dtype, device=device).requires_grad_()
        weight = (_normal(outputs, channels, dtype=_parameter(dtype), device=device) / 32).requires_grad_()
        bias = _normal(outputs, dtype=_parameter(dtype), device=device).requires_grad_()
        target = _normal(batch, large, large, target_channels, dtype=dtype, device=device)
        leaves = (hidden, weight, bias)

        def eager() -> Tensor:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                patches = F.linear(hidden, weight, bias).unflatten(-1, (upsample, upsample, target_channels))
                return F.mse_loss(patches.transpose(2, 3).reshape(target.shape), target)

        def ours() -> Tensor:
            return reconstruction_loss(hidden, weight, bias, target, upsample=upsample)

        parameters = sum(tensor.numel() * tensor.itemsize for tensor in (weight, bias))
        data = sum(tensor.numel() * tensor.itemsize for tensor in (hidden, target))
        return Problem(
            {
                OURS: Provider(ours, leaves),
                UNFUSED: Provider(eager, leaves),
                COMPILED: Provider(torch.compile(eager, dynamic=False), leaves),
            },
            forward_bytes=data + parameters,
            backward_bytes=data + hidden.numel() * hidden.itemsize + 2 * parameters,
        )

    return problem
