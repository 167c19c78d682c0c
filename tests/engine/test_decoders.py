"""Every decoder inverts every geometry, and scores what it would reconstruct."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastlocal.decoders import DECODERS
from fastlocal.geometry import Geometry, pad_grid, upsampling

SHAPES = {
    "swin stage to stage": (Geometry(4, 4, 32, "NHWC"), Geometry(8, 8, 16, "NHWC")),
    "swin odd side": (Geometry(4, 4, 32, "NHWC"), Geometry(7, 7, 16, "NHWC")),
    "swin to image": (Geometry(4, 4, 32, "NHWC"), Geometry(32, 32, 3, "image")),
    "vit to vit": (Geometry(3, 5, 32, "tokens", prefix=1), Geometry(3, 5, 32, "tokens", prefix=1)),
    "vit to image": (Geometry(3, 3, 32, "tokens", prefix=5), Geometry(24, 24, 3, "image")),
}


@pytest.mark.parametrize("kind", ["mse", "l1", "smooth_l1"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", DECODERS)
def test_loss_is_that_of_the_reconstruction(name: str, shapes: tuple[Geometry, Geometry], kind: str) -> None:
    source, target = shapes
    torch.manual_seed(0)
    decoder = DECODERS[name](source, target, kind)  # type: ignore[arg-type]
    h = torch.randn(2, *source.shape, requires_grad=True)
    goal = torch.randn(2, *target.shape)

    loss = decoder.loss(h, goal)
    reconstruction = decoder(h)
    assert reconstruction.shape == (2, target.height, target.width, target.channels)
    if source.height * decoder.upsample == target.height:  # nothing is padded
        expected = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}[kind](
            reconstruction, target.to_grid(goal)
        )
        torch.testing.assert_close(loss, expected)
    loss.backward()
    assert h.grad is not None
    assert h.grad.abs().sum() > 0
    assert all(p.grad is not None for p in decoder.parameters())


@pytest.mark.parametrize("name", DECODERS)
def test_normalized_target_ignores_scale_and_offset(name: str) -> None:
    source, target = SHAPES["vit to vit"]
    decoder = DECODERS[name](source, target, "mse", normalize_target=True)
    h, goal = torch.randn(2, *source.shape), torch.randn(2, *target.shape)
    torch.testing.assert_close(decoder.loss(h, goal), decoder.loss(h, 3 * goal + 1))
    assert not torch.allclose(decoder.loss(h, goal), decoder.loss(h, goal.flip(-1)))


def test_padding_repeats_the_last_row_and_column() -> None:
    grid = torch.arange(6.0).view(1, 2, 3, 1)
    padded = pad_grid(grid, 3, 4)
    assert padded[0, :, :, 0].tolist() == [[0, 1, 2, 2], [3, 4, 5, 5], [3, 4, 5, 5]]


def test_different_factors_for_height_and_width_are_refused() -> None:
    with pytest.raises(ValueError, match="needs different factors for height and width"):
        upsampling(Geometry(4, 4, 8, "NHWC"), Geometry(8, 16, 8, "NHWC"))


def test_unknown_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="reconstruction must be one of mse, l1, smooth_l1, got 'l3'"):
        DECODERS["linear"](*SHAPES["vit to vit"], "l3")  # type: ignore[arg-type]
