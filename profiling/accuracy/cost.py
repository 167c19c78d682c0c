"""What a configuration costs in arithmetic, against plain end-to-end training of the same model."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastlocal import memory
from fastlocal.profiling.flops import count
from fastlocal.train.build import build_model, build_trainer
from fastlocal.train.config import TrainConfig


def flops_ratio(config: TrainConfig, classes: int, image_size: int, steps: int) -> float:
    """FLOPs of the run's average step ÷ those of a plain step: one module, nothing recomputed.

    Args:
        steps: of an epoch; they tell how many of the run's are exact.
    """
    total = config.epochs * steps
    exact = sum(config.is_exact(step // steps, step) for step in range(total))
    plain = replace(config, objective="end-to-end", modules=1, recompute="none", exact_epochs=0, exact_every=0)
    cost = exact * _step_flops(config, classes, image_size, exact=True) if exact else 0
    if exact < total:
        cost += (total - exact) * _step_flops(config, classes, image_size, exact=False)
    return cost / (total * _step_flops(plain, classes, image_size, exact=False))


def _step_flops(config: TrainConfig, classes: int, image_size: int, *, exact: bool) -> int:
    # Neither the size of the parts nor where tensors wait changes what is computed.
    config = replace(
        config, micro_batch=None, residency="all", model_ema=False, torchcompile=False, torchcompile_mode=None
    )
    with torch.device("meta"):
        model = build_model(config, classes, image_size)
    with memory.dry_run():
        trainer = build_trainer(config, memory.fake_copy(model), torch.device("cpu"), None)
        images = torch.empty(2, 3, image_size, image_size, dtype=torch.uint8)
        labels = torch.zeros(2, dtype=torch.int64)
        return count(lambda: trainer.step(images, labels, exact=exact))
