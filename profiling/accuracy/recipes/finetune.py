"""Fine-tuning, as owners of small cards do: start from a trained model, and learn five new classes with each objective.

Result: none yet; `profiling/results/accuracy/finetune.md` once the commands have run.
Time: not measured.
Commands, with five classes' images under data/first and the other five's under data/second (train/CLASS/*, val/CLASS/*):

    fastlocal train --data folder:data/first --objective end-to-end --epochs 30 --lr 1e-3 --crop-padding 4 --clip-grad 1 \\
        --smoothing 0.1 --experiment first \\
        --model-kwargs patch_size=2 window_size=4 embed_dim=32 depths=2,2,2,2 num_heads=2,4,8,16
    fastlocal bench accuracy --recipe finetune --initial-checkpoint runs/first/model.safetensors
"""

from dataclasses import replace

from fastlocal.finish import FINISH
from fastlocal.profiling.accuracy.recipe import OfEpochs
from fastlocal.profiling.accuracy.recipes import swin_cifar

RECIPE = replace(
    swin_cifar.RECIPE,
    base={**swin_cifar.RECIPE.base, "epochs": 10, "lr": 2e-4, "warmup_epochs": 1.0},
    tasks={"CIFAR-10 (JPEG q75), five more classes": {"data": "folder:data/second"}},
    variants={
        "end-to-end": {"objective": "end-to-end"},
        "feature": {"objective": "feature"},
        "feature, last 40 % exact": {"objective": "feature", "exact_epochs": OfEpochs(FINISH)},
        "image": {"objective": "image"},
        "cross-entropy": {"objective": "cross-entropy"},
        "transport": {"objective": "transport"},
    },
)
