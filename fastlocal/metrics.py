"""What a training step measures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepMetrics:
    """What one step measured; tensors stay on the device, so that reading them is the caller's choice.

    Attributes:
        loss: [exits] fp32, each classifier's cross-entropy, a mean over the batch. Every module has a classifier, except
            with ``objective="end-to-end"``, which has the last one only.
        correct: [exits], how many samples each classifier got right (against the likelier label, if labels are soft).
        regularizer: [exits] fp32, reconstruction or transport term before its weight; 0 where there is none.
        gradient_norm: [modules] fp32, before clipping.
        skipped: [modules] bool, whether a non-finite gradient made the module skip its step.
        samples: size of the batch.
    """

    loss: Tensor
    correct: Tensor
    regularizer: Tensor
    gradient_norm: Tensor
    skipped: Tensor
    samples: int


class Recorder:
    """Sums up a step's metrics over its parts."""

    def __init__(self, samples: int, exits: range, modules: int, device: torch.device, counts: bool = True) -> None:
        self.samples = samples
        self.counts = counts  # who is right: what only classes can tell, not a loss of the user's own
        self.exits = exits
        self.loss, self.regularizer = (torch.zeros(len(exits), device=device) for _ in range(2))
        self.correct = torch.zeros(len(exits), dtype=torch.int64, device=device)
        self.gradient_norm = torch.zeros(modules, device=device)
        self.skipped = torch.zeros(modules, dtype=torch.bool, device=device)

    def begin(self, k: int) -> None:
        """Forget what was added for module ``k``, which is about to see the batch."""
        if k in self.exits:
            for sums in (self.loss, self.correct, self.regularizer):
                sums[self.exits.index(k)] = 0

    @torch.no_grad()
    def add(self, k: int, loss: Tensor, logits: Tensor, labels: Tensor, regularizer: Tensor | None) -> None:
        exit, share = self.exits.index(k), len(labels) / self.samples
        self.loss[exit] += loss * share
        if regularizer is not None:
            self.regularizer[exit] += regularizer * share
        if not self.counts:
            return
        likelier = labels if labels.ndim == 1 else labels.argmax(dim=1)
        self.correct[exit] += (logits.argmax(dim=1) == likelier).sum()

    def metrics(self) -> StepMetrics:
        return StepMetrics(self.loss, self.correct, self.regularizer, self.gradient_norm, self.skipped, self.samples)
