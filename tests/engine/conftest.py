"""Small models that every engine test shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn

SWIN: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (2, 2, 2, 2),
    "num_heads": (1, 2, 4, 8),
}
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 5, "num_heads": 2}


@pytest.fixture
def build() -> Callable[..., nn.Module]:
    """``build("swin" | "vit", **overrides)``: the same weights at each call."""

    def build(family: str, **overrides: Any) -> nn.Module:
        torch.manual_seed(0)
        if family == "swin":
            return timm.create_model("swin_tiny_patch4_window7_224", **{"num_classes": 10, **SWIN, **overrides})
        return timm.create_model("vit_tiny_patch16_224", **{"num_classes": 10, **VIT, **overrides})

    return build


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    return torch.randn(8, 3, 32, 32, generator=generator), torch.randint(0, 10, (8,), generator=generator)
