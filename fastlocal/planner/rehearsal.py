"""The real step, run without arithmetic, on a model that is as deep as its peak needs and no deeper.

Modules between the first and the last that are all alike peak alike, so one of them stands for all (where the blocks do not
divide evenly, the largest pair of neighbours). What the others would have on the device meanwhile is added: their weights and
states where they stay there, and, for exact gradients, the boundaries before them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastlocal import memory
from fastlocal.backbones import Backbone
from fastlocal.kernels import accelerate, dispatch, use_kernels
from fastlocal.planner.estimate import Plan
from fastlocal.planner.profile import structure
from fastlocal.trainer import LocalTrainer


def rehearse(view: Backbone, plan: Plan, options: dict[str, Any], image_dtype: torch.dtype, foreach: bool) -> int:
    """The peak of a step of ``plan``, of either kind if it has two: bytes of tensors on the device, and of cuBLAS's
    workspaces; of the scratch memory of sums too, where the card is at hand. For use inside a dry run.

    Args:
        view: of the model.
        options: further arguments of `LocalTrainer`.
        image_dtype: of the images that the training loop hands over.
        foreach: step on all parameters at once where an optimizer leaves that open, as torch does on CUDA.
    """
    copied = fake_model(view.model, options)
    cuts, missing = _shorten(copied, view, plan.cuts)
    trainer = LocalTrainer(
        copied, **{**plan.arguments(), **options, "modules": cuts, "device": "cpu", "kernels": "reference"}
    )
    _make_states(trainer, foreach)
    trainer.residency.rehearse_peaks()
    parts = min(2, -(-plan.batch_size // plan.micro_batch))
    batch = min(parts * plan.micro_batch, plan.batch_size)
    images = torch.empty(batch, *trainer.backbone.image.shape, dtype=image_dtype, device="cpu")
    labels = torch.empty(batch, dtype=torch.int64, device="cpu")
    own = trainer.objective.exact
    kinds = (own, True) if plan.exact_share and not own else (own,)
    device = torch.device(options.get("device") or "cuda")
    card = device if device.type == "cuda" and torch.cuda.is_available() else None
    peaks = [_peak(trainer, plan, images, labels, exact, card) for exact in kinds]
    workspaces = memory.cublas_workspaces(device)
    return workspaces + _resident(trainer, missing, plan) + max(peaks)


def _peak(
    trainer: LocalTrainer, plan: Plan, images: Tensor, labels: Tensor, exact: bool, card: torch.device | None
) -> int:
    """The peak of a step on the shortened model, and of boundaries between modules that were taken out."""
    given: list[Any] = [trainer.model, *(module.heads for module in trainer.modules), *trainer.optimizers]
    given += [trainer.ema.module] if trainer.ema is not None else []
    first: list[int] = []  # the number of the event before each time module 1 is on the device
    with memory.DryMeter(*given, images, labels, card=card) as meter, _noting(trainer, meter, first):
        trainer.step(images, labels, exact=exact)
    more = plan.batch_size / len(images) - 1  # of what scales with the batch: the rest repeats from part to part
    boundary = math.prod(trainer.backbone.boundaries[-1].shape) * (trainer.engine.amp_dtype or torch.float32).itemsize
    absent = plan.modules - len(trainer.modules)
    before = plan.batch_size * boundary * absent if exact and plan.boundaries == "device" else 0
    begin, end = (first[0], first[-1]) if len(first) > 1 else (0, 0)
    return max(
        sum(kinds.values())
        + math.ceil(more * (kinds["boundary"] + kinds["inputs"]) * (plan.boundaries == "device"))
        + (before if begin < i < end else 0)
        for i, kinds in enumerate(meter.states("cpu"))
    )


def fake_model(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    """A copy of ``model`` without data, with fused attention where that will run."""
    copied = memory.fake_copy(model)
    device = torch.device(options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    with use_kernels(options.get("kernels", "auto")):
        fused = dispatch.implementation(device) == "triton"
    if fused:
        with contextlib.suppress(ValueError):  # a model it cannot serve keeps timm's attention
            accelerate(copied)
    return copied


def _shorten(model: nn.Module, view: Backbone, cuts: Sequence[int]) -> tuple[list[int], list[nn.Parameter]]:
    """Take modules that are like others out of ``model``, a copy of what ``view`` shows.

    Returns:
        The cuts that are left, and the parameters taken out.
    """
    edges = [0, *cuts, len(view.blocks)]
    sizes = [stop - start for start, stop in pairwise(edges)]
    alike = len({structure(block) for block in view.blocks}) == 1 and len(set(view.boundaries)) == 1
    blocks = getattr(model, "blocks", None)
    if len(sizes) <= 3 or not alike or not isinstance(blocks, nn.Sequential | nn.ModuleList):
        return list(cuts), []
    middle = sizes[1:-1]
    kept = [sizes[0], middle[0], sizes[-1]]
    if len(set(sizes)) > 1 and len(middle) > 1:  # the largest, with the neighbour that is prefetched while it learns
        kept[1:2] = max(pairwise(middle), key=lambda pair: (max(pair), sum(pair)))
    missing = [p for block in list(blocks)[sum(kept) :] for p in block.parameters()]
    cast(Any, model).blocks = (
        type(blocks)(*blocks[: sum(kept)]) if isinstance(blocks, nn.Sequential) else blocks[: sum(kept)]
    )
    return list(accumulate(kept[:-1])), missing


def _resident(trainer: LocalTrainer, missing: Sequence[nn.Parameter], plan: Plan) -> int:
    """Bytes of weights and optimizer states on the device of the modules that were taken out, their heads included."""
    if plan.residency == "module":
        return 0
    states = _state_share(trainer) if plan.residency == "all" else 0.0
    weights = sum(p.nbytes * (1 + states * p.requires_grad) for p in missing)
    absent = plan.modules - len(trainer.modules)
    heads = sum(p.nbytes for p in trainer.modules[min(1, len(trainer.modules) - 1)].heads.parameters())
    average = sum(p.nbytes for p in missing) if trainer.ema is not None else 0
    return round(weights + absent * heads * (1 + states) + average)


def _state_share(trainer: LocalTrainer) -> float:
    """Bytes of optimizer state per byte of trained weights."""
    states = weights = 0
    for optimizer in trainer.optimizers:
        for parameter, state in optimizer.state.items():
            weights += cast(Tensor, parameter).nbytes
            states += sum(value.nbytes for value in state.values() if isinstance(value, Tensor) and value.numel() > 1)
    return states / weights if weights else 0.0


def _make_states(trainer: LocalTrainer, foreach: bool) -> None:
    """Make the optimizer states, as a first step would."""
    for k, optimizer in enumerate(trainer.engine.optimizers):
        if optimizer is None:
            continue
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.empty_like(parameter)
            if foreach and "foreach" in group and group["foreach"] is None and not group.get("fused"):
                group["foreach"] = True
        optimizer.step()
        optimizer.zero_grad()
        trainer.residency.park_states(k)


@contextlib.contextmanager
def _noting(trainer: LocalTrainer, meter: memory.Meter, first: list[int]) -> Iterator[None]:
    """Add to ``first`` the number of events whenever module 1 has been, or is to be, on the device."""
    on_device = trainer.residency.on_device

    @contextlib.contextmanager
    def noted(index: int, upcoming: int | None) -> Iterator[None]:
        if index == 0 and first:
            first.append(meter.events)
        with on_device(index, upcoming):
            yield
        if index == 0 and not first:
            first.append(meter.events)

    trainer.residency.on_device = noted  # type: ignore[method-assign]  # of this one alone
    try:
        yield
    finally:
        trainer.residency.on_device = on_device  # type: ignore[method-assign]  # as it was
