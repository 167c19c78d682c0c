"""timm's and torchvision's attention layers with the fused ops in them.

Each class differs from its parent in one method and in nothing else, so an instance of the parent becomes one by its
``__class__`` alone, and back (`accelerate`). A call with a mask of its own runs the parent's method.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from timm.layers import attention as timm_attention
from timm.models import beit, eva, maxxvit, swin_transformer, swin_transformer_v2, vision_transformer_relpos
from torch import Tensor, nn
from torchvision.models import swin_transformer as torchvision_swin

from fastlocal.kernels.attention import attention
from fastlocal.kernels.rotary_embedding import rotary_embedding
from fastlocal.kernels.window_attention import window_attention

Layer = Any  # timm's have no types for their attributes
LOGIT_SCALE_MAXIMUM = math.log(1 / 0.01)  # of Swin-V2, as in timm


# --- Windows ----------------------------------------------------------------------------------------------------------


def _attend_to_grid(block: Layer, x: Tensor) -> Tensor:
    """A block's ``_attn``: gives its attention the whole grid, where timm's cuts it into windows."""
    return block.attn(x, window=tuple(block.window_size), shift=tuple(block.shift_size))


def _forward_of_grid(parent: type[nn.Module], attend: Callable[..., Tensor]) -> Any:
    """Its attention's ``forward``; called with windows, as timm calls it, it is the parent's."""

    def forward(
        layer: Layer,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        window: tuple[int, int] | None = None,
        shift: tuple[int, int] = (0, 0),
    ) -> Tensor:
        if window is None:
            return parent.forward(layer, x, mask)
        refuse_dropout(layer.attn_drop.p, layer)
        mixed = attend(layer, _pad(x, window, shift), window, shift)
        return layer.proj_drop(layer.proj(_crop(mixed, x.shape[1:3], shift)))

    return forward


def _attend_to_windows(layer: Layer, x: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    return window_attention(
        layer.qkv(x), layer.relative_position_bias_table, num_heads=layer.num_heads, window_size=window, shift=shift
    )


def _attend_to_windows_by_cosine(layer: Layer, x: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Swin-V2's: the scale of each head is learnt, the bias is a small network's."""
    table = layer.cpb_mlp(layer.relative_coords_table).view(-1, layer.num_heads)
    return window_attention(
        _qkv(layer, x), 16 * table.sigmoid(), num_heads=layer.num_heads, window_size=window, shift=shift,
        logit_scale=layer.logit_scale.clamp(max=LOGIT_SCALE_MAXIMUM).exp().flatten(),
    )  # fmt: skip


class SwinBlock(swin_transformer.SwinTransformerBlock):
    _attn = _attend_to_grid


class SwinAttention(swin_transformer.WindowAttention):
    forward = _forward_of_grid(swin_transformer.WindowAttention, _attend_to_windows)


class SwinV2Block(swin_transformer_v2.SwinTransformerV2Block):
    _attn = _attend_to_grid


class SwinV2Attention(swin_transformer_v2.WindowAttention):
    forward = _forward_of_grid(swin_transformer_v2.WindowAttention, _attend_to_windows_by_cosine)


def _torchvision_forward(attend: Callable[..., Tensor]) -> Any:
    def forward(layer: Layer, x: Tensor) -> Tensor:
        refuse_dropout(layer.attention_dropout, layer)
        mixed = attend(layer, *_pad_first(x, layer.window_size, layer.shift_size))
        return F.dropout(layer.proj(mixed[:, : x.shape[1], : x.shape[2]]), layer.dropout, layer.training)

    return forward


class TorchvisionSwinAttention(torchvision_swin.ShiftedWindowAttention):
    forward = _torchvision_forward(_attend_to_windows)


class TorchvisionSwinV2Attention(torchvision_swin.ShiftedWindowAttentionV2):
    forward = _torchvision_forward(_attend_to_windows_by_cosine)


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


def _pad_first(x: Tensor, window: list[int], shift: list[int]) -> tuple[Tensor, tuple[int, int], tuple[int, int]]:
    """torchvision pads the grid before it rolls it, and does not roll a side of a single window."""
    down, across = -x.shape[1] % window[0], -x.shape[2] % window[1]
    x = F.pad(x, (0, 0, 0, across, 0, down))
    shift_h, shift_w = (0 if side <= w else s for side, w, s in zip(x.shape[1:3], window, shift, strict=True))
    return x, (window[0], window[1]), (shift_h, shift_w)


# --- Whole sequences --------------------------------------------------------------------------------------------------


