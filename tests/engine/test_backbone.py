"""stem → blocks → head reproduces timm's own forward, bit for bit."""

from __future__ import annotations

import pytest
import timm
import torch

from fastlocal.backbone import backbone

SMALL_SWIN = {"img_size": 64, "embed_dim": 16, "num_heads": (1, 2, 4, 8), "drop_path_rate": 0.2}
SMALL_VIT = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 2}
FAMILIES = [
    ("swin_tiny_patch4_window7_224", {**SMALL_SWIN, "depths": (2, 2, 2, 2), "window_size": 3}),  # pads, shifts
    ("swinv2_tiny_window8_256", {**SMALL_SWIN, "depths": (2, 2, 2, 2), "window_size": 4}),
    ("vit_tiny_patch16_224", {**SMALL_VIT, "drop_path_rate": 0.2, "proj_drop_rate": 0.1}),
    ("vit_base_patch32_clip_224", SMALL_VIT),  # norm before the blocks
    ("vit_small_patch14_reg4_dinov2", SMALL_VIT),  # register tokens, position embedding without them
    ("vit_base_patch16_siglip_224", SMALL_VIT),  # attention pooling
    ("vit_relpos_small_patch16_224", SMALL_VIT),
    ("deit_tiny_distilled_patch16_224", SMALL_VIT),  # two heads
    ("deit3_small_patch16_224", {**SMALL_VIT, "drop_path_rate": 0.2}),  # layer scale
    ("beit_base_patch16_224", {**SMALL_VIT, "drop_path_rate": 0.2}),  # relative position bias in every block
    ("beitv2_base_patch16_224", SMALL_VIT),
    ("eva02_tiny_patch14_224", {**SMALL_VIT, "drop_path_rate": 0.2}),  # rotary embedding
]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("name", "options"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_stem_blocks_head_equal_the_model(name: str, options: dict, training: bool) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **options).train(training)
    view = backbone(model)
    images = torch.randn(2, *view.image.shape)

    torch.manual_seed(1)
    expected = model(images)
    torch.manual_seed(1)
    x = view.stem(images)
    for geometry, block in zip(view.boundaries, view.blocks, strict=False):
        assert tuple(x.shape[1:]) == geometry.shape
        assert geometry.to_grid(x).shape[1:] == (geometry.height, geometry.width, geometry.channels)
        _, x = block(x)
    assert tuple(x.shape[1:]) == view.boundaries[-1].shape
    assert torch.equal(view.head(x), expected)


@pytest.mark.parametrize(("name", "options"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_every_parameter_is_in_exactly_one_part(name: str, options: dict) -> None:
    model = timm.create_model(name, num_classes=7, **options)
    view = backbone(model)
    owned = [id(p) for part in (view.stem, *view.blocks, view.head) for p in part.parameters()]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("resnet18", {}, "ResNet is not supported; supported are timm's swin_"),
        ("vit_tiny_patch16_224", {"patch_drop_rate": 0.5}, "patch dropout"),
        ("vit_srelpos_small_patch16_224", {}, "shares one shared_rel_pos"),
        ("vit_small_patch16_rope_mixed_224", {}, "mixed rotary embeddings"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_one_sentence(name: str, options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        backbone(timm.create_model(name, **options))
    assert "\n" not in str(error.value)
