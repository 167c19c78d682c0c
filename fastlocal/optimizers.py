"""One optimizer per module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from fastlocal.module import LocalModule

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The default: AdamW with learning rate 5e-4 and weight decay 0.05."""
    return torch.optim.AdamW(groups, lr=5e-4, weight_decay=0.05)


def make_optimizers(
    model: nn.Module, modules: Sequence[LocalModule], make: Make
) -> tuple[list[list[nn.Parameter]], list[torch.optim.Optimizer | None]]:
    """The parameters that each of ``modules`` trains, in the model's order, and an optimizer for them.

    Args:
        model: the whole model, which says what is free of weight decay.
        make: called once per module with at most two parameter groups, the second without weight decay.

    Returns:
        Two lists as long as ``modules``; the optimizer is None where a module has nothing to train.

    Raises:
        ValueError: two modules share a parameter.
    """
    # timm decides what is free of weight decay from names, so it must see whole-model names, not a module's.
    whole: set[str] = getattr(model, "no_weight_decay", set)()
    groups = param_groups_weight_decay(model, 1.0, no_weight_decay_list=whole)
    for module in modules:
        groups += param_groups_weight_decay(module.heads, 1.0)
    free = {id(p) for group in groups if group["weight_decay"] == 0.0 for p in group["params"]}
    order = {id(p): i for i, p in enumerate(model.parameters())}
    trained, optimizers, seen = [], [], set[int]()
    for module in modules:
        parameters = [p for p in module.parameters() if p.requires_grad]
        parameters.sort(key=lambda p: order.get(id(p), len(order)))
        if any(id(p) in seen for p in parameters):
            raise ValueError("modules: a parameter is shared by two modules, so they cannot be trained one at a time.")
        seen.update(id(p) for p in parameters)
        trained.append(parameters)
        groups = [
            {"params": [p for p in parameters if id(p) not in free]},
            {"params": [p for p in parameters if id(p) in free], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        optimizers.append(make(groups) if groups else None)
    return trained, optimizers
