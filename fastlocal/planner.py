"""From a memory budget to a way of training that fits it.

Every prediction is a measurement: the real step runs without arithmetic (`fastlocal.memory.dry_run`) on two parts of a
batch, and what scales with the whole batch (the boundaries between modules, the images) is scaled to it. More parts repeat
the second one, so the peak is that of the full step.

Candidates are ordered by an estimate of their speed on a small card and tried from the fastest on; each gets the largest
micro-batch that fits.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast, get_args

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastlocal import memory
from fastlocal.backbone import Block, backbone
from fastlocal.kernels import accelerate, dispatch, use_kernels
from fastlocal.metrics import Recorder
from fastlocal.module import Recompute
from fastlocal.objectives import Features
from fastlocal.residency import Keep, Residency
from fastlocal.trainer import LocalTrainer

# A nominal small card, for ranking candidates only: matrix products, host bus, and the time to launch one block's forward and
# backward kernels. Real cards differ; the order of candidates hardly does.
FLOPS_PER_SECOND = 40e12
BUS_BYTES_PER_SECOND = 12e9
SECONDS_PER_BLOCK = 400e-6

# A candidate whose best case is not at least this much faster than what fits already is not measured: the ranking is not
# that exact, and each measurement takes seconds.
WORTH_MEASURING = 0.95

FITS, CHOSEN, SLOWER = "fits", "chosen", "fits, slower"

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Plan:
    """A way to train, and what it needs.

    Attributes:
        objective: as for `LocalTrainer`.
        cuts: index of the first block of the second, third, … module; empty for one module.
        batch_size: samples per step.
        micro_batch: samples per part.
        recompute, residency: as for `LocalTrainer`.
        peak: predicted peak of a step in bytes of tensors on the device. The CUDA context (some 0.3–0.5 GiB) and the
            allocator's fragmentation come on top.
        compute: FLOPs of a step, as a multiple of a plain end-to-end step's.
        traffic: bytes that cross the host bus per step, both ways together.
        seconds: the estimate that candidates are ranked by, on a nominal small card; not a promise.
    """

    objective: str
    cuts: tuple[int, ...]
    batch_size: int
    micro_batch: int
    recompute: Recompute
    residency: Keep
    peak: int
    compute: float
    traffic: int
    seconds: float

    @property
    def modules(self) -> int:
        """The number of modules, K."""
        return len(self.cuts) + 1

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that make a `LocalTrainer` follow this plan."""
        return {
            "objective": self.objective,
            "modules": list(self.cuts),
            "micro_batch": self.micro_batch,
            "recompute": self.recompute,
            "residency": self.residency,
        }

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, for a run's configuration."""
        return {**asdict(self), "cuts": list(self.cuts)}


@dataclass(frozen=True)
class Candidate:
    """A line of the planner's table: a plan with the largest micro-batch that fits, or the smallest if none does.

    ``verdict`` is ``"chosen"``, ``"fits, slower"``, or why it was rejected. Where ``measured`` is False the peak is only a
    lower bound (weights, gradients and optimizer state), which already exceeds the budget.
    """

    plan: Plan
    verdict: str
    measured: bool = True


@dataclass(frozen=True)
class Search:
    """What the planner found.

    Attributes:
        chosen: the fastest plan that fits, or None.
        budget: in bytes.
        candidates: what was tried, fastest first.
        rivals: ordinary end-to-end training for the same budget: plain, checkpointing, accumulation, both.
        smallest: the smallest peak of all measured candidates, in bytes.
    """

    chosen: Plan | None
    budget: int
    candidates: tuple[Candidate, ...]
    rivals: tuple[Candidate, ...]
    smallest: int


class DoesNotFit(ValueError):
    """No plan fits the budget; the sentence names the smallest budget that would do."""


def plan(
    model: nn.Module,
    *,
    batch_size: int,
    memory: str | int,
    image_size: int | None = None,
    objective: str = "feature",
    shrink_batch: bool = False,
    **options: Any,
) -> Plan:
    """The fastest plan for training ``model`` within ``memory``.

    Args:
        model: a timm model, on any device, ``meta`` too. It is not touched.
        batch_size: samples per step.
        memory: budget for tensors on the device: bytes, or a text such as ``"4GiB"`` or ``"500 MiB"``.
        image_size: side of the images in pixels, to check that the model was built for it.
        objective: ``"end-to-end"`` for exact gradients, else the local objective to plan for.
        shrink_batch: halve the batch until a plan fits.
        options: further arguments of `LocalTrainer` (decoder, amp_dtype, ema_decay, optimizer, device, …). ``amp_dtype`` is
            torch.bfloat16 unless given; ``device`` tells whether fused attention will run, by default on a GPU if there
            is one.

    Raises:
        ValueError: an argument is not one of the above.
        DoesNotFit: nothing fits.
    """
    while True:
        found = search(
            model,
            batch_size=batch_size,
            budget=memory,
            image_size=image_size,
            objective=objective,
            rivals=False,
            **options,
        )
        if found.chosen is not None:
            return found.chosen
        if not shrink_batch or batch_size == 1:
            raise DoesNotFit(
                f"memory: nothing fits {format_bytes(found.budget)} at batch size {batch_size}; the smallest budget that"
                f" would do is {format_bytes(found.smallest, up=True)}."
            )
        batch_size //= 2


