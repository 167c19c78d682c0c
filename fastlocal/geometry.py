"""The shape of features at a block boundary, and the one common view of it: a grid [B, height, width, channels]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """The shape of one sample between two blocks.

    ``layout`` is ``"NHWC"`` (Swin) or ``"NCHW"`` (ConvNeXt), ``"tokens"`` (ViT: ``prefix`` class and register tokens, then
    height·width patch tokens in row order) or ``"image"`` (NCHW as well, and what the network reads).
    """

    height: int
    width: int
    channels: int
    layout: Literal["NHWC", "NCHW", "tokens", "image"]
    prefix: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample, without the batch."""
        if self.layout == "NHWC":
            return (self.height, self.width, self.channels)
        if self.layout in ("NCHW", "image"):
            return (self.channels, self.height, self.width)
        return (self.prefix + self.height * self.width, self.channels)

    def to_grid(self, x: Tensor) -> Tensor:
        """View ``x`` [B, *shape] as a grid [B, height, width, channels]; prefix tokens are left out, nothing is copied."""
        if self.layout == "NHWC":
            return x
        if self.layout in ("NCHW", "image"):
            return rearrange(x, "b c h w -> b h w c")
        return rearrange(x[:, self.prefix :], "b (h w) c -> b h w c", h=self.height)


def upsampling(source: Geometry, target: Geometry) -> int:
    """How many target cells, along each side, one cell of ``source`` must cover.

    Raises:
        ValueError: height and width would need different factors (a patch that is not square).
    """
    rows, columns = -(-target.height // source.height), -(-target.width // source.width)
    if rows != columns:
        raise ValueError(
            f"decoder: reconstructing {target.height}×{target.width} from {source.height}×{source.width} needs different"
            f" factors for height and width ({rows} and {columns}), and only square ones are supported."
        )
    return rows


def pad_grid(grid: Tensor, height: int, width: int) -> Tensor:
    """Repeat the last row and column of ``grid`` [B, h, w, C] until it is ``height`` × ``width``.

    Downsampling rounds an odd side up, so upsampling again overshoots it by a row or a column.
    """
    if grid.shape[1] < height:
        grid = torch.cat([grid, grid[:, -1:].expand(-1, height - grid.shape[1], -1, -1)], dim=1)
    if grid.shape[2] < width:
        grid = torch.cat([grid, grid[:, :, -1:].expand(-1, -1, width - grid.shape[2], -1)], dim=2)
    return grid
