"""What of the idle modules stays on the device.

The parameters of an idle module can live on the host (`Slab`), and so can its optimizer states (`HostedOptimizer`). A module's
weights come in when its turn comes (and the next module's are prefetched behind its compute) and go out, updated, a slice at a
time with the optimizer states that came for the update. So the device holds the weights of one or two modules, the gradients
of one, and two slices of optimizer state; everything crosses the bus once each way per step, whatever the number of parts.

With ``weights="low"`` what autocast would cast in every forward, the weights of linear and convolution layers, arrives cast
already: half the bytes on the device and on the bus. The fp32 master comes only as a slice, for the optimizer. Gradients are
fp32 either way. The copies themselves are made by `fastlocal.bus.Bus`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import nn

from fastlocal.bus import Bus
from fastlocal.checks import check_choice
from fastlocal.hosted import LIKE_OTHERS, SLICE, HostedOptimizer
from fastlocal.module import LocalModule
from fastlocal.slab import Slab, lay_out

Keep = Literal["all", "optimizer", "module"]
Weights = Literal["full", "low"]


@dataclass(frozen=True)
class ResidencyOptions:
    """What of the idle modules stays on the device, and how the module at work is held there.

    Attributes:
        keep: ``"all"`` moves nothing; ``"optimizer"`` keeps the optimizer states of all modules on the host except while
            they step; ``"module"`` keeps the parameters there as well.
        weights: ``"full"``, or ``"low"``: cast to ``amp_dtype`` on the device where autocast would cast them.
        prefetch: fetch the next module's weights behind the compute of the one before, which holds both.

    Raises:
        ValueError: a value is none of these, or two do not go together.
    """

    keep: Keep
    weights: Weights
    prefetch: bool
    amp_dtype: torch.dtype | None

    def __post_init__(self) -> None:
        check_choice("residency", self.keep, get_args(Keep))
        check_choice("weights", self.weights, get_args(Weights))
        if self.weights == "low" and (self.keep != "module" or self.amp_dtype is None):
            raise ValueError(
                "weights='low' needs residency='module' (the fp32 weights stay on the host) and amp_dtype (what they are cast"
                f" to); got residency={self.keep!r} and amp_dtype={self.amp_dtype}."
            )


class Residency:
    """Moves the state of ``modules`` between host and device.

    Args:
        optimizers: one per module, None for a module with nothing to train. With ``keep`` other than ``"all"`` an optimizer
            sees a few parameters, or slices of them, at a time, so it must treat each parameter on its own.
        own: the modules that this process trains; the others stay where they are.
    """

    def __init__(
        self,
        modules: Sequence[LocalModule],
        optimizers: Sequence[torch.optim.Optimizer | None],
        options: ResidencyOptions,
        bus: Bus,
        own: range,
    ) -> None:
        self.options = options
        self._bus = bus
        self._optimizers = optimizers
        self._hosted: list[HostedOptimizer | None] = []
        self._slabs: list[Slab] = []
        self._needed: list[list[Slab]] = []
        if options.keep == "all":
            return
        slab_of = self._lay_out([modules[k] for k in own])
        for k, (module, optimizer) in enumerate(zip(modules, optimizers, strict=True)):
            hosted = HostedOptimizer(optimizer, slab_of, bus) if k in own and optimizer is not None else None
            self._hosted.append(hosted)
            needed = (slab_of[p] for p in (*module.parameters(), *module.borrowed) if k in own)
            self._needed.append(list(dict.fromkeys(needed)))
        if options.keep == "module":
            for slab in self._slabs:
                self._settle_down(slab)
        else:
            for parameter in slab_of:
                parameter.data = parameter.data.contiguous()  # a slice of it is a view
        for index in range(len(optimizers)):
            self.park_states(index)  # of optimizers that come with theirs, as Adagrad does, or have stepped before

    @contextmanager
    def on_device(self, index: int, upcoming: int | None) -> Iterator[None]:
        """Hold the parameters of module ``index`` on the device in this block, and prefetch those of ``upcoming``."""
        if self.options.keep != "module":
            yield
            return
        following = self._needed[upcoming] if upcoming is not None else []
        self._fetch(self._needed[index])
        self._bus.arrive()
        if self.options.prefetch:
            self._fetch(following)
        try:
            yield
        finally:
            for slab in self._needed[index]:
                if slab not in following:
                    self._drop(slab)

    def step(self, index: int) -> None:
        """Step the optimizer of module ``index`` on the gradients that its parameters hold, and set those to None."""
        optimizer, hosted = self._optimizers[index], self._hosted[index] if self._hosted else None
        if hosted is not None:
            hosted.step()
        elif optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def exchange(self, pairs: Iterable[tuple[nn.Parameter, nn.Parameter]]) -> None:
        """Exchange the values of parameters, none of them in use now, with those of others that are kept where they are."""
        for parameter, other in pairs:
            if self.options.keep == "module":  # a slab is exchanged in place
                value = parameter.data.clone()
                parameter.data.copy_(other.data)
                other.data.copy_(value)
            else:
                parameter.data, other.data = other.data, parameter.data
        for slab in self._slabs:
            _cast(slab)

    def park(self) -> None:
        """Move home whatever is on the device and need not be, after a step was cut off."""
        self._bus.arrive()  # else a prefetch under way would write to memory that is free again
        for slab in self._slabs:
            self._drop(slab)
        for index in range(len(self._hosted)):
            self.park_states(index)
        self._bus.synchronize()

    def park_states(self, index: int) -> None:
        """Move the optimizer states of module ``index`` home, after they were loaded."""
        hosted = self._hosted[index] if self._hosted else None
        if hosted is not None:
            hosted.park()

    def rehearse_peaks(self) -> None:
        """For dry runs that are about peaks: step on the first slices of a module where the others are like them."""
        for hosted in filter(None, self._hosted):
            hosted.slice_size, hosted.most_slices = SLICE, LIKE_OTHERS

    def rehearse_traffic(self) -> None:
        """For dry runs that are not about peaks: a module is one slice, and as much crosses the bus."""
        for hosted in filter(None, self._hosted):
            hosted.slice_size, hosted.most_slices = sys.maxsize, None

    def release(self) -> None:
        """Bring everything to the device for good, so that another `Residency` may take over."""
        for slab in self._slabs:
            for parameter, home in slab.homes.items():
                parameter.data = self._bus.fetch(home)
        for hosted in self._hosted:
            if hosted is not None:
                hosted.release()
        self._bus.arrive()
        self._slabs, self._hosted, self._needed = [], [], []

    # Weights

    def _lay_out(self, modules: Sequence[LocalModule]) -> dict[nn.Parameter, Slab]:
        """The slab of each parameter: a module's own, and apart from them those that the module before it borrows."""
        borrowed = {p for module in modules for p in module.borrowed}
        low = set(_castable(modules)) if self.options.weights == "low" else set()
        slab_of: dict[nn.Parameter, Slab] = {}
        for module in modules:
            kinds: dict[tuple[bool, torch.dtype], list[nn.Parameter]] = {}
            for parameter in module.parameters():
                if parameter not in slab_of:
                    kinds.setdefault((parameter in borrowed, parameter.dtype), []).append(parameter)
            for parameters in kinds.values():
                slab = lay_out(parameters, low)
                slab_of.update(dict.fromkeys(parameters, slab))
                self._slabs.append(slab)
        return slab_of

    def _settle_down(self, slab: Slab) -> None:
        """Give the parameters of ``slab`` their home on the host."""
        slab.home = self._bus.host(slab.size, slab.dtype).zero_()
        if slab.low_size:
            slab.low = self._bus.host(slab.low_size, cast(torch.dtype, self.options.amp_dtype))
        for parameter in slab.offsets:
            slab.homes[parameter] = home = slab.view(slab.home, parameter)
            home.copy_(parameter.data)
            parameter.data = home
            if slab.low is not None:
                parameter.grad_dtype = slab.dtype  # gradients add up in it, whatever the weights are held in
        _cast(slab)

    def _fetch(self, slabs: Sequence[Slab]) -> None:
        for slab in slabs:
            if slab.device is not None:
                continue
            assert slab.home is not None
            if any(version != parameter._version for parameter, version in slab.versions.items()):
                _cast(slab)  # somebody loaded weights since
            low = self._bus.fetch(slab.low) if slab.low is not None else slab.home[:0]
            rest = self._bus.fetch(slab.home[slab.low_size :]) if slab.low_size < slab.size else slab.home[:0]
            slab.device = (low, rest)
            for parameter, offset in slab.offsets.items():
                held = offset < slab.low_size
                parameter.data = slab.view(low if held else rest, parameter, 0 if held else slab.low_size)

    def _drop(self, slab: Slab) -> None:
        if slab.device is not None:
            for parameter, home in slab.homes.items():
                parameter.data = home
            slab.device = None


def _cast(slab: Slab) -> None:
    """Cast the weights on the host again; they have changed there."""
    slab.versions = {parameter: parameter._version for parameter in slab.offsets}
    if slab.low is not None and slab.home is not None:
        slab.low.copy_(slab.home[: slab.low_size])


def _castable(modules: Sequence[LocalModule]) -> Iterator[nn.Parameter]:
    """The fp32 weights that autocast would cast: of linear and convolution layers, whose only use is their own.

    Subclasses are left out, since they may do arithmetic on their weight, and decoders, whose projection is a part of
    `fastlocal.kernels.reconstruction_loss`, which sums its gradient in fp32.
    """
    for module in modules:
        decoder = set(module.decoder.modules()) if module.decoder is not None else set()
        for layer in module.modules():
            if layer in decoder or type(layer) not in (nn.Linear, nn.Conv2d):
                continue
            weight = cast(nn.Parameter, layer.weight)
            if weight.dtype == torch.float32:
                yield weight
