"""Hugging Face's image classifiers. Models made from a configuration or from pretrained weights are seen alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlocal.backbones.backbone import Backbone
from fastlocal.backbones.registry import Image, backbone, register_backbone


def _first(value: Any) -> Tensor:
    """The features among what a layer returns; some return a tuple."""
    return value[0] if isinstance(value, tuple) else value


def _layers(encoder: Any) -> Any:
    for name in ("layers", "layer"):
        if hasattr(encoder, name):
            return getattr(encoder, name)
    return _layers(encoder.encoder)


def _blocks(model: Any, **given: Any) -> list[Callable[[Tensor], Tensor]]:
    def runs(layer: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: _first(layer(x, **given))

    return [runs(layer) for layer in _layers(model)]


def _class(name: str) -> str:
    return f"transformers.models.{name}"


@register_backbone(_class("vit.modeling_vit.ViTForImageClassification"))
def vit(model: Any, image: Image) -> Backbone:
    def head(x: Tensor) -> Tensor:
        return model.classifier(model.vit.layernorm(x)[:, 0])

    def stem(images: Tensor) -> Tensor:
        return model.vit.embeddings(images)

    return Backbone(stem, _blocks(model.vit), head, image, model=model, prefix=1)


@register_backbone(
    _class("dinov2.modeling_dinov2.Dinov2ForImageClassification"),
    _class("dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersForImageClassification"),
)
def dinov2(model: Any, image: Image) -> Backbone:
    inner = getattr(model, "dinov2", None) or model.dinov2_with_registers
    prefix = 1 + getattr(model.config, "num_register_tokens", 0)

    def head(x: Tensor) -> Tensor:
        x = inner.layernorm(x)
        return model.classifier(torch.cat([x[:, 0], x[:, prefix:].mean(dim=1)], dim=1))

    return Backbone(inner.embeddings, _blocks(inner), head, image, model=model, prefix=prefix)


@register_backbone(_class("beit.modeling_beit.BeitForImageClassification"))
def beit(model: Any, image: Image) -> Backbone:
    inner = model.beit
    if getattr(inner, "shared_position_bias", None) is not None:
        raise ValueError(
            "model: a BEiT with use_shared_relative_position_bias is not supported from Hugging Face; timm's is, or build"
            " it with use_relative_position_bias."
        )

    def stem(images: Tensor) -> Tensor:
        return _first(inner.embeddings(images))

    def head(x: Tensor) -> Tensor:
        return model.classifier(inner.pooler(inner.layernorm(x)))

    for layer in model.modules():
        # A table that is made once for all models of a process must not be a dry run's, which has no values.
        if (cached := getattr(type(layer), "generate_relative_position_index", None)) is not None:
            layer.generate_relative_position_index = getattr(cached, "__wrapped__", cached)
    blocks = _blocks(inner, interpolate_pos_encoding=False, resolution=image[1:])
    return Backbone(stem, blocks, head, image, model=model, prefix=1)


@register_backbone(_class("siglip.modeling_siglip.SiglipForImageClassification"))
def siglip(model: Any, image: Image) -> Backbone:
    vision = getattr(model.vision_model, "vision_model", model.vision_model)

    def head(x: Tensor) -> Tensor:
        return model.classifier(vision.post_layernorm(x).mean(dim=1))

    blocks = _blocks(vision.encoder, attention_mask=None)
    return Backbone(vision.embeddings, blocks, head, image, model=model)


@register_backbone(
    _class("swin.modeling_swin.SwinForImageClassification"),
    _class("swinv2.modeling_swinv2.Swinv2ForImageClassification"),
)
def swin(model: Any, image: Image) -> Backbone:
    """Swin and Swin-V2: their blocks read tokens and the size of their grid; here they stand on the grid, [B, H, W, C]."""
    inner = getattr(model, "swin", None) or model.swinv2
    blocks: list[Any] = []
    starts: list[int] = []
    merging = None

    def on_grid(block: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: _first(block(x.flatten(1, 2), x.shape[1:3])).unflatten(1, x.shape[1:3])

    def merged(layer: Any) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            height, width = x.shape[1:3]
            return layer(x.flatten(1, 2), (height, width)).unflatten(1, ((height + 1) // 2, (width + 1) // 2))

        return run

    for stage in inner.encoder.layers:
        starts.append(len(blocks))
        blocks += [on_grid(block) for block in stage.blocks]
        if merging is not None:
            blocks[starts[-1]] = (merged(merging), blocks[starts[-1]])
        merging = stage.downsample

    def stem(images: Tensor) -> Tensor:
        x, grid = inner.embeddings(images)
        return x.unflatten(1, grid)

    def head(x: Tensor) -> Tensor:
        return model.classifier(inner.pooler(inner.layernorm(x.flatten(1, 2)).transpose(1, 2)).flatten(1))

    return Backbone(stem, blocks, head, image, model=model, stages=starts, layout="NHWC")


@register_backbone(_class("timm_wrapper.modeling_timm_wrapper.TimmWrapperForImageClassification"))
def timm_wrapper(model: Any, image: Image) -> Backbone:
    """A timm model in Hugging Face's clothes: seen as the timm model inside."""
    return backbone(model.timm_model, image[1:])
