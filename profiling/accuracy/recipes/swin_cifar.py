"""The reference study: a 32-pixel Swin on CIFAR-10 (JPEG q75), K=4, local learning against exact gradients.

Result: `profiling/results/accuracy/swin_cifar.md`, made by the command. The default is 30 epochs; 10 is a first look (there
local learning is not behind yet), 100 for what is left in the end. Choose on seeds 0 to 2, claim on seeds 3 to 5.
Time: 11 to 22 minutes per 10 epochs of `feature` on one idle core, end-to-end a fifth more; fp32, because CPUs without
bfloat16 matrix units take ten times as long in bf16.
Command, with the images under data/cifar10-jpeg (train/CLASS/*.jpg of 2,000 each, val/CLASS/*.jpg of 500 each):

    fastlocal bench accuracy --recipe swin_cifar --epochs 30 --seeds 0 1 2
"""

from fastlocal.profiling.accuracy.recipe import OfEpochs, Recipe

_FEATURE = {"objective": "feature"}

RECIPE = Recipe(
    base={
        "model": "swin_tiny_patch4_window7_224",
        "model_kwargs": {
            "patch_size": 2,
            "window_size": 4,
            "embed_dim": 32,
            "depths": (2, 2, 2, 2),
            "num_heads": (2, 4, 8, 16),
        },
        "modules": 4,
        "decoder": "linear",
        "epochs": 30,
        "batch_size": 128,
        "lr": 1e-3,
        "warmup_epochs": 1.92,  # 300 steps, whatever the number of epochs
        "clip_grad": 1.0,
        "smoothing": 0.1,
        "crop_padding": 4,
    },
    tasks={"CIFAR-10 (JPEG q75)": {"data": "folder:data/cifar10-jpeg"}},
    variants={
        "end-to-end": {"objective": "end-to-end"},
        "feature": _FEATURE,
        "feature, last 10 % exact": {**_FEATURE, "exact_epochs": OfEpochs(0.1)},
        "feature, last 20 % exact": {**_FEATURE, "exact_epochs": OfEpochs(0.2)},
        "feature, last 40 % exact": {**_FEATURE, "exact_epochs": OfEpochs(0.4)},
        "feature, every 5th step exact": {**_FEATURE, "exact_every": 5},
        "feature, look-ahead 1": {**_FEATURE, "lookahead": 1},
        "cross-entropy": {"objective": "cross-entropy"},
        "cross-entropy, last 20 % exact": {"objective": "cross-entropy", "exact_epochs": OfEpochs(0.2)},
        "image": {"objective": "image"},
        "transport": {"objective": "transport"},
        "feature, K=2": {**_FEATURE, "modules": 2},
        "image, K=2": {"objective": "image", "modules": 2},
        "feature, K=8": {**_FEATURE, "modules": 8},
    },
    note="JPEG copies of CIFAR-10's images: not comparable with published figures.",
)
