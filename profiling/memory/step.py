"""One step of each set-up in a dry run: its peak, its FLOPs, and what it moves over the bus.

Peaks come from one step after a first one, which makes the optimizer's states. FLOPs and traffic
come from steps on one or two samples: FLOPs go with the samples; the traffic has a share that goes with the samples, one
that goes with the parts, and one that is there once per step.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastlocal import LocalTrainer, memory
from fastlocal.backbones import backbone
from fastlocal.flops import count
from fastlocal.kernels import accelerate
from fastlocal.memory import HOST, Kind, Meter
from fastlocal.profiling.cli import UserError
from fastlocal.profiling.memory.methods import RIVALS, sharding
from fastlocal.profiling.memory.setups import CLASSES, Setup
from fastlocal.profiling.results import sentence
from fastlocal.residency import Residency

TIMELINE_POINTS = 500


@dataclass(frozen=True)
class Result:
    """What a step of a set-up costs.

    Attributes:
        peak: bytes on the device at the peak, and ``peak_by_kind`` there.
        host: bytes on the host at its peak.
        traffic: bytes over the bus, both ways together.
        flops: floating-point operations.
        seconds: that measuring took.
        timeline: bytes on the device by kind over the step.
    """

    setup: Setup
    peak: int
    peak_by_kind: dict[Kind, int]
    host: int
    traffic: int
    flops: int
    seconds: float
    timeline: list[tuple[int, dict[Kind, int]]]


Step = Callable[[Tensor, Tensor, "int | None"], object]  # on a batch, in parts of so many samples


def measure(model: nn.Module, setup: Setup, batch_size: int) -> Result:
    """What one step of ``setup`` costs; ``model`` (on ``meta``, say) is only copied."""
    start = time.perf_counter()
    meter, traffic = meter_step(model, setup, batch_size), 0
    if meter.traffic:
        once, per_sample, per_part = _traffic(model, replace(setup, micro_batch=None, prefetch=True))
        parts = -(-batch_size // setup.micro_batch) if setup.micro_batch is not None else 1
        traffic = once + batch_size * per_sample + parts * per_part
    return Result(
        setup,
        peak=meter.peak,
        peak_by_kind=meter.peak_by_kind,
        host=meter.peak_by_device.get(HOST, 0),
        traffic=traffic,
        flops=count_flops(model, setup, batch_size),
        seconds=time.perf_counter() - start,
        timeline=meter.timeline(TIMELINE_POINTS),
    )


def meter_step(model: nn.Module, setup: Setup, batch_size: int, device: torch.device | str = "cuda") -> Meter:
    """The meter of one step of ``setup`` in a dry run of training on ``device``, which is one of this machine's if it has a
    number. It is about the peak: of a large module's slices the first are stepped on, so its traffic is not whole."""
    with _metered(model, setup, device) as (step, residency):
        if residency is not None:
            residency.rehearse_peaks()
        return step(batch_size, setup.micro_batch)


@functools.cache
def _traffic(model: nn.Module, setup: Setup) -> tuple[int, int, int]:
    """Bytes over the bus once per step, for each sample and for each part; neither parts nor prefetching change these."""
    with _metered(model, setup) as (step, _):
        one, two, halves = (step(*of).traffic for of in ((1, 1), (2, 2), (2, 1)))
    per_sample, per_part = two - one, halves - two
    return one - per_sample - per_part, per_sample, per_part


@contextlib.contextmanager
def _metered(
    model: nn.Module, setup: Setup, device: torch.device | str = "cuda"
) -> Iterator[tuple[Callable[[int, int | None], Meter], Residency | None]]:
    """A function from a number of samples and how many of them are a part to the meter of such a step, which is not about its
    peak unless the residency, given beside it for ours, is told so."""
    with contextlib.ExitStack() as stack:
        if setup.method.startswith("fsdp"):
            stack.enter_context(sharding())
        stack.enter_context(memory.dry_run(device))
        copy = memory.fake_copy(model)
        if setup.kernels == "triton":
            accelerate(copy)  # fused ops have fakes, which need no Triton
        step, holders, residency = _build(copy, setup)
        if residency is not None:
            residency.rehearse_traffic()
        step(*batch(model, setup, 1), None)  # creates the optimizer states
        where = torch.device(device)
        card = where if where.type == "cuda" and where.index is not None else None

        def metered(samples: int, micro_batch: int | None) -> Meter:
            images, labels = batch(model, setup, samples)
            with Meter(copy, *holders, images, labels, card=card) as meter:
                step(images, labels, micro_batch)
            return meter

        yield metered, residency


def count_flops(model: nn.Module, setup: Setup, batch_size: int) -> int:
    """FLOPs of one step of ``setup``."""
    # Neither the size of the parts nor where tensors wait changes what is computed.
    method = setup.method if setup.method in ("lora", "badam") else ""
    same = replace(setup, micro_batch=None, residency="all", tuned=False, method=method)
    same = replace(same, boundaries="device", weights="full", prefetch=True, kernels="reference")
    return _flops_of_two(model, same) * batch_size // 2


