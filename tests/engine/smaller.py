"""timm's models with fewer, narrower layers of the same kinds, so that a test can train each name."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any
from unittest import mock

import timm
import torch
from torch import nn

from fastlocal.backbones import Backbone, backbone

COLUMN = {"img_size": 64, "embed_dim": 48, "depth": 3, "num_heads": 4}
SMALL_VIT = {**COLUMN, "patch_size": 16}
SMALL_SWIN = {"img_size": 64, "embed_dim": 16, "num_heads": (1, 2, 4, 8), "depths": (2, 2, 2, 2)}
STAGES = {"depths": (1, 1, 2, 1)}
HEADS = {"num_heads": (1, 2, 4, 8)}
WIDTHS = {"embed_dims": (16, 32, 64, 128)}
# Arguments of a class that replace those of the name; "cfg" holds fields of a configuration object.
SMALLER: dict[str, dict[str, Any]] = {
    "beit.Beit": SMALL_VIT,
    "cait.Cait": {**SMALL_VIT, "depth_token_only": 1},
    "coat.CoaT": {"img_size": 64},
    "davit.DaVit": {**STAGES, **WIDTHS, **HEADS},
    "deepseek_vit.DeepseekVitClassifier": {"embed_dim": 64, "depth": 2, "num_heads": 4},
    "deit.VisionTransformerDistilled": SMALL_VIT,
    "efficientformer.EfficientFormer": {"depths": (1, 1, 2, 9)},
    "efficientformer_v2.EfficientFormerV2": {"depths": (1, 1, 6, 4), "img_size": 64},
    "eva.Eva": COLUMN,
    "fastvit.FastVit": {"layers": (1, 1, 2, 1)},
    "gcvit.GlobalContextVit": {"img_size": 64, "depths": (2, 2, 2, 2), "embed_dim": 32, **HEADS},
    "hiera.Hiera": {"img_size": 128, "embed_dim": 32, "stages": (1, 1, 2, 1)},
    "hieradet_sam2.HieraDet": {"stages": (1, 2, 2, 1), "embed_dim": 16, "num_heads": 1, "global_att_blocks": (4,)},
    "levit.Levit": {"img_size": 64, "depth": (1, 2, 1)},
    "levit.LevitDistilled": {"img_size": 64, "depth": (1, 2, 1)},
    "maxxvit.MaxxVit": {"img_size": 64, "cfg": {"embed_dim": (32, 32, 32, 64), "stem_width": 32, **STAGES}},
    "metaformer.MetaFormer": {**STAGES, "dims": (16, 32, 32, 64)},
    "mvitv2.MultiScaleVit": {"img_size": 64, "cfg": {"depths": (1, 2, 2, 1), "embed_dim": 32, "num_heads": 1}},
    "nest.Nest": {
        "img_size": 64,
        "embed_dims": (32, 64, 64),
        "num_heads": (1, 2, 2),
        "depths": (1, 1, 2),
        "drop_path_rate": 0.1,  # timm's 0.5 drops whole blocks in a batch of two
    },
    "nextvit.NextViT": {"depths": (1, 1, 5, 1)},
    "naflexvit.NaFlexVit": {"embed_dim": 48, "depth": 3, "num_heads": 4},
    "pit.PoolingVisionTransformer": {"img_size": 96, "depth": (1, 2, 1), "base_dims": (16, 16, 16), "heads": (1, 2, 4)},
    "pvt_v2.PyramidVisionTransformerV2": {**STAGES, **WIDTHS, **HEADS},
    "qwen3_vit.Qwen3VitClassifier": {"embed_dim": 64, "depth": 2, "num_heads": 4},
    "swin_transformer.SwinTransformer": {**SMALL_SWIN, "window_size": 3},  # pads, shifts
    "swin_transformer_v2.SwinTransformerV2": {**SMALL_SWIN, "window_size": 4},
    "swin_transformer_v2_cr.SwinTransformerV2Cr": {**SMALL_SWIN, "window_size": 2},
    "tiny_vit.TinyVit": {"window_sizes": (4, 4, 2, 2)},
    "twins.Twins": {**STAGES, **WIDTHS, **HEADS},
    "vision_transformer.VisionTransformer": SMALL_VIT,
    "vision_transformer_relpos.VisionTransformerRelPos": SMALL_VIT,
    "vision_transformer_sam.VisionTransformerSAM": {**COLUMN, "img_size": 128, "global_attn_indexes": (1,)},
    "volo.VOLO": {"img_size": 64, "layers": (1, 1, 2, 1), "embed_dims": (32, 64, 64, 64), "num_heads": (1, 2, 2, 2)},
    "xcit.Xcit": COLUMN,
}
# Parts of names that are built unlike the others of their class.
_FIVE_STAGES: dict[str, Any] = {"layers": (1, 1, 2, 1, 1), "embed_dims": (16, 32, 64, 64, 64)}
_SHALLOW: dict[str, Any] = {"depth": 2, "img_size": 64}  # convolutions make the tokens, whose width is theirs
_NARROW: dict[str, Any] = {"cfg": {"width_factor": 0.25}}
UNLIKE = dict.fromkeys(("fastvit_mci3", "fastvit_mci4"), _FIVE_STAGES)
UNLIKE |= dict.fromkeys(("resnet50x", "resnet101_clip"), _NARROW)
UNLIKE |= dict.fromkeys(("vitamin_", "vit_base_mci_", "_r26_", "_r50_", "_resnet26d_", "_resnet50d_"), _SHALLOW)
IMAGE_SIZES = {
    "byobnet.ByobNet": 64, "coat.CoaT": 64, "cpubone.CPUBone": 64, "csatv2.CSATv2": 128, "davit.DaVit": 64,
    "edgenext.EdgeNeXt": 64, "fastvit.FastVit": 64, "hieradet_sam2.HieraDet": 128, "lowformer.LowFormer": 64,
    "metaformer.MetaFormer": 64, "naflexvit.NaFlexVit": 96, "nextvit.NextViT": 64, "qwen3_vit.Qwen3VitClassifier": 128,
    "swiftformer.SwiftFormer": 64, "tiny_vit.TinyVit": 64,
}  # fmt: skip
OWN_SIZE = ("bat_", "bot", "halo", "lambda")  # parts of names: their attention is built for one grid


def smaller(name: str, kind: str) -> tuple[nn.Module, Backbone]:
    """timm's model ``name`` of class ``kind``, cut down to 7 classes, and its backbone."""
    given = next((options for part, options in UNLIKE.items() if part in name), SMALLER.get(kind, {}))
    module, _, attribute = kind.rpartition(".")
    model_class = getattr(importlib.import_module(f"timm.models.{module}"), attribute)
    original = model_class.__init__

    def init(self: Any, *args: Any, **options: Any) -> None:
        changed = dict(given)
        if "cfg" in given:
            changed["cfg"] = dataclasses.replace(options["cfg"], **given["cfg"])
        original(self, *args, **{**options, **changed})

    torch.manual_seed(0)
    with mock.patch.object(model_class, "__init__", init):  # a name's own arguments cannot all be given again to timm
        model = timm.create_model(name, num_classes=7)
    size = None if any(part in name for part in OWN_SIZE) else IMAGE_SIZES.get(kind) or given.get("img_size")
    return model, backbone(model, size)
