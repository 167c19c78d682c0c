"""What several devices would gain: a model of a step's time, of what is sent and of what each device holds. Nothing is run.

One device takes ``seconds`` for all modules. On N devices, with links of ``bandwidth`` bytes a second each way:

    modules   the slowest device: its modules' compute, or what it sends on, whichever takes longer (they overlap)
    data      1/N of the compute; a ring sums the gradients, 2 (N − 1)/N of their bytes, hidden but for the last module's
    both      rows × columns of the two, the best of all divisors
    pipeline  exact gradients, 1F1B or GPipe: compute/N · (M + N − 1)/M with M parts: a bubble of (N − 1)/(M + N − 1)

A pipeline's stages send boundaries and their gradients, parts of them at a time; the slower of compute and link counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from fastlocal import memory
from fastlocal.backbones import backbone
from fastlocal.checks import check_choice
from fastlocal.distributed.module_parallel import assign
from fastlocal.heads import AuxiliaryHead
from fastlocal.module import ModuleOptions, build_modules
from fastlocal.objectives import OBJECTIVES
from fastlocal.partition import partition
from fastlocal.planner.cards import NOMINAL, USED, Card
from fastlocal.planner.estimate import Cut
from fastlocal.planner.profile import Profile

Way = Literal["modules", "data", "both", "pipeline"]


@dataclass(frozen=True)
class ModuleCost:
    """A module, as far as sharing it out goes.

    Attributes:
        seconds: of its forward, backward and update on a whole batch, on one device.
        sent: bytes of what is sent on after it for a whole batch: features, labels, and images if a later module reads them.
        weights: bytes of its gradients.
    """

    seconds: float
    sent: float
    weights: float


@dataclass(frozen=True)
class Scaling:
    """What a way of sharing comes to.

    Attributes:
        grid: devices along "data" and along "modules".
        seconds: of a step, once the pipeline is full.
        speed_up: over one device.
        balance: mean over largest compute of the devices; 1 is even.
        bytes_sent: by the device that sends most, per step.
    """

    way: Way
    grid: tuple[int, int]
    seconds: float
    speed_up: float
    balance: float
    bytes_sent: float


def scaling(
    modules: Sequence[ModuleCost], devices: int, bandwidth: float, *, parts: int = 8, exact_seconds: float | None = None
) -> list[Scaling]:
    """Each way of sharing ``modules`` over ``devices``, the fastest local one first, and a pipeline with exact gradients.

    Args:
        bandwidth: of a link, bytes/s each way.
        parts: of a batch, in the pipeline with exact gradients.
        exact_seconds: of an exact step on one device, if it is not that of the local one.

    Raises:
        ValueError: fewer than 1 device, or a bandwidth that is not positive.
    """
    if devices < 1 or not bandwidth > 0:
        raise ValueError(f"devices must be at least 1 and bandwidth positive, got {devices} and {bandwidth}.")
    alone = sum(module.seconds for module in modules)
    grids = [
        (devices // columns, columns) for columns in range(1, min(devices, len(modules)) + 1) if devices % columns == 0
    ]
    local = [_shared(modules, rows, columns, bandwidth, alone) for rows, columns in grids]
    pure = [one for one in local if one.way != "both"]
    best_of_both = min((one for one in local if one.way == "both"), key=lambda one: one.seconds, default=None)
    found = sorted([*pure, *([best_of_both] if best_of_both else [])], key=lambda one: one.seconds)
    if 1 < devices <= len(modules):
        found.append(_pipeline(modules, devices, bandwidth, parts, exact_seconds or alone))
    return found


def _shared(modules: Sequence[ModuleCost], rows: int, columns: int, bandwidth: float, alone: float) -> Scaling:
    spans = assign([module.seconds for module in modules], columns)
    compute = [sum(modules[k].seconds for k in span) / rows for span in spans]
    seconds = sent = 0.0
    for span, own in zip(spans, compute, strict=True):
        passed_on = modules[span[-1]].sent / rows if span.stop < len(modules) else 0.0
        ring = 2 * (rows - 1) / rows
        summed = ring * sum(modules[k].weights for k in span)
        uncovered = (
            ring * modules[span[-1]].weights / bandwidth
        )  # the last module's gradients have nothing to hide behind
        seconds = max(seconds, own + uncovered, (summed + passed_on) / bandwidth)
        sent = max(sent, summed + passed_on)
    way: Way = "data" if columns == 1 else "modules" if rows == 1 else "both"
    balance = sum(compute) / len(compute) / max(compute)
    return Scaling(way, (rows, columns), seconds, alone / seconds, balance, sent)


def _pipeline(modules: Sequence[ModuleCost], devices: int, bandwidth: float, parts: int, alone: float) -> Scaling:
    spans = assign([module.seconds for module in modules], devices)
    share = alone / sum(module.seconds for module in modules)
    compute = [share * sum(modules[k].seconds for k in span) for span in spans]
    links = [modules[span[-1]].sent for span in spans[:-1]]
    slowest = max(max(compute), max(links) / bandwidth) / parts
    seconds = slowest * (parts + devices - 1)
    balance = sum(compute) / len(compute) / max(compute)
    return Scaling("pipeline", (1, devices), seconds, alone / seconds, balance, max(links))


def module_costs(
    model: nn.Module,
    *,
    modules: int | str | Sequence[int],
    objective: str,
    batch_size: int,
    card: Card = NOMINAL,
    decoder: str = "linear",
    amp_dtype: torch.dtype | None = torch.bfloat16,
) -> list[ModuleCost]:
    """The costs of the modules of ``model``, counted in a dry run; time is FLOPs over the share of the card's that is used.

    Args:
        modules, objective, decoder, amp_dtype: as for `LocalTrainer`.

    Raises:
        ValueError: an argument is none that `LocalTrainer` accepts.
    """
    check_choice("objective", objective, list(OBJECTIVES))
    target = OBJECTIVES[objective]()
    with memory.dry_run():
        view = backbone(memory.fake_copy(model))
        made_of = ModuleOptions(decoder, AuxiliaryHead, "mse", False, 0, "none")
        made = build_modules(view, partition(view, modules), view.logits[-1], target, made_of)
        cut = Cut(Profile(view, amp_dtype, lambda _: None), target, made, batch_size, 0.0, 0, False)
    labels, costs = 8 * batch_size, []
    for k, parts in enumerate(cut.parts):
        flops = batch_size * sum(part.forward + part.backward for part in parts)
        following = cut.profile.boundary(cut.spans[k].stop) * batch_size
        images = cut.profile.image * batch_size if any(cut.reads_image[k + 1 :]) else 0
        weights = sum(part.trained for part in parts)
        costs.append(ModuleCost(flops / (USED * card.flops), following + images + labels, weights))
    return costs
