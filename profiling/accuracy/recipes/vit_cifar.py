"""The finalists on a plain ViT: 8 blocks of width 96, 4-pixel patches, K=4 and K=8, CIFAR-10 (JPEG q75).

Result, seeds 3 to 5, on which nothing was chosen: with the last 40 % exact K=4 comes to 68.93 ± 0.05 % at 1.12 times the FLOPs
of plain training and K=8 to 66.74 ± 0.23 at 1.16, where `end-to-end` comes to 67.15 ± 0.14 at 1.25. Rows and table:
`profiling/results/accuracy/vit_cifar.md`.
Time: eight minutes for 9 runs on an H100, side by side; 55 minutes for 10 epochs on one core.
Command, with the images where `swin_cifar` has them:

    fastlocal bench accuracy --recipe vit_cifar --seeds 3 4 5
"""

from dataclasses import replace

from fastlocal.finish import FINISH
from fastlocal.profiling.accuracy.recipe import OfEpochs
from fastlocal.profiling.accuracy.recipes import swin_cifar

_FEATURE = {"objective": "feature"}
_FINISH = {**_FEATURE, "exact_epochs": OfEpochs(FINISH)}

RECIPE = replace(
    swin_cifar.RECIPE,
    base={
        **swin_cifar.RECIPE.base,
        "model": "vit_tiny_patch16_224",
        "model_kwargs": {"patch_size": 4, "embed_dim": 96, "depth": 8, "num_heads": 3},
    },
    variants={
        "end-to-end": {"objective": "end-to-end"},
        "feature": _FEATURE,
        "feature, last 40 % exact": _FINISH,
        "feature, K=8": {**_FEATURE, "modules": 8},
        "feature, K=8, last 40 % exact": {**_FINISH, "modules": 8},
    },
)