def search(
    model: nn.Module,
    *,
    batch_size: int,
    budget: str | int,
    image_size: int | None = None,
    objective: str = "feature",
    rivals: bool = True,
    **options: Any,
) -> Search:
    """Everything `plan` knows: the chosen plan, the other candidates and why not, the rivals. Arguments as for `plan`."""
    limit = parse_bytes(budget)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    view = backbone(model)
    if image_size is not None and (view.image.height, view.image.width) != (image_size, image_size):
        raise ValueError(
            f"image_size: the model was built for {view.image.height}×{view.image.width} images, got {image_size}."
        )
    options.setdefault("amp_dtype", torch.bfloat16)
    with memory.dry_run():
        whole = _Rehearsal(model, batch_size, "end-to-end", 1, options)
        flops = _Flops.count(whole)
        shapes = []
        for modules in _module_counts(len(view.blocks), objective == "end-to-end"):
            rehearsal = whole if modules == 1 else _Rehearsal(model, batch_size, objective, modules, options)
            for recompute in get_args(Recompute)[: 1 if modules == len(view.blocks) else 2]:
                shapes += [_Shape(rehearsal, flops, recompute, keep) for keep in get_args(Keep)]
        candidates = list(_judge(shapes, limit))
        opponents = []
        for recompute in get_args(Recompute) if rivals else ():
            shape = _Shape(whole, flops, recompute, "all")
            opponents += [_fit(shape, limit, sizes) for sizes in (shape.sizes[:1], shape.sizes[1:]) if sizes]
        chosen = next((c.plan for c in candidates if c.verdict == CHOSEN), None)
        peaks = [c.plan.peak for c in candidates if c.measured]
        if chosen is None:
            # What a bound rejected was never measured; the leanest way to train is among those.
            lean = (shape for shape in shapes if shape.residency == "module")
            peaks += [shape.rehearsal.peak(shape.recompute, shape.residency, 1) for shape in lean]
    return Search(chosen, limit, tuple(candidates), tuple(opponents), min(peaks))


