"""Transformers whose tokens lose their grid on the way: they are put back on it, [B, H, W, C], between blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from fastlocal.backbones.backbone import Backbone
from fastlocal.backbones.registry import Image, register_backbone

Blocks = list[Any]


def _on_tokens(block: Any) -> Callable[[Tensor], Tensor]:
    """A block that reads tokens and the size of their grid, on the grid itself."""
    return lambda x: block(x.flatten(1, 2), x.shape[1:3]).unflatten(1, x.shape[1:3])


@register_backbone("timm.models.pvt_v2.PyramidVisionTransformerV2")
def pvt(model: Any, image: Image) -> Backbone:
    blocks: Blocks = []
    starts: list[int] = []
    for stage in model.stages:
        starts.append(len(blocks))
        blocks += [_on_tokens(block) for block in stage.blocks]
        if stage.downsample is not None:
            blocks[starts[-1]] = (_from_maps(stage.downsample), blocks[starts[-1]])
        blocks[-1] = _followed(blocks[-1], stage.norm)

    def head(x: Tensor) -> Tensor:
        return model.forward_head(x.permute(0, 3, 1, 2).contiguous())

    return Backbone(model.patch_embed, blocks, head, image, model=model, stages=starts, layout="NHWC")


def _from_maps(transition: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: transition(x.permute(0, 3, 1, 2).contiguous())


def _followed(block: Any, norm: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(block, tuple):
        return block[0], _followed(block[1], norm)
    return lambda x: norm(block(x))


@register_backbone("timm.models.twins.Twins")
def twins(model: Any, image: Image) -> Backbone:
    """Twins: each stage's position encoding stands after its first block."""
    blocks: Blocks = []
    starts: list[int] = []

    def embedding(i: int) -> Callable[[Tensor], Tensor]:
        def embed(x: Tensor) -> Tensor:
            x, size = model.patch_embeds[i](x)
            return model.pos_drops[i](x).unflatten(1, size)

        return embed

    for i, (stage, positions) in enumerate(zip(model.blocks, model.pos_block, strict=True)):
        starts.append(len(blocks))
        inside: Blocks = [_on_tokens(block) for block in stage]
        inside[0] = _followed(inside[0], _on_tokens(positions))
        if i > 0:
            inside[0] = (_from_maps(embedding(i)), inside[0])
        blocks += inside

    def head(x: Tensor) -> Tensor:
        return model.forward_head(model.norm(x.flatten(1, 2)))

    return Backbone(embedding(0), blocks, head, image, model=model, stages=starts, layout="NHWC")


@register_backbone("timm.models.nest.Nest")
def nest(model: Any, image: Image) -> Backbone:
    """NesT: attention inside the blocks that a map is divided into."""
    from timm.models.nest import blockify, deblockify

    blocks: Blocks = []
    starts: list[int] = []

    def start(level: Any) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            x = level.pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return deblockify(blockify(x, level.block_size) + level.pos_embed, level.block_size)

        return run

    def inside(block: Any, size: int) -> Callable[[Tensor], Tensor]:
        return lambda x: deblockify(block(blockify(x, size)), size)

    for level in model.levels:
        starts.append(len(blocks))
        blocks += [inside(block, level.block_size) for block in level.transformer_encoder]
        blocks[starts[-1]] = (start(level), blocks[starts[-1]])

    def stem(images: Tensor) -> Tensor:
        return model.patch_embed(images).permute(0, 2, 3, 1)

    def head(x: Tensor) -> Tensor:
        return model.forward_head(model.norm(x).permute(0, 3, 1, 2))

    return Backbone(stem, blocks, head, image, model=model, stages=starts, layout="NHWC")


@register_backbone("timm.models.hiera.Hiera")
def hiera(model: Any, image: Image) -> Backbone:
    """Hiera: its blocks read tokens sorted by mask unit, so each is given them so and its output is sorted back."""
    from timm.models.hiera import Unroll

    if model.patch_drop_rate > 0:
        raise ValueError(
            "model: patch dropout (patch_drop_rate > 0) changes the number of tokens and is not supported."
        )
    last = len(model.blocks) - 1

    def sort(x: Tensor, i: int) -> Tensor:
        schedule, size = model.reroll.schedule[i]
        return Unroll(tuple(size), (1,) * len(size), schedule)(x.flatten(1, 2))

    def stem(images: Tensor) -> Tensor:
        return model._pos_embed(model.patch_embed(images)).unflatten(1, model.unroll.size)

    def block(i: int) -> Callable[[Tensor], Tensor]:
        return lambda x: model.reroll(model.blocks[i](sort(x, max(i - 1, 0))), i)

    def head(x: Tensor) -> Tensor:
        return model.forward_head(sort(x, last))

    starts = [0, *(end + 1 for end in model.stage_ends[:-1])]
    blocks = [block(i) for i in range(last + 1)]
    return Backbone(stem, blocks, head, image, model=model, stages=starts, layout="NHWC")


