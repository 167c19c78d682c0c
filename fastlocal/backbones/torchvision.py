"""torchvision's transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastlocal.backbones.backbone import Backbone
from fastlocal.backbones.registry import Image, register_backbone

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # what every one of its transformers was trained with


@register_backbone("torchvision.models.vision_transformer.VisionTransformer")
def vision_transformer(model: Any, image: Image) -> Backbone:
    encoder = model.encoder

    def stem(images: Tensor) -> Tensor:
        x = model._process_input(images)
        x = torch.cat((model.class_token.expand(len(x), -1, -1), x), dim=1)
        return encoder.dropout(x + encoder.pos_embedding)

    def head(x: Tensor) -> Tensor:
        return model.heads(encoder.ln(x)[:, 0])

    return Backbone(stem, list(encoder.layers), head, image, model=model, prefix=1, normalization=IMAGENET)


@register_backbone("torchvision.models.swin_transformer.SwinTransformer")
def swin(model: Any, image: Image) -> Backbone:
    stem, *layers = model.features
    blocks: list[Any] = []
    starts: list[int] = []
    transition = None
    for layer in layers:
        if not isinstance(layer, nn.Sequential):
            transition = layer
            continue
        starts.append(len(blocks))
        blocks += list(layer)
        if transition is not None:
            blocks[starts[-1]] = (transition, blocks[starts[-1]])

    def head(x: Tensor) -> Tensor:
        return model.head(model.flatten(model.avgpool(model.permute(model.norm(x)))))

    return Backbone(
        stem, blocks, head, image, model=model, stages=starts, layout="NHWC", normalization=IMAGENET
    )  # fmt: skip


@register_backbone("torchvision.models.maxvit.MaxVit")
def maxvit(model: Any, image: Image) -> Backbone:
    blocks = [layer for block in model.blocks for layer in block.layers]
    starts = [sum(len(block.layers) for block in model.blocks[:i]) for i in range(len(model.blocks))]
    return Backbone(
        model.stem, blocks, model.classifier, image, model=model, stages=starts, layout="NCHW", normalization=IMAGENET
    )  # fmt: skip
