"""What a data set asks for: training recipes and how a model cuts up small images."""

from __future__ import annotations

from collections.abc import Callable
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


# Named recipes, for --recipe: one per family and purpose. Flags and --config go over them, they over a data set's own.


def finetune_vit() -> dict[str, Any]:
    """Fine-tune a pretrained ViT on photographs.

    BEiT's and timm's habits: layer decay 0.75, little drop path, RandAugment, a moving average; whole gradients, one module at
    a time, since a pretrained model is changed little and every exit of a local objective would have to be learned first.

    Result: 51.6 % (of the moving average, which is exported), where the same without the weights comes to 41.8 %; one seed,
    scaled down in everything but the recipe: a ViT of 6 blocks of width 96 with patches of 4, 500 training and 500 validation
    images of five classes of CIFAR-10 (JPEG q75), from weights trained on 5,000 images of the other five (57.8 % there). Time:
    a minute and a half of one CPU core, in float32. Photographs and the model itself: not measured.
    Command: ``fastlocal train --recipe finetune-vit --data PHOTOS --memory 4GiB``; what was measured added ``--model
    vit_tiny_patch16_224 --model-kwargs patch_size=4 depth=6 embed_dim=96 num_heads=3 --modules 3 --train-limit 500 --val-limit
    500 --initial-checkpoint RUN``, with five classes for PHOTOS and without ``--memory``.
    """
    return {
        **_FINE_TUNING,
        "model": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
        "layer_decay": 0.75,
        "drop_path": 0.1,
    }


def finetune_swin() -> dict[str, Any]:
    """Fine-tune a pretrained Swin on photographs.

    As `finetune_vit`, with the milder layer decay that Swin's own fine-tuning has (its stages differ less than ViT's blocks).

    Result: 56.2 % (of the moving average), where the same without the weights comes to 48.8 %; one seed, scaled down as there,
    to the Swin of `scratch_small` (59.8 % on the other five classes). Time: 70 seconds of one CPU core, in float32. Photographs
    and the model itself: not measured.
    Command: ``fastlocal train --recipe finetune-swin --data PHOTOS --memory 2GiB``; what was measured added ``--model
    swin_tiny_patch4_window7_224 --model-kwargs patch_size=2 window_size=4 embed_dim=32 depths=2,2,2,2 num_heads=2,4,8,16
    --modules 4 --train-limit 500 --val-limit 500 --initial-checkpoint RUN``, with five classes for PHOTOS and without
    ``--memory``.
    """
    return {
        **_FINE_TUNING,
        "model": "swin_tiny_patch4_window7_224.ms_in1k",
        "layer_decay": 0.9,
        "drop_path": 0.2,
    }


def scratch_small() -> dict[str, Any]:
    """Train a small Swin on images of 32 pixels from nothing, with local objectives.

    Without an exact finish: in 10 epochs local learning does not fall behind.

    Result: 55.1 % (after modules 1 to 4: 34.3, 45.5, 52.7, 55.1) on 20,000 images of CIFAR-10 that were JPEGs (quality 75), one
    seed; end-to-end comes to 54.5 %. Time: 10 epochs at 387 images/s, about 9 minutes on one CPU thread
    with units for bfloat16; without, in float32, at 158 images/s, about 22.
    Command: ``fastlocal train --recipe scratch-small --data cifar10 --train-limit 20000``
    """
    return {
        **_SMALL_IMAGES,
        "epochs": 10,
        "warmup_epochs": 2,
        "batch_size": 128,
        "objective": "feature",
        "exact_epochs": 0,
        "amp": True,
    }


def scratch_224() -> dict[str, Any]:
    """Train a Swin-T on photographs of 224 pixels from nothing.

    The recipe of Swin's paper (300 epochs, AdamW 1e-3 for 1024 images, mixup 0.8, cutmix 1, RandAugment, erasing 0.25), its
    learning rate scaled to the batch.

    Result: that it learns: 41.8 % of five classes (after modules 1 to 4: 32.8, 35.4, 39.4, 41.8), one seed, scaled down to 12
    epochs of the Swin of `scratch_small` and 1,000 training and 500 validation images of CIFAR-10 (JPEG q75), 32 pixels. Time:
    one to three minutes of one CPU core, in float32. Photographs and the 300 epochs: not measured.
    Command: ``fastlocal train --recipe scratch-224 --data PHOTOS --memory 2GiB``; what was measured added ``--model-kwargs
    patch_size=2 window_size=4 embed_dim=32 depths=2,2,2,2 num_heads=2,4,8,16 --epochs 12 --warmup-epochs 2 --lr-base 4e-3
    --train-limit 1000 --val-limit 500``, with five classes for PHOTOS and without ``--memory``.
    """
    return {
        "model": "swin_tiny_patch4_window7_224",
        "epochs": 300,
        "warmup_epochs": 20,
        "lr_base": 1e-3,
        "lr_base_size": 1024,
        "lr_base_scale": "linear",
        "warmup_lr": 1e-6,
        "min_lr": 1e-5,
        "weight_decay": 0.05,
        "clip_grad": 5.0,
        "smoothing": 0.1,
        "drop_path": 0.2,
        "mixup": 0.8,
        "cutmix": 1.0,
        "aa": "rand-m9-mstd0.5-inc1",
        "color_jitter": 0.4,
        "reprob": 0.25,
        "amp": True,
    }


_FINE_TUNING: dict[str, Any] = {
    "pretrained": True,
    "objective": "end-to-end",
    "epochs": 20,
    "warmup_epochs": 2,
    "batch_size": 64,
    "lr_base": 5e-4,
    "lr_base_scale": "linear",
    "min_lr": 1e-6,
    "clip_grad": 1.0,
    "smoothing": 0.1,
    "aa": "rand-m9-mstd0.5-inc1",
    "scale": (0.3, 1.0),
    "amp": True,
    "model_ema": True,
}
NAMED: dict[str, Callable[[], dict[str, Any]]] = {
    "finetune-vit": finetune_vit,
    "finetune-swin": finetune_swin,
    "scratch-small": scratch_small,
    "scratch-224": scratch_224,
}
