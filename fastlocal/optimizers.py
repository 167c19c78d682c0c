"""One optimizer per module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from timm.models import group_parameters
from timm.optim import param_groups_weight_decay
from torch import nn

from fastlocal.backbones import Backbone
from fastlocal.module import LocalModule

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The default: AdamW with learning rate 5e-4 and weight decay 0.05."""
    return torch.optim.AdamW(groups, lr=5e-4, weight_decay=0.05)


def depths(backbone: Backbone) -> dict[str, int]:
    """The depth of each parameter of ``backbone.model``, by name: 0 for the stem, the most for the head.

    timm's own counting, where the model has it (``group_matcher``), so that layer decay is timm's.
    """
    model: Any = backbone.model
    if hasattr(model, "group_matcher"):
        return {
            str(name): depth for name, depth in group_parameters(model, model.group_matcher(), reverse=True).items()
        }
    parts = (backbone.stem, *backbone.blocks, backbone.head)
    found = {parameter: depth for depth, part in enumerate(parts) for parameter in part.parameters()}
    return {name: found.get(parameter, 0) for name, parameter in model.named_parameters()}


def layer_decay(groups: Iterable[dict[str, Any]], decay: float, min_scale: float = 0.0) -> list[dict[str, Any]]:
    """``groups`` as an ``optimizer=`` factory gets them, cut by depth: ``lr_scale`` is ``decay`` to the power of how far below
    the head they are, at least ``min_scale``.

    timm's schedules multiply the learning rate with ``lr_scale``; an optimizer alone does not.
    """
    cut = []
    for group in groups:
        for depth in sorted(set(group["depths"])):
            here = [i for i, entry in enumerate(group["depths"]) if entry == depth]
            part = {**group, **{key: [group[key][i] for i in here] for key in ("params", "names", "depths")}}
            cut.append({**part, "lr_scale": max(min_scale, decay ** (group["deepest"] - depth))})
    return cut


def make_optimizers(
    backbone: Backbone, modules: Sequence[LocalModule], make: Make
) -> tuple[list[list[nn.Parameter]], list[torch.optim.Optimizer | None]]:
    """The parameters that each of ``modules`` trains, in the model's order, and an optimizer for them.

    Args:
        backbone: the whole model, which says what is free of weight decay.
        make: called once per module with at most two parameter groups, the second without weight decay. Beside ``params`` each
            has, in the same order, their ``names`` in the model (heads of ours: ``auxiliary.…``, ``decoder.…``) and their
            ``depths``, from 0 in the stem to ``deepest`` in the head, where heads of ours count too; see `layer_decay`.
            The optimizer need not keep them.

    Returns:
        Two lists as long as ``modules``; the optimizer is None where a module has nothing to train.

    Raises:
        ValueError: two modules share a parameter.
    """
    model = backbone.model
    depth_of, names = depths(backbone), {id(p): name for name, p in model.named_parameters()}
    deepest = max(depth_of.values())
    # timm decides what is free of weight decay from names, so it must see whole-model names, not a module's.
    whole: set[str] = getattr(model, "no_weight_decay", set)()
    groups = param_groups_weight_decay(model, 1.0, no_weight_decay_list=whole)
    for module in modules:
        groups += param_groups_weight_decay(module.heads, 1.0)
    free = {id(p) for group in groups if group["weight_decay"] == 0.0 for p in group["params"]}
    order = {id(p): i for i, p in enumerate(model.parameters())}
    trained, optimizers, seen = [], [], set[int]()
    for module in modules:
        names |= {id(p): name for name, p in module.heads.named_parameters()}
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
        for group in groups:
            group["names"] = [names[id(p)] for p in group["params"]]
            group["depths"] = [depth_of.get(name, deepest) for name in group["names"]]
            group["deepest"] = deepest
        optimizer = make(groups) if groups else None
        for group in optimizer.param_groups if optimizer is not None else ():
            for key in ("names", "depths", "deepest"):  # neither to be saved nor to be stepped on in slices
                group.pop(key, None)
        optimizers.append(optimizer)
    return trained, optimizers
