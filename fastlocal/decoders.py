"""Decoders: from a module's output back to its input, or to the image.

Every decoder takes features with the geometry of the module's output and is scored against a target of another geometry;
both are seen as grids [B, height, width, channels] (class and register tokens are not reconstructed). All but the
convolutional one end in a linear projection, which `fastlocal.kernels.reconstruction_loss` joins with pixel shuffle and
loss, so that the reconstruction itself is never stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block as ViTBlock
from torch import Tensor, nn

from fastlocal.checks import check_choice
from fastlocal.geometry import Geometry, pad_grid, upsampling
from fastlocal.kernels import reconstruction_loss

Kind = Literal["mse", "l1", "smooth_l1"]


class Decoder(nn.Module, ABC):
    """What every decoder offers; subclasses define `loss` and `forward`.

    Args:
        source: geometry of the module's output.
        target: geometry of what is reconstructed.
        kind: the loss of one element.
        normalize_target: normalize each target token to zero mean and unit variance first, as masked autoencoders do
            (He et al., 2022).
    """

    def __init__(self, source: Geometry, target: Geometry, kind: Kind = "mse", normalize_target: bool = False) -> None:
        super().__init__()
        check_choice("reconstruction", kind, get_args(Kind))
        self.source, self.target = source, target
        self.kind: Kind = kind
        self.normalize_target = normalize_target
        self.upsample = upsampling(source, target)

    @abstractmethod
    def forward(self, h: Tensor) -> Tensor:
        """The reconstruction as a grid [B, target.height, target.width, target.channels], for looking at."""

    @abstractmethod
    def loss(self, h: Tensor, target: Tensor) -> Tensor:
        """The mean loss over all elements (fp32 scalar) of reconstructing ``target`` [B, *target.shape] from ``h``."""

    def target_grid(self, target: Tensor) -> Tensor:
        """``target`` as a grid of exactly ``upsample`` times the source's size."""
        rows, columns = self.source.height * self.upsample, self.source.width * self.upsample
        return pad_grid(self.target.to_grid(target), rows, columns)


class ProjectionDecoder(Decoder):
    """``hidden`` per token, then one linear projection to the upsample² · channels values that the token covers."""

    def __init__(self, source: Geometry, target: Geometry, kind: Kind = "mse", normalize_target: bool = False) -> None:
        super().__init__(source, target, kind, normalize_target)
        self.projection = nn.Linear(source.channels, self.upsample**2 * target.channels)
        nn.init.normal_(self.projection.weight, std=0.02)
        nn.init.zeros_(self.projection.bias)

    @abstractmethod
    def hidden(self, h: Tensor) -> Tensor:
        """Features [B, *source.shape] → grid [B, height, width, channels] that the projection reads."""

    def forward(self, h: Tensor) -> Tensor:
        grid = self.projection(self.hidden(h))
        grid = rearrange(grid, "b h w (r s c) -> b (h r) (w s) c", r=self.upsample, s=self.upsample)
        return grid[:, : self.target.height, : self.target.width]

    def loss(self, h: Tensor, target: Tensor) -> Tensor:
        return reconstruction_loss(
            self.hidden(h),
            self.projection.weight,
            self.projection.bias,
            self.target_grid(target),
            upsample=self.upsample,
            kind=self.kind,
            normalize_target=self.normalize_target,
        )


class LinearDecoder(ProjectionDecoder):
    """LayerNorm, then the projection."""

    def __init__(self, source: Geometry, target: Geometry, kind: Kind = "mse", normalize_target: bool = False) -> None:
        super().__init__(source, target, kind, normalize_target)
        self.norm = nn.LayerNorm(source.channels)

    def hidden(self, h: Tensor) -> Tensor:
        return self.norm(self.source.to_grid(h))


class MLPDecoder(ProjectionDecoder):
    """LayerNorm → Linear → GELU, then the projection."""

    def __init__(self, source: Geometry, target: Geometry, kind: Kind = "mse", normalize_target: bool = False) -> None:
        super().__init__(source, target, kind, normalize_target)
        self.norm = nn.LayerNorm(source.channels)
        self.expand = nn.Linear(source.channels, source.channels)
        nn.init.normal_(self.expand.weight, std=0.02)
        nn.init.zeros_(self.expand.bias)

    def hidden(self, h: Tensor) -> Tensor:
        return F.gelu(self.expand(self.norm(self.source.to_grid(h))))


class TransformerDecoder(ProjectionDecoder):
    """One light block of the backbone's own kind (windowed on maps, global on tokens; MLP ratio 1), LayerNorm, projection."""

    def __init__(self, source: Geometry, target: Geometry, kind: Kind = "mse", normalize_target: bool = False) -> None:
        super().__init__(source, target, kind, normalize_target)
        heads = max(source.channels // 32, 1) if source.channels % 32 == 0 else 1
        self.on_maps = source.layout != "tokens"
        if self.on_maps:
            window = min(source.height, source.width, 7)
            self.block: nn.Module = SwinTransformerBlock(
                source.channels, (source.height, source.width), num_heads=heads, window_size=window, mlp_ratio=1.0
            )
        else:
            self.block = ViTBlock(source.channels, num_heads=heads, mlp_ratio=1.0, qkv_bias=True)
        self.norm = nn.LayerNorm(source.channels)

    def hidden(self, h: Tensor) -> Tensor:
        if self.on_maps:
            return self.norm(self.block(self.source.to_grid(h)))
        return self.norm(self.source.to_grid(self.block(h)))


class ConvolutionalDecoder(Decoder):
    """Conv1×1 → nearest upsampling → Conv3×3 + GroupNorm + ReLU → Conv3×3.

    After InfoPro's decoder (Wang et al., ICLR 2021: 12 hidden channels for an image) and local_learning_wsi's (as many as
    the target has). Three choices are ours: the channels shrink *before* the upsampling, because upsampling 768 channels to
    224×224 costs more memory than the network it is meant to save; nearest instead of bilinear, whose backward is not
    deterministic on CUDA; GroupNorm, whose statistics do not depend on the micro-batch.
    """

    def __init__(self, source: Geometry, target: Geometry, kind: Kind = "mse", normalize_target: bool = False) -> None:
        super().__init__(source, target, kind, normalize_target)
        hidden = 12 if target.layout == "image" else target.channels
        self.reduce = nn.Conv2d(source.channels, hidden, 1)
        self.convolution = nn.Conv2d(hidden, hidden, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(1, hidden)
        self.output = nn.Conv2d(hidden, target.channels, 3, padding=1)

    def _reconstruct(self, h: Tensor) -> Tensor:
        x = self.reduce(rearrange(self.source.to_grid(h), "b h w c -> b c h w"))
        x = F.interpolate(x, scale_factor=self.upsample, mode="nearest")
        return rearrange(self.output(F.relu(self.norm(self.convolution(x)))), "b c h w -> b h w c")

    def forward(self, h: Tensor) -> Tensor:
        return self._reconstruct(h)[:, : self.target.height, : self.target.width]

    def loss(self, h: Tensor, target: Tensor) -> Tensor:
        reconstruction, goal = self._reconstruct(h).float(), self.target_grid(target).float()
        if self.normalize_target:
            goal = F.layer_norm(goal, goal.shape[-1:], eps=1e-6)
        loss = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}[self.kind]
        with torch.autocast(h.device.type, enabled=False):
            return loss(reconstruction, goal)


DECODERS: dict[str, type[Decoder]] = {
    "linear": LinearDecoder,
    "mlp": MLPDecoder,
    "conv": ConvolutionalDecoder,
    "transformer": TransformerDecoder,
}
