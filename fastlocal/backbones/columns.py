"""Transformers of one resolution: every block reads and writes the same tokens [B, prefix + N, C]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlocal.backbones.backbone import Backbone
from fastlocal.backbones.registry import Image, register_backbone

VISION_TRANSFORMER = "timm.models.vision_transformer.VisionTransformer"


def _head(model: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: model.forward_head(model.norm(x))


def _refuse_patch_drop(model: Any) -> None:
    drop = getattr(model, "patch_drop", None)
    if drop is not None and not isinstance(drop, torch.nn.Identity):
        raise ValueError(
            "model: patch dropout (patch_drop_rate > 0) changes the number of tokens and is not supported."
        )


@register_backbone(VISION_TRANSFORMER, "timm.models.deit.VisionTransformerDistilled")
def vision_transformer(model: Any, image: Image) -> Backbone:
    """ViT, DeiT, CLIP, SigLIP, DINOv2, ViTamin, hybrids: timm's own class and what inherits its forward."""
    _refuse_patch_drop(model)

    def stem(images: Tensor) -> Tensor:
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))

    return Backbone(stem, list(model.blocks), _head(model), image, model=model, prefix=model.num_prefix_tokens)


@register_backbone("timm.models.beit.Beit", "timm.models.vision_transformer_relpos.VisionTransformerRelPos")
def relative_positions(model: Any, image: Image) -> Backbone:
    """BEiT and ViT-RelPos. A bias that all blocks share is read by each of them; `Backbone.shared` names it."""

    def stem(images: Tensor) -> Tensor:
        x = model.patch_embed(images)
        if model.cls_token is not None:
            x = torch.cat((model.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        if getattr(model, "pos_embed", None) is not None:
            x = x + model.pos_embed
        return model.pos_drop(x) if hasattr(model, "pos_drop") else x

    def block(layer: Any) -> Callable[[Tensor], Tensor]:
        if getattr(model, "rel_pos_bias", None) is not None:
            return lambda x: layer(x, shared_rel_pos_bias=model.rel_pos_bias())
        if getattr(model, "shared_rel_pos", None) is not None:
            return lambda x: layer(x, shared_rel_pos=model.shared_rel_pos.get_bias())
        return layer

    shared = getattr(model, "shared_rel_pos", None)
    if shared is not None and any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in shared.modules()):
        raise ValueError(
            "model: its position bias drops values at random, once for all blocks, so blocks cannot run by themselves."
        )
    blocks = [block(layer) for layer in model.blocks]
    return Backbone(stem, blocks, _head(model), image, model=model, prefix=model.num_prefix_tokens)


class _OneDepth:
    """A mixed rotary embedding as one block sees it: with the frequencies of its own depth."""

    def __init__(self, rope: Any, depth: int) -> None:
        self._rope, self._depth = rope, depth

    @property
    def freqs(self) -> Tensor:
        return self._rope.freqs[:, self._depth : self._depth + 1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rope, name)


def _rotary_blocks(
    blocks: Any, rope: Any, grid: tuple[int, int] | None, mixed: bool
) -> list[Callable[[Tensor], Tensor]]:
    """Blocks with their rotary embedding, computed where it is read: a mixed one has parameters, which all blocks share.

    Args:
        grid: of the patch tokens; None where ``rope`` knows it.
    """
    if getattr(rope, "aug_active", False):
        raise ValueError(
            "model: rotary coordinates that are shifted, jittered or rescaled at random, once for all blocks, are not"
            " supported; build it without."
        )

    def own(i: int) -> Callable[[], Tensor]:
        return lambda: type(rope).get_embed(_OneDepth(rope, i), shape=grid)[0]

    def common() -> Tensor | None:
        return None if rope is None else rope.get_embed(shape=grid)

    def runs(block: Any, rotary: Callable[[], Tensor | None]) -> Callable[[Tensor], Tensor]:
        return lambda x: block(x, rope=rotary())

    return [runs(block, own(i) if mixed else common) for i, block in enumerate(blocks)]


@register_backbone("timm.models.eva.Eva")
def eva(model: Any, image: Image) -> Backbone:
    """EVA, EVA-02, DINOv3, the Perception Encoder, ViT with axial or mixed rotary embeddings."""
    _refuse_patch_drop(model)
    if model.dynamic_img_size:
        grid = model.patch_embed.dynamic_feat_size(image[1:])
    else:
        grid = None if hasattr(model.rope, "feat_shape") else model.patch_embed.grid_size

    def stem(images: Tensor) -> Tensor:
        return model.norm_pre(model._pos_embed(model.patch_embed(images))[0])

    blocks = _rotary_blocks(model.blocks, model.rope, grid, model.rope_mixed)
    return Backbone(stem, blocks, _head(model), image, model=model, prefix=model.num_prefix_tokens)


@register_backbone("timm.models.naflexvit.NaFlexVit")
def naflex(model: Any, image: Image) -> Backbone:
    """NaFlexViT on ordinary images, all of one size."""
    _refuse_patch_drop(model)
    patch = model.embeds.patch_size
    grid = (-(-image[1] // patch[0]), -(-image[2] // patch[1]))
    blocks: Any = list(model.blocks)
    if model.rope is not None:
        blocks = _rotary_blocks(blocks, model.rope, grid, model.rope_is_mixed)

    def stem(images: Tensor) -> Tensor:
        return model.norm_pre(model.embeds(images)[0])

    return Backbone(stem, blocks, _head(model), image, model=model, prefix=model.num_prefix_tokens)


@register_backbone(
    "timm.models.qwen3_vit.Qwen3VitClassifier", "timm.models.deepseek_vit.DeepseekVitClassifier"
)  # fmt: skip
def language_model_encoder(model: Any, image: Image) -> Backbone:
    """The image encoders of Qwen3-VL and DeepSeek-VL with a classifier."""
    encoder = model.encoder
    grid = encoder.patch_embed.dynamic_feat_size(image[1:])

    def stem(images: Tensor) -> Tensor:
        return encoder._pos_embed(encoder.patch_embed(images))[0]

    def head(x: Tensor) -> Tensor:
        x = encoder.norm(x) if hasattr(encoder, "norm") else x
        x = x.unflatten(1, grid)
        for name in ("merger", "aligner"):
            if getattr(encoder, name, None) is not None:
                x = getattr(encoder, name)(x)
        return model.forward_head(x)

    return Backbone(stem, _rotary_blocks(encoder.blocks, encoder.rope, grid, False), head, image, model=model)


@register_backbone("timm.models.vision_transformer_sam.VisionTransformerSAM")
def segment_anything(model: Any, image: Image) -> Backbone:
    """The image encoder of Segment Anything, whose tokens keep their grid [B, H, W, C]."""
    _refuse_patch_drop(model)
    from timm.layers import resample_abs_pos_embed_nhwc

    def stem(images: Tensor) -> Tensor:
        x = model.patch_embed(images)
        if model.pos_embed is not None:
            x = x + resample_abs_pos_embed_nhwc(model.pos_embed, x.shape[1:3])
        return model.norm_pre(model.pos_drop(x))

    def head(x: Tensor) -> Tensor:
        return model.forward_head(model.neck(x.permute(0, 3, 1, 2)))

    return Backbone(stem, list(model.blocks), head, image, model=model, layout="NHWC")


@register_backbone("timm.models.cait.Cait")
def class_attention(model: Any, image: Image) -> Backbone:
    """CaiT: the blocks that attend to the patches with the class token alone belong to the head."""

    def stem(images: Tensor) -> Tensor:
        return model.pos_drop(model.patch_embed(images) + model.pos_embed)

    def head(x: Tensor) -> Tensor:
        return model.forward_head(model.norm(model.forward_cls(x) if model.blocks_token_only is not None else x))

    return Backbone(stem, list(model.blocks), head, image, model=model)


@register_backbone("timm.models.xcit.Xcit")
def cross_covariance(model: Any, image: Image) -> Backbone:
    """XCiT: the class attention belongs to the head; blocks read a grid [B, H, W, C]."""

    def stem(images: Tensor) -> Tensor:
        x, grid = model.patch_embed(images)
        if model.pos_embed is not None:
            x = x + model.pos_embed(len(x), *grid).reshape(len(x), -1, x.shape[1]).permute(0, 2, 1)
        return model.pos_drop(x).unflatten(1, grid)

    def block(layer: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: layer(x.flatten(1, 2), *x.shape[1:3]).unflatten(1, x.shape[1:3])

    def head(x: Tensor) -> Tensor:
        x = x.flatten(1, 2)
        return model.forward_head(model.norm(model.forward_cls(x) if model.cls_attn_blocks is not None else x))

    return Backbone(stem, [block(layer) for layer in model.blocks], head, image, model=model, layout="NHWC")


@register_backbone("timm.models.mlp_mixer.MlpMixer")
def mixer(model: Any, image: Image) -> Backbone:
    """MLP-Mixer, ResMLP, gMLP."""
    return Backbone(model.stem, list(model.blocks), _head(model), image, model=model)
