"""The auxiliary classifier of a local module."""

from __future__ import annotations

from torch import Tensor, nn

from fastlocal.geometry import Geometry


class AuxiliaryHead(nn.Module):
    """LayerNorm → mean over the grid → Linear: features [B, *geometry.shape] → logits [B, classes].

    The head of greedy local learning on Swin in TRGL (Karkar et al., NeurIPS 2023). It has no BatchNorm, so that
    recomputation and micro-batches leave its statistics alone.
    """

    def __init__(self, geometry: Geometry, classes: int) -> None:
        super().__init__()
        self.geometry = geometry
        self.norm = nn.LayerNorm(geometry.channels)
        self.classifier = nn.Linear(geometry.channels, classes)
        # Not trunc_normal_: its bounds, ±2, are a hundred deviations away, and torch 2.14 draws it otherwise than 2.11.
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.norm(self.geometry.to_grid(x)).mean(dim=(1, 2)))