class ViTAttention(timm_attention.Attention):
    def forward(self: Layer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if _given(args, kwargs):  # a mask
            return super().forward(x, *args, **kwargs)
        q, k, v = _heads(self, x)
        return _attend(self, x, self.q_norm(q), self.k_norm(k), v)


class BeitAttention(beit.Attention):
    """BEiT's relative position bias is the op's additive bias."""

    def forward(self: Layer, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own = self._get_rel_pos_bias()
            bias = own if bias is None else own + bias
        return _attend(self, x, *_heads(self, x), bias=bias)


class RelPosAttention(vision_transformer_relpos.RelPosAttention):
    def forward(self: Layer, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        q, k, v = _heads(self, x)
        bias = self.rel_pos.get_bias() if self.rel_pos is not None else shared_rel_pos
        return _attend(self, x, self.q_norm(q), self.k_norm(k), v, bias=bias)


class MaxViTAttention(maxxvit.AttentionCl):
    """A window's or a grid's tokens, [B, ..., C], each head's q, k and v together unless ``head_first`` is off."""

    def forward(self: Layer, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        bias = self.rel_pos.get_bias() if self.rel_pos is not None else shared_rel_pos
        tokens = x.flatten(1, -2)
        qkv = self.qkv(tokens)
        if self.head_first:
            q, k, v = qkv.reshape(*qkv.shape[:2], self.num_heads, 3, -1).permute(3, 0, 2, 1, 4).unbind(0)
        else:
            q, k, v = qkv.reshape(*qkv.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return _attend(self, tokens, q, k, v, bias=bias).reshape(*x.shape[:-1], -1)


class EvaAttention(eva.EvaAttention):
    """Rotary position embedding, then attention."""

    def forward(self: Layer, x: Tensor, rope: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if _given(args, kwargs):
            return super().forward(x, rope, *args, **kwargs)
        return _rotate_and_attend(self, x, rope)


class RopeAttention(timm_attention.AttentionRope):
    def forward(self: Layer, x: Tensor, rope: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if _given(args, kwargs):
            return super().forward(x, rope, *args, **kwargs)
        return _rotate_and_attend(self, x, rope)


def _given(args: tuple, kwargs: dict) -> bool:
    return any(value is not None and value is not False for value in (*args, *kwargs.values()))


def _qkv(layer: Layer, x: Tensor) -> Tensor:
    """The qkv projection, its bias in parts where timm keeps q's and v's only, and none for k in torchvision's Swin-V2."""
    if isinstance(layer, torchvision_swin.ShiftedWindowAttentionV2) and layer.qkv.bias is not None:
        q, k, v = layer.qkv.bias.chunk(3)
        return F.linear(x, layer.qkv.weight, torch.cat([q, torch.zeros_like(k), v]))
    if getattr(layer, "q_bias", None) is None:
        return layer.qkv(x)
    return F.linear(x, layer.qkv.weight, torch.cat([layer.q_bias, layer.k_bias, layer.v_bias]))


def _heads(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v: [B, heads, N, D], k and v of fewer heads where timm's layer shares them."""
    if layer.qkv is None:
        projected = [layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)]  # heads may share keys and values
        head_dim = projected[0].shape[2] // layer.num_heads
        q, k, v = (part.reshape(*part.shape[:2], -1, head_dim).transpose(1, 2) for part in projected)
    else:
        q, k, v = _qkv(layer, x).reshape(*x.shape[:2], 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _rotate_and_attend(layer: Layer, x: Tensor, rope: Tensor | None) -> Tensor:
    q, k, v = _heads(layer, x)
    q, k = layer.q_norm(q), layer.k_norm(k)
    if rope is not None:
        q, k = _rotate(layer, q, rope), _rotate(layer, k, rope)
    return _attend(layer, x, q, k, v)


def _rotate(layer: Layer, x: Tensor, rope: Tensor) -> Tensor:
    prefix, half = layer.num_prefix_tokens, getattr(layer, "rotate_half", False)
    if rope.ndim == 2 and not rope.requires_grad:
        return rotary_embedding(x, rope, prefix=prefix, half=half)
    # Angles that are learnt, or each head's own.
    return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope, half=half)], 2)


def _attend(layer: Layer, x: Tensor, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Attention and what follows it; ``x`` is the layer's input. Norms and rotations may leave q and k in float32."""
    refuse_dropout(layer.attn_drop.p, layer)
    mixed = attention(q.to(v.dtype), k.to(v.dtype), v, bias=bias, scale=layer.scale)
    mixed = mixed.transpose(1, 2).flatten(2)
    if getattr(layer, "norm", None) is not None:
        mixed = layer.norm(mixed)
    if getattr(layer, "gate", None) is not None:
        mixed = mixed * layer.gate(x).sigmoid()
    return layer.proj_drop(layer.proj(mixed))


def refuse_dropout(probability: float, layer: nn.Module) -> None:
    """Raises RuntimeError where attention dropout was turned on after `accelerate` had looked."""
    if probability > 0 and layer.training:
        raise RuntimeError(
            f"{type(layer).__name__} has attention dropout {probability}, which the fused ops do not apply: set it to 0 "
            "or call fastlocal.kernels.restore(model)."
        )


# A block of windows is swapped together with its attention; the others are attention layers by themselves.
WINDOW_ATTENTION: dict[type[nn.Module], type[nn.Module]] = {
    swin_transformer.WindowAttention: SwinAttention,
    swin_transformer_v2.WindowAttention: SwinV2Attention,
}
WINDOW_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    swin_transformer.SwinTransformerBlock: SwinBlock,
    swin_transformer_v2.SwinTransformerV2Block: SwinV2Block,
}
LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    timm_attention.Attention: ViTAttention,
    timm_attention.AttentionRope: RopeAttention,
    beit.Attention: BeitAttention,
    eva.EvaAttention: EvaAttention,
    maxxvit.AttentionCl: MaxViTAttention,
    vision_transformer_relpos.RelPosAttention: RelPosAttention,
    torchvision_swin.ShiftedWindowAttention: TorchvisionSwinAttention,
    torchvision_swin.ShiftedWindowAttentionV2: TorchvisionSwinV2Attention,
}
