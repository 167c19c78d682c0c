"""What a configuration costs in arithmetic, against plain end-to-end training of the same model."""

from __future__ import annotations

import functools
import json

import torch

from fastlocal import memory
from fastlocal.flops import count
from fastlocal.train.build import build_model, build_trainer
from fastlocal.train.config import TrainConfig


def flops_ratio(config: TrainConfig, classes: int, image_size: tuple[int, int], steps: int) -> float:
    """FLOPs of the run's average step ÷ those of a plain step: one module, nothing recomputed, nothing frozen.

    Args:
        steps: of an epoch; they tell how many of the run's are exact.
    """
    total = config.optimization.epochs * steps
    exact = sum(config.is_exact(step // steps, step) for step in range(total))
    once = config.changed(exact_epochs=0, exact_every=0)
    cost = (total - exact) * _step_flops(_said(once), classes, image_size, exact=False)
    if exact:
        cost += exact * _step_flops(_said(once), classes, image_size, exact=True)
    whole = once.changed(freeze=(), train=(), linear_probe=False)
    plain = whole.changed(objective="end-to-end", modules=1, recompute="none")
    return cost / (total * _step_flops(_said(plain), classes, image_size, exact=False))


def _said(config: TrainConfig) -> str:
    """What the arithmetic of a step hangs on, as a text. The size of the parts and where tensors wait change nothing."""
    kept = config.changed(
        micro_batch=None, residency="all", model_ema=False, torchcompile=False, torchcompile_mode=None
    )
    kept = kept.changed(memory=None, seed=0, epochs=100, warmup_epochs=None, output="runs", experiment="")
    return json.dumps(kept.to_dict())


@functools.cache
def _step_flops(options: str, classes: int, image_size: tuple[int, int], *, exact: bool) -> int:
    config = TrainConfig.of(**json.loads(options))
    with torch.device("meta"):
        model = build_model(config, classes, image_size)
    with memory.dry_run():
        trainer = build_trainer(config, memory.fake_copy(model), torch.device("cpu"), None)
        images = torch.empty(2, config.model.in_chans, *image_size, dtype=torch.uint8)
        labels = torch.zeros(2, dtype=torch.int64)
        return count(lambda: trainer.step(images, labels, exact=exact))