def parse_bytes(text: str | int) -> int:
    """Bytes from a number or a text such as ``"4GiB"``, ``"1.5 GB"`` or ``"500MiB"``.

    Raises:
        ValueError: the text is none of these, or not positive.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMG]i?B|B)?\s*", str(text))
    try:
        value = int(float(match[1]) * _UNITS[match[2] or "B"]) if match else 0
    except ValueError:
        value = 0
    if value <= 0:
        raise ValueError(f"memory must be a positive size such as 4GiB or 500MiB, got {text!r}.")
    return value


def format_bytes(value: int, up: bool = False) -> str:
    """``value`` in GiB or MiB with three digits; ``up`` rounds up, so that the text as a budget is enough."""
    unit = "GiB" if value >= 2**30 else "MiB"
    scaled = value / _UNITS[unit]
    digits = 2 if scaled < 10 else 1 if scaled < 100 else 0
    shown = math.ceil(scaled * 10**digits) / 10**digits if up else scaled
    return f"{shown:.{digits}f} {unit}"


def _module_counts(blocks: int, exact: bool) -> list[int]:
    """The K worth trying: 1 only for exact gradients, then doubling, up to one module per block."""
    counts = {k for k in (2, 4, 8, 16, 32, 64) if k < blocks} | {blocks} | ({1} if exact else set())
    return sorted(counts)


def _fused_attention_runs(options: dict[str, Any]) -> bool:
    device = torch.device(options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    with use_kernels(options.get("kernels", "auto")):
        return dispatch.implementation(device) == "triton"


class _Rehearsal:
    """A trainer on tensors without data, for one objective and one partition."""

    def __init__(
        self, model: nn.Module, batch_size: int, objective: str, modules: int, options: dict[str, Any]
    ) -> None:
        self.batch_size = batch_size
        copied = memory.fake_copy(model)
        if _fused_attention_runs(options):
            with contextlib.suppress(ValueError):  # a model it cannot serve keeps timm's attention
                accelerate(copied)
        rehearsed = {**options, "device": "cpu", "kernels": "reference"}
        self.trainer = LocalTrainer(copied, objective=objective, modules=modules, **rehearsed)
        self.cuts = tuple(span.start for span in self.trainer.spans[1:])
        for optimizer in self.trainer.optimizers:  # make the optimizer states, as a first step would
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()
            optimizer.zero_grad()

    @functools.cached_property
    def heads_flops(self) -> float:
        """FLOPs per sample of the local modules' auxiliary heads and decoders, forward and backward."""
        trainer, view = self.trainer, self.trainer.backbone
        record = Recorder(2, range(len(trainer.spans)), len(trainer.spans), trainer.device)
        images, labels = torch.empty(2, *view.image.shape), torch.empty(2, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            for k, span in enumerate(trainer.spans[:-1]):
                embedded, output = (torch.empty(2, *view.boundaries[i].shape) for i in (span.start, span.stop))
                features = Features(embedded, output.requires_grad_(), residual=output.sum())
                trainer.engine.local_loss(k, features, images, labels, record).backward()
        for optimizer in trainer.optimizers:
            optimizer.zero_grad()
        return counter.get_total_flops() / 2

    def peak(self, recompute: Recompute, residency: Keep, micro_batch: int) -> int:
        """Peak bytes on the device of a step in parts of ``micro_batch``."""
        parts = min(2, -(-self.batch_size // micro_batch))
        batch = min(parts * micro_batch, self.batch_size)
        meter = self.step(recompute, residency, batch, micro_batch)
        more = self.batch_size / batch - 1  # of what scales with the batch: the rest repeats from part to part
        return max(
            sum(kinds.values()) + math.ceil(more * (kinds["boundary"] + kinds["inputs"]))
            for _, kinds in meter.timeline(device="cpu")
        )

    def state_bytes(self, residency: Keep) -> int:
        """What parameters, gradients and optimizer state need at the least: a bound that takes no measuring."""
        owned = [sum(p.nbytes for p in module.parameters()) for module in self.trainer.modules]
        states = [
            sum(t.nbytes for state in o.state.values() for t in state.values() if isinstance(t, torch.Tensor))
            for o in self.trainer.optimizers
        ]
        held = {"all": sum(owned) + sum(states), "optimizer": sum(owned), "module": max(owned)}
        return held[residency] + max(owned)

    def traffic(self, residency: Keep) -> int:
        """Bytes over the host bus in a step, both ways together."""
        if residency == "all":
            return 0
        states = sum(
            t.nbytes
            for o in self.trainer.optimizers
            for state in o.state.values()
            for t in state.values()
            if isinstance(t, torch.Tensor) and t.numel() > 1
        )
        if residency == "optimizer":
            return 2 * states
        # Exact gradients fetch all modules but the last for the forward and again for the backward.
        owned = [sum(p.nbytes for p in module.parameters()) for module in self.trainer.modules]
        again = sum(owned[:-1]) if self.trainer.objective.exact else 0
        return 2 * states + 2 * sum(owned) + again

    def step(self, recompute: Recompute, residency: Keep, batch: int, micro_batch: int) -> memory.Meter:
        """The trainer's step on a batch in parts of ``micro_batch``, measured."""
        trainer = self.trainer
        trainer.micro_batch = micro_batch
        for module in trainer.modules:
            module.recompute = recompute
        if trainer.residency.options.keep != residency:
            engine = trainer.engine
            engine.residency.release()
            options = replace(engine.residency.options, keep=residency)
            trainer.residency = engine.residency = Residency(trainer.modules, engine.optimizers, options, engine.bus)
            trainer.residency.park()
        images = torch.empty(batch, *trainer.backbone.image.shape, dtype=torch.uint8)
        labels = torch.empty(batch, dtype=torch.int64)
        heads = [module.heads for module in trainer.modules]
        with memory.Meter(trainer.model, *heads, *trainer.optimizers, images, labels) as meter:
            trainer.step(images, labels)
        return meter


@dataclass(frozen=True)
class _Flops:
    """FLOPs per sample of plain training, counted once, and of its pieces, from which those of every candidate add up.

    Swin-V2's blocks start with a matrix product whose input gradient plain training needs and a local module's first
    block does not; it is counted all the same.

    Attributes:
        plain: of a whole step.
        stem: of the stem's forward.
        forward: of each block's forward.
        again: of recomputing each block in the backward, which stops short of what no gradient needs.
    """

    plain: float
    stem: float
    forward: tuple[float, ...]
    again: tuple[float, ...]

    @classmethod
    def count(cls, whole: _Rehearsal) -> _Flops:
        """Count those of ``whole``, a single module, in one step that recomputes every block but the last."""
        blocks = whole.trainer.backbone.blocks
        runs: list[list[int]] = [[] for _ in blocks]  # the counter before and after each run of each block
        with FlopCounterMode(display=False) as counter:

            def note(block: nn.Module, *_: Any) -> None:
                runs[blocks.index(cast(Block, block))].append(counter.get_total_flops())

            handles = [block.register_forward_pre_hook(note) for block in blocks]
            # A recomputation ends with an exception, as soon as it has what the backward needs.
            handles += [block.register_forward_hook(note, always_call=True) for block in blocks]
            whole.step("block", "all", 2, 2)
        for handle in handles:
            handle.remove()
        forward = [run[1] - run[0] for run in runs]
        again = [sum(run[3:4]) - sum(run[2:3]) for run in runs]
        plain = counter.get_total_flops() - sum(again)
        return cls(plain / 2, runs[0][0] / 2, tuple(f / 2 for f in forward), tuple(a / 2 for a in again))

    def of(self, rehearsal: _Rehearsal, recompute: Recompute) -> float:
        """FLOPs per sample of the step of ``rehearsal``."""
        total, trainer = self.plain, rehearsal.trainer
        if trainer.objective.exact:  # one more forward of all modules but the last
            total += sum(self.forward[: trainer.spans[-1].start]) + (self.stem if len(trainer.spans) > 1 else 0)
        else:
            total += rehearsal.heads_flops
        if recompute == "block":
            for module in trainer.modules:
                again = self.forward if module.measure_residual else self.again  # to measure one needs the whole block
                total += sum(again[i] for i in module.span[:-1])
        return total


@dataclass(frozen=True)
class _Shape:
    """A candidate before its micro-batch is chosen."""

    rehearsal: _Rehearsal
    training: _Flops
    recompute: Recompute
    residency: Keep

    @property
    def sizes(self) -> list[int]:
        """Micro-batches worth trying: the batch, halved again and again."""
        sizes = [self.rehearsal.batch_size]
        while sizes[-1] > 1:
            sizes.append(-(-sizes[-1] // 2))
        return sizes

    def plan(self, micro_batch: int, peak: int = 0) -> Plan:
        """The plan with this micro-batch, its cost estimated."""
        rehearsal = self.rehearsal
        flops, traffic = self.training.of(rehearsal, self.recompute), rehearsal.traffic(self.residency)
        compute = flops / self.training.plain
        launched = -(-rehearsal.batch_size // micro_batch) * len(rehearsal.trainer.backbone.blocks) * compute
        return Plan(
            objective=rehearsal.trainer.objective.name,
            cuts=rehearsal.cuts,
            batch_size=rehearsal.batch_size,
            micro_batch=micro_batch,
            recompute=self.recompute,
            residency=self.residency,
            peak=peak,
            compute=compute,
            traffic=traffic,
            # The bus works while the card does, so the slower of the two counts.
            seconds=max(flops * rehearsal.batch_size / FLOPS_PER_SECOND, traffic / BUS_BYTES_PER_SECOND)
            + launched * SECONDS_PER_BLOCK,
        )


def _judge(shapes: Sequence[_Shape], limit: int) -> Iterator[Candidate]:
    """Try shapes, fastest first; a shape whose best case is slower than a plan that fits is not worth measuring."""
    fitting: list[Candidate] = []
    rejected: list[Candidate] = []
    for shape in sorted(shapes, key=lambda shape: shape.plan(shape.sizes[0]).seconds):
        if fitting and shape.plan(shape.sizes[0]).seconds >= WORTH_MEASURING * min(c.plan.seconds for c in fitting):
            continue
        candidate = _fit(shape, limit, shape.sizes)
        (fitting if candidate.verdict == FITS else rejected).append(candidate)
    fitting.sort(key=lambda c: c.plan.seconds)
    for i, candidate in enumerate(fitting):
        yield replace(candidate, verdict=CHOSEN if i == 0 else SLOWER)
    yield from sorted(rejected, key=lambda c: c.plan.peak)


def _fit(shape: _Shape, limit: int, sizes: Sequence[int]) -> Candidate:
    """``shape`` with the largest of ``sizes`` (descending) that fits ``limit``, or with the smallest one."""
    bound = shape.rehearsal.state_bytes(shape.residency)
    if bound > limit:
        return Candidate(
            shape.plan(sizes[-1], bound), "weights, gradients and optimizer state do not fit", measured=False
        )
    peaks: dict[int, int] = {}
    low, high = 0, len(sizes) - 1  # the peak falls as parts get smaller
    while low < high:
        middle = (low + high) // 2
        peaks[middle] = shape.rehearsal.peak(shape.recompute, shape.residency, sizes[middle])
        low, high = (low, middle) if peaks[middle] <= limit else (middle + 1, high)
    peak = peaks[low] if low in peaks else shape.rehearsal.peak(shape.recompute, shape.residency, sizes[low])
    verdict = FITS if peak <= limit else f"over by {format_bytes(peak - limit)} with the smallest parts"
    return Candidate(shape.plan(sizes[low], peak), verdict)
