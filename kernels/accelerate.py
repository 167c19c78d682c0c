"""Swap the attention of a timm model for the fused ops, in place, and back.

An instance attribute hides the method of one layer (Swin's ``_attn``, elsewhere ``forward``): classes, parameters,
buffers, the state dict and the module tree stay timm's own, and removing the attribute restores the layer. It is a
`functools.partial` of a function of this file, so an accelerated model can be copied, pickled and compiled.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlocal.kernels.attention import attention as fused_attention
from fastlocal.kernels.window_attention import MAXIMUM_HEAD_DIM, MAXIMUM_WINDOW_TOKENS, window_attention

TimmLayer = Any  # has no types for its attributes
LOGIT_SCALE_MAXIMUM = math.log(1 / 0.01)  # of Swin-V2, as in timm


def accelerate(model: nn.Module) -> int:
    """Swap the attention of timm's Swin, Swin-V2, ViT (DeiT), BEiT and EVA layers in ``model`` for the fused ops.

    In place; outputs and gradients stay equal to rounding, in training and in evaluation. Forward hooks on the
    submodule ``attn`` of a Swin block no longer fire. A ViT layer called with a mask of its own runs timm's code.
    Accelerating twice is the same as once.

    Returns:
        How many layers use a fused op now.

    Raises:
        ValueError: the model has no layer of those, or one that the ops cannot replace (it says which and why). The
            model is unchanged then.
        ImportError: timm is not installed.
    """
    swaps = [(name, layer, *swap) for name, layer in model.named_modules() if (swap := _swap(layer)) is not None]
    if not swaps:
        raise ValueError(
            "model must contain timm layers with an attention that fastlocal can swap (Swin, Swin-V2, ViT, DeiT, BEiT, "
            f"EVA), got {type(model).__name__} without one."
        )
    for name, layer, _, _ in swaps:
        if (reason := _why_not(layer)) is not None:
            raise ValueError(f"model cannot be accelerated: {name or type(layer).__name__} {reason}.")
    for _, layer, method, function in swaps:
        setattr(layer, method, functools.partial(function, layer))
    return len(swaps)


def restore(model: nn.Module) -> int:
    """Undo `accelerate`, in place.

    Returns:
        How many layers were restored; 0 if ``model`` was not accelerated.
    """
    layers = [(layer, method) for layer in model.modules() for method in _swapped_methods(layer)]
    for layer, method in layers:
        delattr(layer, method)
    return len(layers)


def _swapped_methods(layer: nn.Module) -> Iterator[str]:
    for method in ("_attn", "forward"):
        swap = vars(layer).get(method)
        if isinstance(swap, functools.partial) and swap.func in (_swin, _swin_v2, _vit, _beit, _eva):
            yield method


def _swap(layer: nn.Module) -> tuple[str, Callable[..., Tensor]] | None:
    """The method of a timm layer to hide and the function that takes its place, or None for other modules."""
    from timm.layers import attention as timm_attention
    from timm.models import beit, eva, swin_transformer, swin_transformer_v2

    swaps: dict[type, tuple[str, Callable[..., Tensor]]] = {
        swin_transformer.SwinTransformerBlock: ("_attn", _swin),
        swin_transformer_v2.SwinTransformerV2Block: ("_attn", _swin_v2),
        timm_attention.Attention: ("forward", _vit),
        beit.Attention: ("forward", _beit),
        eva.EvaAttention: ("forward", _eva),
        timm_attention.AttentionRope: ("forward", _eva),
    }
    return swaps.get(type(layer))  # not isinstance: a subclass may compute something else


def _why_not(layer: TimmLayer) -> str | None:
    """What the fused ops cannot do for this layer, to read after its name; None if there is nothing."""
    attention: TimmLayer = getattr(layer, "attn", layer)
    if attention.attn_drop.p > 0:
        return f"has attention dropout {attention.attn_drop.p}, which the fused ops do not apply; build it with 0"
    channels = attention.proj.in_features // attention.num_heads
    if channels > MAXIMUM_HEAD_DIM:
        return f"has {channels} channels per head, and the fused ops take at most {MAXIMUM_HEAD_DIM}"
    if getattr(attention, "num_kv_groups", 1) > 1:
        return "shares keys and values between heads, which the fused op does not"
    if hasattr(layer, "window_area") and layer.window_area > MAXIMUM_WINDOW_TOKENS:
        return f"has windows of {layer.window_area} tokens, and the fused op takes at most {MAXIMUM_WINDOW_TOKENS}"
    return None


# --- What takes the place of timm's methods ---------------------------------------------------------------------------


def _swin(block: TimmLayer, x: Tensor) -> Tensor:
    """``SwinTransformerBlock._attn``."""
    attention = block.attn
    grid = x.shape[1:3]
    qkv = attention.qkv(_pad(x, block.window_size, block.shift_size))
    x = window_attention(
        qkv,
        attention.relative_position_bias_table,
        num_heads=attention.num_heads,
        window_size=tuple(block.window_size),
        shift=tuple(block.shift_size),
        scale=attention.scale,
    )
    x = _crop(x, grid, block.shift_size)
    return attention.proj_drop(attention.proj(x))


def _swin_v2(block: TimmLayer, x: Tensor) -> Tensor:
    """``SwinTransformerV2Block._attn``: cosine attention is the same op on normalized q and k, its scale in q."""
    attention = block.attn
    grid = x.shape[1:3]
    qkv = _qkv(attention, _pad(x, block.window_size, block.shift_size))
    q, k, v = qkv.unflatten(3, (3, attention.num_heads, -1)).unbind(3)
    scale = attention.logit_scale.clamp(max=LOGIT_SCALE_MAXIMUM).exp().view(-1, 1)
    qkv = torch.stack([F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1), v.to(scale.dtype)], 3).flatten(3)
    table = 16 * attention.cpb_mlp(attention.relative_coords_table).view(-1, attention.num_heads).sigmoid()
    x = window_attention(
        qkv,
        table,
        num_heads=attention.num_heads,
        window_size=tuple(block.window_size),
        shift=tuple(block.shift_size),
        scale=1.0,
    )
    x = _crop(x, grid, block.shift_size)
    return attention.proj_drop(attention.proj(x))


def _pad(x: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Zeros after the last row and column *of the rolled grid*, as timm pads, so that both are whole windows."""
    down, across = -x.shape[1] % window[0], -x.shape[2] % window[1]
    if not (down or across):
        return x
    x = x.roll((-shift[0], -shift[1]), (1, 2))
    return F.pad(x, (0, 0, 0, across, 0, down)).roll((shift[0], shift[1]), (1, 2))


