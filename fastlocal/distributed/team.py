"""What a trainer settles with the other processes before and after training: who has what, and that all agree."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastlocal.backbones import Backbone
from fastlocal.backbones.backbone import unchanged_by
from fastlocal.distributed.module_parallel import assign
from fastlocal.distributed.ranks import Ranks
from fastlocal.dry_run import without_values
from fastlocal.flops import count
from fastlocal.module import LocalModule
from fastlocal.objectives import Objective

if TYPE_CHECKING:
    from fastlocal.trainer import LocalTrainer


def refuse(backbone: Backbone, modules: Sequence[LocalModule], objective: Objective, ranks: Ranks) -> None:
    """Raise ValueError for what several processes cannot train as one would."""
    name = type(backbone.model).__name__
    if ranks.data.size > 1 and backbone.batch_norms:
        raise ValueError(
            f"mesh: the BatchNorm layers of {name} normalize over what they are given together, so {ranks.data.size} parts of a"
            " batch would train another model; use a mesh with 'modules' alone."
        )
    if ranks.modules.size == 1:
        return
    if objective.exact:
        raise ValueError(
            f"objective={objective.name!r} sends gradients back from module to module, and a mesh with 'modules' sends nothing"
            " back; use a mesh with 'data' alone, which gives exact gradients on any number of devices."
        )
    if any(module.lookahead for module in modules):
        raise ValueError(
            "lookahead must be 0 on a mesh with 'modules': a module would train blocks that another process has; use a mesh"
            " with 'data' alone."
        )
    if len(modules) < ranks.modules.size:
        raise ValueError(
            f"modules: {len(modules)} modules are too few for {ranks.modules.size} processes along 'modules'; give at least"
            " one to each."
        )


def assigned(
    modules: Sequence[LocalModule],
    backbone: Backbone,
    objective: Objective,
    ranks: Ranks,
    cuts: Sequence[int] | None,
) -> list[range]:
    """The modules of each process along "modules".

    Raises:
        ValueError: ``cuts`` are not one for each process but the first, increasing; or modules of two processes share a
            parameter.
    """
    if ranks.modules.size == 1:
        if cuts:
            raise ValueError("rank_cuts needs a mesh with 'modules'.")
        return [range(len(modules))]
    if cuts is None:
        spans = assign(forward_flops(modules, backbone, objective), ranks.modules.size)
    else:
        edges = [0, *cuts, len(modules)]
        if len(cuts) != ranks.modules.size - 1 or any(not b - a > 0 for a, b in pairwise(edges)):
            raise ValueError(
                f"rank_cuts must be {ranks.modules.size - 1} increasing numbers from 1 to {len(modules) - 1}, the first modules"
                f" of all processes but the first; got {list(cuts)}."
            )
        spans = [range(a, b) for a, b in pairwise(edges)]
    for span in spans:
        owned = {p for k in span for p in modules[k].parameters()}
        if any(p not in owned for k in span for p in modules[k].borrowed):
            raise ValueError(
                f"mesh: modules of two processes share parameters of {type(backbone.model).__name__}; give rank_cuts that keep"
                " them together, or use a mesh with 'data' alone."
            )
    return spans


def forward_flops(modules: Sequence[LocalModule], backbone: Backbone, objective: Objective) -> list[float]:
    """FLOPs of the forward of each module and its loss, on one image."""
    weight = next(backbone.model.parameters())
    about: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}

    def forward(module: LocalModule) -> None:
        image = torch.empty(1, *backbone.image.shape, **about)
        entering = (
            image if module.stem is not None else torch.empty(1, *backbone.boundaries[module.span.start].shape, **about)
        )
        features = module(entering)
        module.classify(features.output)
        if module.head is None:
            labels = torch.zeros(1, dtype=torch.int64, device=weight.device)
            objective.regularizer(module.decoder, features, image, labels)

    counts = []
    for module in modules:
        with unchanged_by(module), without_values():
            counts.append(float(count(partial(forward, module))))
    return counts


def described(model: nn.Module, **arguments: Any) -> dict[str, Any]:
    """What must be the same in every process; memory options may differ, as devices do. Functions cannot be compared."""
    about = {name: value for name, value in arguments.items() if not callable(value)}
    return {"model": f"{type(model).__name__} ({_digest(model.named_parameters())})", **about}


def described_training(
    modules: Sequence[LocalModule], optimizers: Sequence[torch.optim.Optimizer | None]
) -> dict[str, Any]:
    """As `described`, of what the trainer has made."""
    groups = [
        [type(o).__name__, *({n: v for n, v in group.items() if n != "params"} for group in o.param_groups)]
        for o in optimizers
        if o is not None
    ]
    heads = [(f"{k}.{name}", p) for k, module in enumerate(modules) for name, p in module.heads.named_parameters()]
    return {"heads": _digest(heads), "optimizer": groups}


def _digest(parameters: Iterable[tuple[str, Tensor]]) -> str:
    shapes = repr([(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in parameters])
    return hashlib.sha256(shapes.encode()).hexdigest()[:12]


def gather(trainer: LocalTrainer) -> dict[int, Any]:
    """Bring what the other processes along "modules" have trained into the first one's model, heads and average.

    Returns:
        The optimizer states of their modules, by module; empty on every process but the first.
    """
    ranks, states = trainer.ranks, dict[int, Any]()
    if ranks.data.rank == 0:
        for rank, span in enumerate(trainer.rank_spans[1:], start=1):
            for k in span:
                theirs = ranks.collect(rank, _state_of(trainer, k) if ranks.modules.rank == rank else None)
                if theirs is not None:
                    _take(trainer, k, theirs)
                    states[k] = theirs["optimizer"]
    return states


def _state_of(trainer: LocalTrainer, k: int) -> dict[str, Any]:
    module, optimizer = trainer.modules[k], trainer.engine.optimizers[k]
    mine = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    names = [name for name, value in trainer.model.state_dict(keep_vars=True).items() if id(value) in mine]
    model, average = trainer.model.state_dict(), trainer.ema_state_dict() or {}
    return _on_cpu(
        {
            "model": {name: model[name] for name in names},
            "average": {name: average[name] for name in names if average},
            "heads": module.heads.state_dict(),
            "optimizer": optimizer.state_dict() if optimizer is not None else None,
        }
    )


def _take(trainer: LocalTrainer, k: int, state: dict[str, Any]) -> None:
    targets = {
        "model": trainer.model.state_dict(),
        "average": trainer.ema_state_dict() or {},
        "heads": trainer.modules[k].heads.state_dict(),
    }
    for kind, tensors in targets.items():
        for name, value in state[kind].items():
            tensors[name].data.copy_(value)


def _on_cpu(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.detach().cpu()
    if isinstance(tree, dict):
        return {key: _on_cpu(value) for key, value in tree.items()}
    return [_on_cpu(value) for value in tree] if isinstance(tree, list) else tree