@functools.cache
def _flops_of_two(model: nn.Module, setup: Setup) -> int:
    with memory.dry_run():
        step, *_ = _build(memory.fake_copy(model), setup)
        images, labels = batch(model, setup, 2)
        return count(lambda: step(images, labels, None))


def _build(model: nn.Module, setup: Setup) -> tuple[Step, list[Any], Residency | None]:
    """The training step of ``setup``, what holds its state besides the model, and what moves it, if it is ours."""
    if setup.family == "rival":
        return _rival(model, setup)
    trainer = local_trainer(
        model,
        setup,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=5e-4, weight_decay=0.05),
        amp_dtype=torch.bfloat16,
    )
    parts = trainer.engine.parts
    trainer.engine.parts = lambda batch: representative(parts(batch))  # type: ignore[method-assign]  # of this one alone

    def step(images: Tensor, labels: Tensor, micro_batch: int | None) -> None:
        trainer.micro_batch = micro_batch
        trainer.step(images, labels)

    return step, [*trainer.modules, *trainer.optimizers], trainer.residency


def local_trainer(model: nn.Module, setup: Setup, **options: Any) -> LocalTrainer:
    """The trainer of one of our set-ups; ``options`` are what it leaves open."""
    chosen: dict[str, Any] = {
        "modules": setup.modules,
        "objective": setup.objective,
        "decoder": setup.decoder or "linear",
        "recompute": "block" if setup.recompute else "none",
        **{name: getattr(setup, name) for name in ("residency", "boundaries", "weights", "prefetch")},
    }
    return LocalTrainer(model, **chosen, **options)


def _rival(model: Any, setup: Setup) -> tuple[Step, list[Any], None]:
    model.train()
    if setup.recompute:
        model.set_grad_checkpointing()
    rival = RIVALS[setup.method](model)
    mean = torch.tensor([123.7, 116.3, 103.5]).view(-1, 1, 1)

    def step(images: Tensor, labels: Tensor, micro_batch: int | None) -> None:
        size = micro_batch or len(images)
        parts = [slice(start, start + size) for start in range(0, len(images), size)]
        for part in representative(parts):
            with (
                torch.autocast("cpu", torch.bfloat16, cache_enabled=not setup.tuned),
                rival.around(),
            ):
                inputs = images[part].float().sub_(mean).div_(58) if setup.tuned else images[part]
                loss = cross_entropy(model(inputs).float(), labels[part]) / len(parts)
                del inputs
            loss.backward()
            del loss
        rival.update()

    return step, rival.holders, None


def representative(parts: list[slice]) -> list[slice]:
    """The parts whose memory differs: the first, which makes the gradients, the second, which adds to them, and the
    last.

    All others are like the second, so a dry run over these finds the same peak, in a fraction of the time.
    """
    return [*parts[:2], *parts[2:][-1:]]


def batch(model: Any, setup: Setup, batch_size: int) -> tuple[Tensor, Tensor]:
    """Images and labels as ``setup`` gets them."""
    channels, height, width = model.pretrained_cfg["input_size"]
    if (embedding := getattr(model, "patch_embed", None)) is not None and embedding.img_size is not None:
        height, width = embedding.img_size
    dtype = torch.uint8 if setup.tuned else torch.float32
    return torch.empty(batch_size, channels, height, width, dtype=dtype), torch.zeros(batch_size, dtype=torch.long)


def skeleton(name: str, image_size: int | None) -> nn.Module:
    """The timm model without memory for its weights.

    Raises:
        UserError: timm has no such model, or none for images of this size.
    """
    if not timm.is_model(name):
        raise UserError(f"--model must be a timm model, got {name!r}; `timm.list_models()` lists them.")
    options: dict[str, Any] = {"img_size": image_size} if image_size else {}
    try:
        with torch.device("meta"):
            return timm.create_model(name, num_classes=CLASSES, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        if not image_size:
            raise
        raise UserError(f"--image-size: timm builds no {name} for {image_size} pixels: {sentence(error)}") from None


def number_of_blocks(model: nn.Module) -> int:
    """How many modules ``model`` can be cut into at most.

    Raises:
        UserError: the architecture is not supported.
    """
    try:
        return len(backbone(model).blocks)
    except ValueError as error:
        raise UserError(str(error)) from None


def possible(model: nn.Module, asked: Sequence[int] | None, default: Sequence[int]) -> list[int]:
    """The numbers of modules that were asked for, else those of ``default`` that ``model`` has blocks for.

    Raises:
        UserError: the architecture is not supported, or ``model`` cannot be cut into what was asked for.
    """
    blocks = number_of_blocks(model)
    for modules in asked or ():
        if not 1 <= modules <= blocks:
            raise UserError(f"--modules must be 1 to {blocks}, the blocks of {type(model).__name__}, got {modules}.")
    return list(asked or [modules for modules in default if modules <= blocks] or [1])
