"""A timm vision transformer seen as stem → blocks → head.

Nothing is copied: the parts call timm's own modules, whose parameters stay the user's. A family is a function that
returns the three; to support another one, write its function and name its class in `backbone`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from fastlocal.geometry import Geometry

SUPPORTED = "swin_*, swinv2_*, vit_*, deit*, beit* and eva02_*"


class Part(nn.Module):
    """A piece of timm's forward that shares the named modules and parameters of ``model``."""

    def __init__(self, model: nn.Module, function: Callable[[Tensor], Tensor], owned: tuple[str, ...]) -> None:
        super().__init__()
        for name in owned:
            value = getattr(model, name, None)
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            elif isinstance(value, nn.Module):
                self.add_module(name, value)
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        return self._function(x)


class Block(nn.Module):
    """One transformer block, after the transition (Swin's patch merging) that stands before it, if any."""

    def __init__(
        self, block: nn.Module, transition: nn.Module | None, function: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.transition = transition
        self.block = block
        self._function = function or block

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the block's input (after the transition) and its output; their difference is the residual."""
        if self.transition is not None:
            x = self.transition(x)
        return x, self._function(x)


@dataclass(frozen=True)
class Backbone:
    """A timm model as stem → blocks → head.

    Attributes:
        model: the timm model, which owns everything.
        stem: images [B, 3, H, W] → features with geometry ``boundaries[0]``.
        blocks: in the order of the forward.
        head: features with geometry ``boundaries[-1]`` → logits [B, classes], final norm and pooling included.
        stages: the index of the first block of each stage; one stage for a ViT.
        image: geometry of the images.
        boundaries: geometry before block 0, 1, …, and after the last one.
    """

    model: nn.Module
    stem: Part
    blocks: tuple[Block, ...]
    head: Part
    stages: tuple[int, ...]
    image: Geometry
    boundaries: tuple[Geometry, ...]


def backbone(model: nn.Module) -> Backbone:
    """See a timm ``model`` as stem → blocks → head.

    Raises:
        ValueError: the architecture is not supported, or shares parameters between blocks so that it cannot be cut.
    """
    if isinstance(model, (SwinTransformer, SwinTransformerV2)):
        return _swin(model)
    if isinstance(model, Eva):
        return _eva(model)
    if isinstance(model, Beit):
        _refuse_shared(model, "rel_pos_bias")
        return _vit(model, _beit_stem(model))
    if isinstance(model, VisionTransformerRelPos):
        _refuse_shared(model, "shared_rel_pos")
        return _vit(model, _beit_stem(model))
    # Subclasses of VisionTransformer are free to rewrite its forward; only the ones whose forward is known are taken.
    if type(model) in (VisionTransformer, VisionTransformerDistilled):
        vit = cast(Any, model)
        return _vit(vit, lambda images: vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images)))))
    raise ValueError(f"model: {type(model).__name__} is not supported; supported are timm's {SUPPORTED}.")


def _refuse_shared(model: nn.Module, name: str) -> None:
    if getattr(model, name, None) is not None:
        raise ValueError(
            f"model: {type(model).__name__} shares one {name} among all its blocks, so it cannot be cut into modules"
            " that train alone; use a variant with one position bias per block."
        )


def _image(model: Any) -> Geometry:
    height, width = model.patch_embed.img_size
    channels = next(p for p in model.patch_embed.parameters() if p.ndim == 4).shape[1]
    return Geometry(height, width, channels, "NCHW")


def _swin(model: Any) -> Backbone:
    blocks: list[Block] = []
    stages: list[int] = []
    boundaries: list[Geometry] = []
    height, width = model.patch_embed.grid_size
    channels = model.embed_dim if isinstance(model.embed_dim, int) else model.embed_dim[0]
    boundaries.append(Geometry(height, width, channels, "NHWC"))
    for stage in model.layers:
        stages.append(len(blocks))
        height, width = stage.output_resolution
        for i, block in enumerate(stage.blocks):
            merging = stage.downsample if i == 0 and not isinstance(stage.downsample, nn.Identity) else None
            blocks.append(Block(block, merging))
            boundaries.append(Geometry(height, width, block.dim, "NHWC"))
    return Backbone(
        model=model,
        stem=Part(model, model.patch_embed, ("patch_embed",)),
        blocks=tuple(blocks),
        head=Part(model, lambda x: model.forward_head(model.norm(x)), ("norm", "head")),
        stages=tuple(stages),
        image=_image(model),
        boundaries=tuple(boundaries),
    )


_VIT_STEM = ("patch_embed", "cls_token", "reg_token", "dist_token", "pos_embed", "norm_pre", "pos_drop", "patch_drop")
_VIT_HEAD = ("norm", "fc_norm", "attn_pool", "head_drop", "head", "head_dist")


def _vit(
    model: Any, stem: Callable[[Tensor], Tensor], block_function: Callable[[nn.Module], Callable] | None = None
) -> Backbone:
    if isinstance(getattr(model, "patch_drop", None), nn.Module) and not isinstance(model.patch_drop, nn.Identity):
        raise ValueError(
            "model: patch dropout (patch_drop_rate > 0) changes the number of tokens and is not supported."
        )
    height, width = model.patch_embed.grid_size
    tokens = Geometry(height, width, model.embed_dim, "tokens", prefix=model.num_prefix_tokens)
    blocks = tuple(Block(b, None, block_function(b) if block_function else None) for b in model.blocks)
    return Backbone(
        model=model,
        stem=Part(model, stem, _VIT_STEM),
        blocks=blocks,
        head=Part(model, lambda x: model.forward_head(model.norm(x)), _VIT_HEAD),
        stages=(0,),
        image=_image(model),
        boundaries=(tokens,) * (len(blocks) + 1),
    )


def _beit_stem(model: Any) -> Callable[[Tensor], Tensor]:
    def stem(images: Tensor) -> Tensor:
        x = model.patch_embed(images)
        if model.cls_token is not None:
            x = torch.cat((model.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        if isinstance(model, Beit):
            if model.pos_embed is not None:
                x = x + model.pos_embed
            x = model.pos_drop(x)
        return x

    return stem


def _eva(model: Any) -> Backbone:
    if model.rope_mixed:
        raise ValueError(
            f"model: {type(model).__name__} with mixed rotary embeddings shares one position parameter among all its"
            " blocks, so it cannot be cut into modules that train alone; use a variant with axial rotary embeddings."
        )
    if getattr(model, "dynamic_img_size", False):
        raise ValueError("model: dynamic_img_size=True is not supported with rotary embeddings; build it with False.")

    def rotary() -> Tensor | None:
        # A buffer, not a parameter: every block may read it whatever module it is in.
        if model.rope is None:
            return None
        if hasattr(model.rope, "feat_shape"):
            return model.rope.get_embed()
        return model.rope.get_embed(shape=model.patch_embed.grid_size)

    return _vit(
        model,
        lambda images: model.norm_pre(model._pos_embed(model.patch_embed(images))[0]),
        lambda block: lambda x: block(x, rope=rotary()),
    )
