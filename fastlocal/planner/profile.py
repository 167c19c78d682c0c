"""What each part of a model takes: measured once for each distinct block, in a dry run of it alone.

Bytes are affine in the number of samples: what autograd saves and what a kernel needs go with the samples, casts of the weights
do not. So two sizes tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastlocal import memory
from fastlocal.backbones import Backbone, Part
from fastlocal.dry_run import is_dry_run_of_cuda
from fastlocal.flops import formula
from fastlocal.geometry import Geometry
from fastlocal.module import LocalModule
from fastlocal.objectives import Features, Objective

SIZES = (2, 4)  # samples; BatchNorm in a head refuses a single one


@dataclass(frozen=True)
class Line:
    """Bytes as a function of samples."""

    constant: float
    per_sample: float

    def at(self, samples: int) -> float:
        return max(self.constant + samples * self.per_sample, 0.0)

    @classmethod
    def through(cls, values: Sequence[float]) -> Line:
        slope = (values[1] - values[0]) / (SIZES[1] - SIZES[0])
        return cls(values[0] - SIZES[0] * slope, slope)


@dataclass(frozen=True)
class Cost:
    """What a forward and a backward take.

    Attributes:
        weights: bytes of the parameters, and of them ``trained`` and ``castable`` (what autocast would cast), and what of
            these is ``recast``, for it is trained.
        saved: bytes that autograd keeps from forward to backward.
        work: bytes beyond these, the parameters, their gradients and the output at the worst moment.
        forward, backward: FLOPs per sample.
    """

    weights: int
    trained: int
    castable: int
    recast: int
    saved: Line
    work: Line
    forward: float
    backward: float


# What was measured in this process, by all that it depends on.
_known: dict[Hashable, Cost] = {}


class Profile:
    """The costs of stem, blocks and head of ``view``, and of the heads that an objective adds. For use inside a dry run."""

    def __init__(self, view: Backbone, amp_dtype: torch.dtype | None, say: Callable[[str], None]) -> None:
        self.view = view
        self.amp_dtype = amp_dtype
        say("measuring a block of each kind")
        self.stem = self._cost(view.stem, view.image, first=True)
        self.blocks = [self._cost(block, view.boundaries[i]) for i, block in enumerate(view.blocks)]
        self.head = self._cost(view.head, view.boundaries[-1])
        width = (amp_dtype or torch.float32).itemsize
        self._boundaries = [width * math.prod(one.shape) for one in view.boundaries]

    def boundary(self, i: int) -> int:
        """Bytes of a sample between blocks ``i - 1`` and ``i``."""
        return self._boundaries[i]

    @property
    def image(self) -> int:
        """Bytes of an image as uint8."""
        return math.prod(self.view.image.shape)

    def heads(self, module: LocalModule, objective: Objective) -> Cost:
        """The cost of the auxiliary head and the decoder of ``module``."""
        extra = (self.view.boundaries[module.span.start], self.view.image)
        heads = _Heads(module, objective)
        return self._cost(
            heads, self.view.boundaries[module.span.stop], extra, about=(objective.name, module.lookahead)
        )

    def _cost(
        self,
        part: nn.Module,
        source: Geometry,
        extra: Sequence[Geometry] = (),
        first: bool = False,
        about: tuple[str, Sequence[nn.Module]] | None = None,
    ) -> Cost:
        """The cost of ``part`` on inputs of geometry ``source`` and ``extra``, measured if none like it was before."""
        likewise = (about[0], tuple(structure(one) for one in about[1])) if about else None
        key = (is_dry_run_of_cuda(), self.amp_dtype, source, tuple(extra), first, likewise, structure(part))
        if key not in _known:
            _known[key] = self._measure(part, source, first, extra)
        return _known[key]

    def _measure(self, part: nn.Module, source: Geometry, first: bool, extra: Sequence[Geometry]) -> Cost:
        parameters = list(part.parameters())
        trained = [p for p in parameters if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)  # as a part has it that is not the first
        runs = [self._run(part, source, first, extra, samples) for samples in SIZES]
        for parameter in parameters:
            parameter.grad = None
        castable = [cast(Tensor, m.weight) for m in part.modules() if type(m) in (nn.Linear, nn.Conv2d)]
        return Cost(
            weights=sum(p.nbytes for p in parameters),
            trained=sum(p.nbytes for p in trained),
            castable=sum(weight.nbytes for weight in castable),
            recast=sum(weight.nbytes for weight in castable if weight.requires_grad),
            saved=Line.through([run[0] for run in runs]),
            work=Line.through([run[1] for run in runs]),
            forward=runs[1][2] / SIZES[1],
            backward=runs[1][3] / SIZES[1],
        )

    def _run(
        self, part: nn.Module, source: Geometry, first: bool, extra: Sequence[Geometry], samples: int
    ) -> tuple[float, float, int, int]:
        """(saved, work, forward FLOPs, backward FLOPs) of a run on ``samples``, with gradients to add to."""
        dtype = torch.float32 if first else self.amp_dtype or torch.float32
        x = torch.empty(samples, *source.shape, dtype=dtype, device="cpu", requires_grad=not first)
        beside = [torch.empty(samples, *one.shape, dtype=dtype, device="cpu") for one in extra]
        meter = _Meter(part, x, *beside)
        with meter:
            held = meter.live
            with torch.autocast("cpu", self.amp_dtype, enabled=self.amp_dtype is not None, cache_enabled=False):
                output = part(x, *beside)
            output = output[1] if isinstance(output, tuple) else output
            forward, saved = meter.flops, meter.live - held - output.nbytes
            upstream = torch.empty_like(output)
            if output.requires_grad:
                output.backward(upstream)
            own = output.nbytes + upstream.nbytes
        return max(saved, 0), max(meter.peak - held - max(saved, 0) - own, 0), forward, meter.flops - forward


class _Meter(memory.DryMeter):
    """A meter that counts FLOPs too. `flops.count` around it would take as long as all else."""

    flops = 0

    def _follow(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        result = super()._follow(func, types, args, kwargs)
        flops = formula(func.overloadpacket)
        if flops is not None and result is not NotImplemented:
            self.flops += flops(*args, **kwargs, out_val=result)
        return result


class _Heads(nn.Module):
    """What a local module learns from, as a function of its output, its input and the images."""

    def __init__(self, module: LocalModule, objective: Objective) -> None:
        super().__init__()
        self.owned = module.heads
        self._module = (module,)  # in a tuple, so that the blocks' parameters are not counted
        self._objective = objective

    def forward(self, h: Tensor, embedded: Tensor, images: Tensor) -> Tensor:
        (module,) = self._module
        loss = module.classify(h).float().sum()
        features = Features(embedded, h, residual=h.float().sum() if module.measure_residual else None)
        regularizer = self._objective.regularizer(
            module.decoder, features, images, torch.zeros(len(h), dtype=torch.int64, device=h.device)
        )
        return loss if regularizer is None else loss + regularizer


def structure(part: Any) -> Hashable:
    """Equal for parts that do the same with layers that are alike, whatever drop path's rate."""
    if isinstance(part, Part):
        return tuple(structure(function) for function in part.functions)
    if isinstance(part, nn.Module):
        layers = [(name, layer) for name, layer in part.named_modules() if "drop_path" not in name]
        kinds = tuple((name, type(layer), layer.extra_repr(), _settings(layer)) for name, layer in layers)
        return kinds, tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in part.named_parameters())
    if isinstance(part, FunctionType):
        return part.__code__, tuple(structure(cell.cell_contents) for cell in part.__closure__ or ())
    return part if isinstance(part, Hashable) else id(part)


def _settings(layer: nn.Module) -> Hashable:
    """What an adapter's or a library's layer holds beside tensors and layers, such as the size of its windows."""
    return tuple((name, repr(value)) for name, value in vars(layer).items() if _is_plain(value))


def _is_plain(value: Any) -> bool:
    return (
        all(map(_is_plain, value)) if isinstance(value, tuple) else isinstance(value, bool | int | float | str | None)
    )
