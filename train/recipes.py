"""What a data set asks for: training recipes and how a model cuts up small images."""

from __future__ import annotations

from typing import Any

# A 2-2-2-2 Swin with two-pixel patches and small windows: what a 32-pixel image needs in place of the 224-pixel design.
_SMALL_SWIN = {"patch_size": 2, "window_size": 4, "embed_dim": 32, "depths": (2, 2, 2, 2), "num_heads": (2, 4, 8, 16)}
_SMALL_IMAGES = {
    "model_kwargs": _SMALL_SWIN,
    "epochs": 30,
    "lr": 1e-3,
    "clip_grad": 1.0,
    "smoothing": 0.1,
    "crop_padding": 4,
}
# What differs from the defaults above, by data set. No flip where mirror images are other classes or none (digits).
RECIPES: dict[str, dict[str, Any]] = {
    # 16 tokens, one block per stage; the merging between stages is what tells this Swin where a stroke is.
    "digits": {
        **_SMALL_IMAGES,
        "model_kwargs": {**_SMALL_SWIN, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)},
        "batch_size": 64,
        "lr": 3e-3,
        "crop_padding": 1,
        "hflip": False,
    },
    "cifar10": _SMALL_IMAGES,
    "cifar100": _SMALL_IMAGES,
    "svhn": {**_SMALL_IMAGES, "hflip": False},
    "fashion-mnist": {**_SMALL_IMAGES, "model_kwargs": {**_SMALL_SWIN, "window_size": 7}, "crop_padding": 2},
    "stl10": {**_SMALL_IMAGES, "model_kwargs": {**_SMALL_SWIN, "patch_size": 4, "window_size": 6}, "crop_padding": 12},
}


# The arguments of a timm model that say how it cuts images up. Whoever sets one of them has thought about the others.
GEOMETRY = {"img_size", "patch_size", "window_size"}
# How models that are made for 224 pixels cut up small images: patches and windows of a Swin, whose grids then need no padding
# (but 7 × 7 merged, on 28 pixels), and patches of a model that attends to all of its tokens, 16 to 144, at once.
_CUTS = {
    "digits": (2, 4, 2),
    "fashion-mnist": (2, 7, 4),
    **dict.fromkeys(("cifar10", "cifar100", "svhn"), (2, 4, 4)),
    "stl10": (4, 6, 8),
}


def fitting_geometry(data: str, model: str) -> dict[str, Any]:
    """Arguments that fit ``model`` to the images of ``data``; none where they are as large as models are made for."""
    if data not in _CUTS:
        return {}
    patch, window, patch_of_all = _CUTS[data]
    swin = model.startswith("swin")
    return {"patch_size": patch, "window_size": window} if swin else {"patch_size": patch_of_all}