def _crop(x: Tensor, grid: torch.Size, shift: tuple[int, int]) -> Tensor:
    """The inverse of `_pad`."""
    if x.shape[1:3] == grid:
        return x
    x = x.roll((-shift[0], -shift[1]), (1, 2))[:, : grid[0], : grid[1]]
    return x.roll((shift[0], shift[1]), (1, 2))


def _vit(attention: TimmLayer, x: Tensor, *args: object, **kwargs: object) -> Tensor:
    """``Attention.forward`` of ViT."""
    if _given(args, kwargs):  # a mask
        return type(attention).forward(attention, x, *args, **kwargs)
    q, k, v = _heads(attention, x)
    return _attend(attention, x, attention.q_norm(q), attention.k_norm(k), v, bias=None)


def _beit(attention: TimmLayer, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
    """``Attention.forward`` of BEiT: its relative position bias is the op's additive bias."""
    bias = shared_rel_pos_bias
    if attention.relative_position_bias_table is not None:
        own = attention._get_rel_pos_bias()
        bias = own if bias is None else own + bias
    return _attend(attention, x, *_heads(attention, x), bias=bias)


def _eva(attention: TimmLayer, x: Tensor, rope: Tensor | None = None, *args: object, **kwargs: object) -> Tensor:
    """``EvaAttention.forward`` and ``AttentionRope.forward``: rotary position embedding, then attention."""
    from timm.layers import apply_rot_embed_cat

    if _given(args, kwargs):  # a mask
        return type(attention).forward(attention, x, rope, *args, **kwargs)
    q, k, v = _heads(attention, x)
    q, k = attention.q_norm(q), attention.k_norm(k)
    if rope is not None:
        prefix, half = attention.num_prefix_tokens, getattr(attention, "rotate_half", False)
        q, k = (
            torch.cat([tokens[:, :, :prefix], apply_rot_embed_cat(tokens[:, :, prefix:], rope, half=half)], 2)
            for tokens in (q, k)
        )
    return _attend(attention, x, q, k, v, bias=None)


def _given(args: tuple, kwargs: dict) -> bool:
    return any(value is not None and value is not False for value in (*args, *kwargs.values()))


def _qkv(attention: TimmLayer, x: Tensor) -> Tensor:
    """The qkv projection, its bias in parts where timm keeps q's and v's only."""
    if getattr(attention, "q_bias", None) is None:
        return attention.qkv(x)
    return F.linear(x, attention.qkv.weight, torch.cat([attention.q_bias, attention.k_bias, attention.v_bias]))


def _heads(attention: TimmLayer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v: [B, heads, N, D]."""
    if attention.qkv is None:
        projected = [attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)]
        q, k, v = (part.unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for part in projected)
    else:
        q, k, v = _qkv(attention, x).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _attend(attention: TimmLayer, x: Tensor, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None) -> Tensor:
    """Attention and what follows it; ``x`` is the layer's input. Norms and rotations may leave q and k in float32."""
    mixed = fused_attention(q.to(v.dtype), k.to(v.dtype), v, bias=bias, scale=attention.scale)
    mixed = mixed.transpose(1, 2).flatten(2)
    if getattr(attention, "norm", None) is not None:
        mixed = attention.norm(mixed)
    if getattr(attention, "gate", None) is not None:
        mixed = mixed * attention.gate(x).sigmoid()
    return attention.proj_drop(attention.proj(mixed))
