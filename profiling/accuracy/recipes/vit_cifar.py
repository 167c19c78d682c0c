"""The finalists on a plain ViT: 8 blocks of width 96, 4-pixel patches, K=4 and K=8, CIFAR-10 (JPEG q75).

Result: none yet; `profiling/results/accuracy/vit_cifar.md` once the command has run.
Time: not measured.
Command, with the images where `swin_cifar` has them:

    fastlocal bench accuracy --recipe vit_cifar --epochs 30 --seeds 3 4 5
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
