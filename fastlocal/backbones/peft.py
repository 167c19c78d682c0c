"""Models with adapters from the library peft, such as LoRA: the model inside, whose layers peft has replaced."""

from __future__ import annotations

from typing import Any

from fastlocal.backbones.backbone import Backbone
from fastlocal.backbones.registry import Image, backbone, register_backbone


@register_backbone("peft.peft_model.PeftModel")
def peft_model(model: Any, image: Image) -> Backbone:
    return backbone(model.get_base_model(), image[1:])
