"""Transformers in stages: maps [B, H, W, C] or [B, C, H, W] that a transition shrinks where a stage begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from fastlocal.backbones.backbone import Backbone
from fastlocal.backbones.registry import Image, register_backbone

Blocks = list[Any]


def in_order(stages: Iterable[Any], wrap: Callable[[Any], Any] = lambda block: block) -> tuple[Blocks, list[int]]:
    """The blocks of ``stages``, the first of each with the transition before it, and the index of each stage's first.

    A stage has ``blocks``, or is a sequence of them, or is one block; its transition, if any, is its ``downsample``.

    Args:
        wrap: from a block or transition to the function that runs it on the features between blocks.
    """
    blocks: Blocks = []
    starts: list[int] = []
    for stage in stages:
        starts.append(len(blocks))
        inside = list(getattr(stage, "blocks", stage if isinstance(stage, nn.Sequential) else [stage]))
        transition = getattr(stage, "downsample", None)
        blocks += [wrap(block) for block in inside]
        if transition is not None and not isinstance(transition, nn.Identity):
            blocks[starts[-1]] = (wrap(transition), blocks[starts[-1]])
    return blocks, starts


def _head(model: Any, *before: str) -> Callable[[Tensor], Tensor]:
    """The layers ``before``, as far as the model has them, then its `forward_head`."""

    def head(x: Tensor) -> Tensor:
        for name in before:
            x = getattr(model, name)(x)
        return model.forward_head(x)

    return head


@register_backbone(
    "timm.models.swin_transformer.SwinTransformer", "timm.models.swin_transformer_v2.SwinTransformerV2"
)  # fmt: skip
def swin(model: Any, image: Image) -> Backbone:
    blocks, starts = in_order(model.layers)
    return Backbone(model.patch_embed, blocks, _head(model, "norm"), image, model=model, stages=starts, layout="NHWC")


@register_backbone("timm.models.swin_transformer_v2_cr.SwinTransformerV2Cr")
def swin_v2_cr(model: Any, image: Image) -> Backbone:
    blocks, starts = in_order(model.stages)

    def stem(images: Tensor) -> Tensor:
        return model.patch_embed(images).permute(0, 2, 3, 1)

    def head(x: Tensor) -> Tensor:
        return model.forward_head(x.permute(0, 3, 1, 2))

    return Backbone(stem, blocks, head, image, model=model, stages=starts, layout="NHWC")


@register_backbone("timm.models.hieradet_sam2.HieraDet")
def hiera_of_sam2(model: Any, image: Image) -> Backbone:
    def stem(images: Tensor) -> Tensor:
        return model._pos_embed(model.patch_embed(images))

    starts = [0, *(end + 1 for end in model.stage_ends[:-1])]
    return Backbone(stem, list(model.blocks), model.forward_head, image, model=model, stages=starts, layout="NHWC")


# Stages of convolutions and attention in the same terms: the layers between stem and stages' end, by class.
_NAMES = {
    "timm.models.convnext.ConvNeXt": ("stem", "stages", "norm_pre"),
    "timm.models.edgenext.EdgeNeXt": ("stem", "stages", "norm_pre"),
    "timm.models.davit.DaVit": ("stem", "stages", "norm_pre"),
    "timm.models.maxxvit.MaxxVit": ("stem", "stages", "norm"),
    "timm.models.nextvit.NextViT": ("stem", "stages", "norm"),
    "timm.models.swiftformer.SwiftFormer": ("stem", "stages", "norm"),
    "timm.models.efficientformer.EfficientFormer": ("stem", "stages", "norm"),
    "timm.models.efficientformer_v2.EfficientFormerV2": ("stem", "stages", "norm"),
    "timm.models.focalnet.FocalNet": ("stem", "layers", "norm"),
    "timm.models.efficientvit_mit.EfficientVit": ("stem", "stages"),
    "timm.models.efficientvit_mit.EfficientVitLarge": ("stem", "stages"),
    "timm.models.efficientvit_msra.EfficientVitMsra": ("patch_embed", "stages"),
    "timm.models.inception_next.MetaNeXt": ("stem", "stages"),
    "timm.models.mambaout.MambaOut": ("stem", "stages"),
    "timm.models.gcvit.GlobalContextVit": ("stem", "stages"),  # a stage's blocks share its global query
    "timm.models.cpubone.CPUBone": ("stem", "stages"),
    "timm.models.lowformer.LowFormer": ("stem", "stages"),
    "timm.models.csatv2.CSATv2": ("stem_dct", "stages"),
    "timm.models.iformer.IFormer": ("stem", "stages"),
    "timm.models.shvit.SHViT": ("patch_embed", "stages"),
    "timm.models.repvit.RepVit": ("stem", "stages"),
    "timm.models.byobnet.ByobNet": ("stem", "stages", "final_conv"),
}


@register_backbone(*_NAMES)
def convolutional(model: Any, image: Image) -> Backbone:
    """ConvNeXt and what is built like it, MaxViT and CoAtNet, MobileViT, the fast hybrids."""
    name = next(n for c in type(model).__mro__ if (n := f"{c.__module__}.{c.__qualname__}") in _NAMES)
    stem, stages, *after = _NAMES[name]
    whole = name.endswith("GlobalContextVit")
    blocks, starts = (list(model.stages), list(range(len(model.stages)))) if whole else in_order(getattr(model, stages))
    return Backbone(
        getattr(model, stem), blocks, _head(model, *after), image, model=model, stages=starts, layout="NCHW"
    )  # fmt: skip


@register_backbone("timm.models.fastvit.FastVit")
def fastvit(model: Any, image: Image) -> Backbone:
    blocks: Blocks = []
    starts: list[int] = []
    for stage in model.stages:
        starts.append(len(blocks))
        blocks += list(stage.blocks)
        blocks[starts[-1]] = (nn.Sequential(stage.downsample, stage.pos_emb), blocks[starts[-1]])
    head = _head(model, "final_conv")
    return Backbone(model.stem, blocks, head, image, model=model, stages=starts, layout="NCHW")


@register_backbone("timm.models.levit.Levit", "timm.models.levit.LevitDistilled")
def levit(model: Any, image: Image) -> Backbone:
    """LeViT: tokens without a class token, or maps where it is built of convolutions."""
    blocks, starts = in_order(model.stages)

    def stem(images: Tensor) -> Tensor:
        x = model.stem(images)
        return x if model.use_conv else rearrange(x, "b c h w -> b (h w) c")

    return Backbone(stem, blocks, model.forward_head, image, model=model, stages=starts, layout="NCHW")


@register_backbone("timm.models.metaformer.MetaFormer")
def metaformer(model: Any, image: Image) -> Backbone:
    """PoolFormer, ConvFormer, CAFormer: later stages work on tokens, which are views of the maps."""
    blocks: Blocks = []
    starts: list[int] = []

    def on_tokens(block: nn.Module) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            tokens = block(rearrange(x, "b c h w -> b (h w) c"))
            return rearrange(tokens, "b (h w) c -> b c h w", h=x.shape[2])

        return run

    for stage in model.stages:
        starts.append(len(blocks))
        blocks += list(stage.blocks) if stage.use_nchw else [on_tokens(block) for block in stage.blocks]
        blocks[starts[-1]] = (stage.downsample, blocks[starts[-1]])
    return Backbone(model.stem, blocks, model.forward_head, image, model=model, stages=starts, layout="NCHW")


@register_backbone("timm.models.tiny_vit.TinyVit")
def tiny_vit(model: Any, image: Image) -> Backbone:
    first, *rest = model.stages
    blocks, starts = in_order([first])
    for stage in rest:
        starts.append(len(blocks))
        inside: Blocks = [_channels_last(block) for block in stage.blocks]
        inside[0] = (stage.downsample, inside[0])
        blocks += inside
    return Backbone(model.patch_embed, blocks, model.forward_head, image, model=model, stages=starts, layout="NCHW")


def _channels_last(block: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@register_backbone("timm.models.volo.VOLO")
def volo(model: Any, image: Image) -> Backbone:
    """VOLO: the position embedding stands before the third part of its network, the class attention in the head."""
    blocks: Blocks = []
    starts: list[int] = []
    transition: list[Callable[[Tensor], Tensor]] = []
    for i, part in enumerate(model.network):
        if i == 2 and model.pos_embed is not None:
            transition.append(lambda x: model.pos_drop(x + model.pos_embed))
        if not isinstance(part, nn.Sequential):
            transition.append(part)
            continue
        starts.append(len(blocks))
        blocks += list(part)
        if transition:
            blocks[starts[-1]] = (_all(transition), blocks[starts[-1]])
            transition = []

    def stem(images: Tensor) -> Tensor:
        return model.patch_embed(images).permute(0, 2, 3, 1)

    def head(x: Tensor) -> Tensor:
        x = x.flatten(1, 2)
        return model.forward_head(model.norm(model.forward_cls(x) if model.post_network is not None else x))

    return Backbone(stem, blocks, head, image, model=model, stages=starts, layout="NHWC")


def _all(functions: list[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        for function in functions:
            x = function(x)
        return x

    return run
