"""Several devices: what each of them holds in every way of sharing, whether that fits, and which way is the fastest.

`scaling` says how long a step takes and what is sent; `estimate` what a device needs that has some of the modules, a part of
the batch, and buffers for what it sends and receives:

    modules   the weights, gradients, states, heads and graphs of its own modules; ``queue`` messages to the next device, and
              ``queue`` and the one being read from the one before it
    data      all modules on batch / N images, and a copy of the largest module's gradients, which are being summed
    both      the modules of a column on a row's images, and both kinds of buffers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fastlocal import memory
from fastlocal.backbones import backbone
from fastlocal.checks import check_choice
from fastlocal.module import build_modules
from fastlocal.objectives import OBJECTIVES
from fastlocal.optimizers import adamw
from fastlocal.partition import partition
from fastlocal.planner.cards import NOMINAL, USED, Card
from fastlocal.planner.estimate import Cut, Plan
from fastlocal.planner.profile import Profile
from fastlocal.planner.rehearsal import fake_model
from fastlocal.planner.scaling import ModuleCost, Scaling, scaling
from fastlocal.planner.search import average_bytes, module_options, state_share, ways_to_train

LABEL = 8  # bytes


@dataclass(frozen=True)
class Sharing:
    """A way of sharing the work, and what it needs.

    Attributes:
        scaling: speed and bytes sent; with what the ``plans`` cost beside plain training (recomputation, small parts, …).
        cuts: first blocks of all modules of the model but the first.
        plans: how each device along "modules" trains, all with the same options; those along "data" are alike. Empty for
            a pipeline with exact gradients, which is here for comparison.
        fits: whether no device needs more than the limit; None if there is none.
    """

    scaling: Scaling
    cuts: tuple[int, ...]
    plans: tuple[Plan, ...]
    fits: bool | None

    @property
    def peak(self) -> int:
        """Bytes of tensors and cuBLAS's workspaces on the device that needs most; an estimate."""
        return max(plan.peak for plan in self.plans)

    @property
    def rank_cuts(self) -> tuple[int, ...]:
        """First modules of all devices along "modules" but the first."""
        return tuple(span.start for span in self.scaling.spans[1:])