@register_backbone("timm.models.mvitv2.MultiScaleVit")
def mvit(model: Any, image: Image) -> Backbone:
    """MViTv2: tokens, with a class token or without; the size of the grid before each block is found by the first run."""
    sizes: dict[int, Any] = {}
    layers = [block for stage in model.stages for block in stage.blocks]

    def stem(images: Tensor) -> Tensor:
        x, sizes[0] = model.patch_embed(images)
        if model.cls_token is not None:
            x = torch.cat((model.cls_token.expand(len(x), -1, -1), x), dim=1)
        return x if model.pos_embed is None else x + model.pos_embed

    def block(i: int) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            x, sizes[i + 1] = layers[i](x, sizes[i])
            return x

        return run

    def head(x: Tensor) -> Tensor:
        return model.forward_head(model.norm(x))

    depths = [len(stage.blocks) for stage in model.stages]
    starts = [sum(depths[:i]) for i in range(len(depths))]
    prefix = 0 if model.cls_token is None else 1
    return Backbone(
        stem, [block(i) for i in range(len(layers))], head, image, model=model, stages=starts, prefix=prefix
    )  # fmt: skip


@register_backbone("timm.models.pit.PoolingVisionTransformer")
def pooling(model: Any, image: Image) -> Backbone:
    """PiT: class tokens and patches in one sequence, divided where the patches are pooled."""
    prefix = model.num_tokens
    sizes: dict[int, Any] = {}
    blocks: Blocks = []
    starts: list[int] = []

    def join(i: int, x: Tensor, class_tokens: Tensor) -> Tensor:
        sizes[i] = x.shape[2:]
        return model.transformers[i].norm(torch.cat((class_tokens, rearrange(x, "b c h w -> b (h w) c")), dim=1))

    def stem(images: Tensor) -> Tensor:
        x = model.pos_drop(model.patch_embed(images) + model.pos_embed)
        return join(0, x, model.cls_token.expand(len(x), -1, -1))

    def transition(i: int) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            patches = rearrange(x[:, prefix:], "b (h w) c -> b c h w", h=sizes[i - 1][0])
            return join(i, *model.transformers[i].pool(patches, x[:, :prefix]))

        return run

    for i, stage in enumerate(model.transformers):
        starts.append(len(blocks))
        blocks += list(stage.blocks)
        if i > 0:
            blocks[starts[-1]] = (transition(i), blocks[starts[-1]])

    def head(x: Tensor) -> Tensor:
        return model.forward_head(model.norm(x[:, :prefix]))

    return Backbone(stem, blocks, head, image, model=model, stages=starts, prefix=prefix)


@register_backbone("timm.models.coat.CoaT")
def coat(model: Any, image: Image) -> Backbone:
    """CoaT-Lite. CoaT's parallel blocks read four resolutions at once, which no boundary between modules holds."""
    if model.parallel_blocks is not None:
        raise ValueError(
            "model: CoaT's parallel blocks read four resolutions at once, so it cannot be cut; use a coat_lite_*."
        )
    blocks: Blocks = []
    starts: list[int] = []

    def embedding(i: int) -> Callable[[Tensor], Tensor]:
        embed = getattr(model, f"patch_embed{i}")

        def run(x: Tensor) -> Tensor:
            if i > 1:  # the class token of a stage ends with it
                size = getattr(model, f"patch_embed{i - 1}").grid_size
                x = rearrange(x[:, 1:], "b (h w) c -> b c h w", h=size[0]).contiguous()
            x = embed(x)
            return torch.cat((getattr(model, f"cls_token{i}").expand(len(x), -1, -1), x), dim=1)

        return run

    def sized(block: nn.Module, size: tuple[int, int]) -> Callable[[Tensor], Tensor]:
        return lambda x: block(x, size=size)

    for i in range(1, 5):
        starts.append(len(blocks))
        size = getattr(model, f"patch_embed{i}").grid_size
        blocks += [sized(block, size) for block in getattr(model, f"serial_blocks{i}")]
        if i > 1:
            blocks[starts[-1]] = (embedding(i), blocks[starts[-1]])

    def head(x: Tensor) -> Tensor:
        return model.forward_head(model.norm4(x))

    return Backbone(embedding(1), blocks, head, image, model=model, stages=starts, prefix=1)
