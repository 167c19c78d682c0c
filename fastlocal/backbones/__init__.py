"""Models seen as stem → blocks → head: one file per group of families, found by the class of the model."""

from fastlocal.backbones import columns, hugging_face, peft, pyramids, stages, torchvision  # noqa: F401 (they register)
from fastlocal.backbones.backbone import Backbone, Block, Part
from fastlocal.backbones.registry import backbone, register_backbone

__all__ = ["Backbone", "Block", "Part", "backbone", "register_backbone"]
