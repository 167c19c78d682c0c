"""Validation of every exit, during a run and of a saved one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import fastlocal
from fastlocal.train import checkpoint as checkpoints
from fastlocal.train.build import build_device, build_model, build_trainer
from fastlocal.train.config import TrainConfig
from fastlocal.train.data import Preprocessing, Split, read_validation


@dataclass(frozen=True)
class Measured:
    """Cross-entropy and accuracy (0 to 1) of every exit."""

    loss: list[float]
    accuracy: list[float]


def validate(
    trainer: fastlocal.LocalTrainer,
    split: Split,
    batch_size: int,
    device: torch.device,
    *,
    ema: bool = False,
    until: Callable[[Iterator[Any]], Iterator[Any]] = iter,
) -> Measured | None:
    """Measure every exit of ``trainer`` on ``split``; None if ``until`` ends the reading before its end."""
    loss, correct = torch.zeros(()), torch.zeros(())
    indices = list(torch.arange(len(split)).split(batch_size))
    read = 0
    for images, labels in until(split.batches(indices, None)):
        labels = labels.to(device, non_blocking=True)
        logits = trainer.predict(images.to(device, non_blocking=True), ema=ema)
        exits = len(logits)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.repeat(exits), reduction="none")
        loss = loss.to(device) + losses.view(exits, -1).sum(1)
        correct = correct.to(device) + (logits.argmax(2) == labels).sum(1)
        read += len(labels)
    if read < len(split):
        return None
    return Measured((loss / len(split)).tolist(), (correct / len(split)).tolist())


def evaluate_saved(path: str | Path, **changes: Any) -> dict[str, Any]:
    """Measure every exit of the best checkpoint of a run folder, or of the checkpoint file at ``path``.

    Args:
        changes: new values for options of the run, such as ``data`` or ``batch_size``.

    Returns:
        ``checkpoint``, ``data``, ``images``, and lists over the exits: ``exits``, ``accuracy`` (0 to 1), ``loss``; ``notes`` on
        the images, a sentence each. The
        moving average of the model, if the run keeps one, is the last exit.

    Raises:
        UserError: there is no whole checkpoint, or the data's classes are not the model's.
    """
    path = Path(path)
    if path.is_dir():
        path = path / ("best.pt" if (path / "best.pt").exists() else "last.pt")
    saved = checkpoints.load(path)
    # What a checkpoint may not ask for: that something is fetched, or opened beside the images.
    kept = {**saved["config"], "download": False, "pretrained": False, "initial_checkpoint": None}
    if changes.get("data", kept["data"]) != kept["data"]:
        kept |= {"val_split": 0.0, "val_limit": None}  # they were about the data that the run was trained on
    config = TrainConfig.of(**{**kept, **changes})
    device = build_device(config)
    split, notes = read_validation(config, saved)
    settings = Preprocessing.of(saved["preprocessing"])
    model = build_model(config, len(saved["classes"]), settings.image_size)
    trainer = build_trainer(config, model, device, settings.normalize)
    checkpoints.load_trainer(trainer, saved["trainer"], path)

    measured = validate(trainer, split, config.batch_size, device)
    assert measured is not None
    exits, accuracy, loss = list(trainer.exit_names), measured.accuracy, measured.loss
    if config.model_ema:
        average = validate(trainer, split, config.batch_size, device, ema=True)
        assert average is not None
        exits, accuracy, loss = [*exits, "moving average"], accuracy + average.accuracy, loss + average.loss
    return {
        "checkpoint": str(path),
        "data": config.data,
        "images": len(split),
        "exits": exits,
        "accuracy": accuracy,
        "loss": loss,
        "notes": list(notes),
    }