class Divided:
    """A model cut into ``modules``, to be shared out. For use inside a dry run.

    Args:
        objective, modules: as for `LocalTrainer`.
        batch_size: over all devices.
        image_dtype: of the images that the training loop hands over.
        options: further arguments of `LocalTrainer`.

    Attributes:
        costs: of each module.
        plain: seconds of a plain step, with exact gradients, on one device.

    Raises:
        ValueError: an argument is none that `LocalTrainer` accepts.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: int | str | Sequence[int],
        objective: str,
        batch_size: int,
        *,
        card: Card = NOMINAL,
        image_dtype: torch.dtype = torch.uint8,
        **options: Any,
    ) -> None:
        check_choice("objective", objective, list(OBJECTIVES))
        options.setdefault("amp_dtype", torch.bfloat16)
        copied = fake_model(model, options)
        view = backbone(copied)
        self._objective = OBJECTIVES[objective](options.get("first_target", "image"))
        self._modules = build_modules(
            view, partition(view, modules), view.logits[-1], self._objective, module_options(options)
        )
        self._profile = Profile(view, options["amp_dtype"], lambda _: None)
        self._states = state_share(options.get("optimizer") or adamw)
        self._average = average_bytes(copied, options)
        device = torch.device(options.get("device") or "cuda")
        self._foreach, self._workspaces = device.type == "cuda", memory.cublas_workspaces(device)
        self._batch, self._card, self._options = batch_size, card, options
        whole = self._cut(range(len(self._modules)), batch_size)
        self._whole, self.cuts = whole, whole.cuts
        image = self._profile.image * image_dtype.itemsize
        rate = USED * card.flops / batch_size
        parts = (self._profile.stem, *self._profile.blocks, self._profile.head)
        self.plain = sum(part.forward + part.backward for part in parts) / rate
        self.costs: list[ModuleCost] = []
        for k, span in enumerate(whole.spans):
            flops = sum(part.forward + part.backward for part in whole.parts[k])
            if self._objective.exact and k + 1 < len(whole.spans):
                flops += sum(part.forward for part in whole.parts[k])  # run twice
            sent = (self._profile.boundary(span.stop), image if any(whole.reads_image[k + 1 :]) else 0, LABEL)
            trained = sum(part.trained for part in whole.parts[k])
            self.costs.append(ModuleCost(flops / rate, tuple(size * batch_size for size in sent), trained))

    def obstacle(self, grid: Scaling) -> str:
        """Why `LocalTrainer` would not share the work this way; empty if it would."""
        rows, columns = grid.grid
        if rows > self._batch:
            return f"{self._batch} images are too few for {rows} devices"
        if rows > 1 and self._whole.needs_whole_batch:
            return "BatchNorm needs the batch whole"
        if columns > 1 and self._objective.exact:
            return "exact gradients go backwards from module to module"
        if columns > 1 and self._options.get("lookahead", 0):
            return "lookahead needs all modules in one place"
        for span in grid.spans:
            owned = {p for k in span for p in self._modules[k].parameters()}
            if any(p not in owned for k in span for p in self._modules[k].borrowed):
                return "modules share parameters"
        return ""

    def devices(self, grid: Scaling, queue: int) -> list[Cut]:
        """What each device along "modules" has, the buffers it needs included."""
        rows = grid.grid[0]
        cuts = []
        for span in grid.spans:
            buffers = max(self.costs[k].weights for k in span) if rows > 1 else 0.0
            if span.start:
                buffers += (queue + 1) * self.costs[span.start - 1].message(rows)
            if span.stop < len(self._modules):
                buffers += queue * self.costs[span.stop - 1].message(rows)
            cuts.append(self._cut(span, -(-self._batch // rows), round(buffers)))
        return cuts

    def share(self, grid: Scaling, queue: int, limit: int | None = None, host_memory: int | None = None) -> Sharing:
        """The fastest options with which every device of ``grid`` fits; those that need least, if none do."""
        cuts = self.devices(grid, queue)
        tables = [{_way(plan): plan for plan in ways_to_train(cut, self._card, self._options)} for cut in cuts]
        common = [way for way in tables[0] if all(way in table for table in tables)]

        def seconds(way: tuple[Any, ...]) -> float:
            return max(table[way].seconds for table in tables)

        def peak(way: tuple[Any, ...]) -> int:
            return max(table[way].peak for table in tables)

        def hosts(way: tuple[Any, ...]) -> int:
            return grid.grid[0] * sum(table[way].host for table in tables)

        plain = (cuts[0].batch_size, "none", "all", "device", "full", True)
        affordable = [way for way in common if host_memory is None or hosts(way) <= host_memory]
        fitting = [way for way in affordable if limit is None or peak(way) <= limit]
        chosen = plain if limit is None else min(fitting, key=seconds) if fitting else min(affordable, key=peak)
        slower = seconds(chosen) / seconds(plain)
        grid = replace(grid, seconds=grid.seconds * slower, speed_up=grid.speed_up / slower)
        fits = None if limit is None else bool(fitting)
        return Sharing(grid, self.cuts, tuple(table[chosen] for table in tables), fits)

    def _cut(self, own: range, batch_size: int, buffers: int = 0) -> Cut:
        modules = [self._modules[k] for k in own]
        later = any(module.reads_image for module in self._modules[own.stop :])
        about = (self._states, self._average, self._foreach, self._workspaces + buffers, later)
        return Cut(self._profile, self._objective, modules, batch_size, *about)


def _way(plan: Plan) -> tuple[Any, ...]:
    return plan.micro_batch, plan.recompute, plan.residency, plan.boundaries, plan.weights, plan.prefetch


def module_counts(devices: int, blocks: int) -> list[int]:
    """The numbers of local modules worth trying: one or two for each device, as far as there are blocks."""
    return list(dict.fromkeys((min(max(devices, 4), blocks), min(2 * devices, blocks))))


def sharings(
    model: nn.Module,
    *,
    devices: int,
    bandwidth: float,
    batch_size: int,
    objective: str = "feature",
    limit: int | None = None,
    host_memory: int | None = None,
    queue: int = 2,
    **options: Any,
) -> tuple[list[Sharing], list[str]]:
    """The best of each way of sharing over ``devices``, and one device alone, the fastest that fits first.

    Args:
        bandwidth: of a link, bytes/s each way.
        limit: bytes of tensors that a device may have; None trains plainly.
        host_memory: bytes of host memory that all devices together may use, as in one machine; None is all.
        queue: as for `LocalTrainer`.
        options: as for `Divided`.

    Returns:
        Them, and why others are left out.

    Raises:
        ValueError: an argument is not one of the above, or no way of sharing is possible; the sentence says why.
    """
    blocks = len(backbone(model).blocks)
    counts = (1, min(8, blocks)) if objective == "end-to-end" else module_counts(devices, blocks)
    best: dict[tuple[str, tuple[int, int]], Sharing] = {}
    obstacles: dict[str, None] = {}
    with memory.dry_run(options.get("device") or "cuda"):
        for count in counts:
            divided = Divided(model, count, objective, batch_size, **options)
            grids = [
                *scaling(divided.costs, devices, bandwidth, alone=divided.plain),
                *(scaling(divided.costs, 1, bandwidth, alone=divided.plain) if devices > 1 else []),
            ]
            for grid in grids:
                if grid.way != "pipeline" and (obstacle := divided.obstacle(grid)):
                    obstacles[obstacle] = None
                    continue
                pipeline = grid.way == "pipeline"
                one = (
                    Sharing(grid, divided.cuts, (), None)
                    if pipeline
                    else divided.share(grid, queue, limit, host_memory)
                )
                key = (grid.way, grid.grid)
                best[key] = min(best.get(key, one), one, key=_merit)
    if not any(one.plans and one.scaling.grid != (1, 1) for one in best.values()) and devices > 1:
        raise ValueError(f"devices: {devices} devices cannot share this: {'; '.join(obstacles)}.")
    return sorted(best.values(), key=_merit), list(obstacles)


def _merit(one: Sharing) -> tuple[bool, float]:
    """Smaller is better: what fits by its time, what does not by what it needs."""
    return one.fits is False, one.peak if one.fits is False else one.scaling.seconds
