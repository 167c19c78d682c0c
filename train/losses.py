"""What training minimizes in place of the plain cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

from fastlocal.train.config import TrainConfig
from fastlocal.train.errors import UserError


def training_loss(config: TrainConfig, classes: int, labels: Sequence[int] | Tensor) -> nn.Module | None:
    """The loss that ``config`` asks for, None for the engine's own.

    Args:
        labels: of all training images; they say how rare a class is.

    Raises:
        UserError: there are not as many weights as classes.
    """
    options = config.optimization
    smoothing = 0.0 if config.augmentation.mixes else options.smoothing  # mixup smooths its own labels
    if options.bce_loss:
        loss: nn.Module = BinaryCrossEntropy(
            smoothing, target_threshold=options.bce_target_thresh, sum_classes=options.bce_sum
        )
    elif options.class_weights is not None:
        loss = WeightedCrossEntropy(_weights(options.class_weights, classes, labels), smoothing)
    else:
        return None
    loss.of_classes = True  # type: ignore[assignment]  # its labels are classes: the engine may count who is right
    return loss


def _weights(given: str | tuple[float, ...], classes: int, labels: Sequence[int] | Tensor) -> Tensor:
    if given == "balanced":
        counts = torch.bincount(torch.as_tensor(labels, device="cpu"), minlength=classes)
        return len(labels) / (classes * counts.clamp(min=1))
    if len(given) != classes:
        raise UserError(f"--class-weights takes 'balanced' or one number per class, {classes}; got {len(given)}.")
    return torch.tensor(given, dtype=torch.float32, device="cpu")


class WeightedCrossEntropy(nn.Module):
    """Cross-entropy with a weight for each class [classes], a mean over images: `torch.nn.CrossEntropyLoss` divides by the sum
    of their weights instead, which would make gradients depend on how a batch is cut into parts."""

    def __init__(self, weight: Tensor, smoothing: float) -> None:
        super().__init__()
        self.weight, self.smoothing = weight.float(), smoothing

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.weight = self.weight.to(logits.device)
        return F.cross_entropy(
            logits, labels, weight=self.weight, label_smoothing=self.smoothing, reduction="none"
        ).mean()
