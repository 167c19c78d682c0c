"""An optimizer whose states live on the host: it steps on slices of fixed size, however large a single matrix is.

        host    weights  [··│····│····│··]     moment 1  [··│····│····│··]     moment 2  [··│····│····│··]
                             │    ▲                          │    ▲                          │    ▲
                             ▼    │                          ▼    │                          ▼    │
        device              slice ┴── gradients ──────────  slice ┴── optimizer.step() ──   slice ┘

While one slice is stepped the next one is on its way. An optimizer that treats each element on its own (`ELEMENTWISE`) sees a
slice of a parameter as a parameter; any other one sees whole parameters, a few at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import timm.optim
import torch
from torch import Tensor, nn

from fastlocal.bus import Bus
from fastlocal.slab import Slab

# Elements of a slice: 4 MiB of fp32 for the weights and as much for each state, twice, since the next one is on its way.
SLICE = 2**20
# Slices of a module, before all others are like them and hold less.
LIKE_OTHERS = 3

ELEMENTWISE: frozenset[type[torch.optim.Optimizer]] = frozenset(
    {
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adamax,
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        torch.optim.Adadelta,
        timm.optim.Lion,
    }
)


@dataclass
class _Piece:
    """Elements ``start`` to ``stop`` of a parameter, which lie at ``offset`` of its slab."""

    parameter: nn.Parameter
    start: int
    stop: int
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.stop - self.start


@dataclass
class _Slice:
    """Pieces that lie near together in one slab, from element ``start`` to ``stop``, and what of them is on the device."""

    slab: Slab
    pieces: list[_Piece]
    master: Tensor | None = None
    states: dict[str, Tensor] | None = None

    @property
    def start(self) -> int:
        return self.pieces[0].offset

    @property
    def stop(self) -> int:
        return self.pieces[-1].end

    @property
    def low(self) -> bool:
        """Whether the weights on the device are casts of those on the host."""
        return self.slab.low is not None and self.start < self.slab.low_size


class HostedOptimizer:
    """``optimizer`` with its states on the host.

    Args:
        slabs: the slab of each of its parameters.

    Attributes:
        slice_size: elements of a slice.
        most_slices: step on no more than so many, of an elementwise optimizer. Both are for dry runs, which want no values.

    Raises:
        ValueError: the optimizer needs all gradients at once.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, slabs: Mapping[nn.Parameter, Slab], bus: Bus) -> None:
        self._optimizer = optimizer
        self._slabs = slabs
        self._bus = bus
        self._elementwise = type(optimizer) in ELEMENTWISE
        self.slice_size = SLICE
        self.most_slices: int | None = None
        if isinstance(optimizer, timm.optim.Lamb) and any(g["max_grad_norm"] for g in optimizer.param_groups):
            raise ValueError(
                "optimizer: LAMB with max_grad_norm divides by the norm of all gradients, and residency='optimizer' and"
                " 'module' step on a few parameters at a time; set max_grad_norm=None (and clip_grad of the trainer), or"
                " residency='all'."
            )

    def step(self) -> None:
        """Step on the gradients that the parameters hold, and set those to None."""
        optimizer = self._optimizer
        gradients = {p: p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        optimizer.zero_grad(set_to_none=True)
        before = {p: dict(optimizer.state.get(p, {})) for p in gradients}  # what every slice of a parameter starts from
        slices = self._slices(gradients)[: self.most_slices if self._elementwise else None]
        # Some optimizers count their steps in a group; every slice must be the same step.
        groups = [dict(group) for group in optimizer.param_groups]
        group_of = {p: i for i, group in enumerate(groups) for p in group["params"]}
        try:
            for i, current in enumerate(slices):
                if i == 0:
                    self._fetch(current, before)
                self._bus.arrive()
                if i + 1 < len(slices):
                    self._fetch(slices[i + 1], before)
                values = [self._value(current, piece, gradients[piece.parameter], before) for piece in current.pieces]
                for index, (group, whole) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
                    pairs = zip(current.pieces, values, strict=True)
                    members = [value for piece, value in pairs if group_of[piece.parameter] == index]
                    group.clear()
                    group.update(whole, params=members)
                optimizer.step()
                for group in optimizer.param_groups:
                    group["params"] = []
                self._store(current, values)
                for piece in current.pieces:
                    if piece.stop == piece.parameter.numel():
                        del gradients[piece.parameter]
                del values  # they hold the slice, and the one after the next is fetched now
        finally:
            for group, whole in zip(optimizer.param_groups, groups, strict=True):
                group["params"] = whole["params"]

    def park(self) -> None:
        """Move the states, wherever they are, to the host."""
        state_of = self._optimizer.state
        shaped = {
            key
            for parameter, state in state_of.items()
            for key, value in state.items()
            if isinstance(value, Tensor) and value.ndim and value.shape == parameter.shape
        }
        for parameter in list(state_of):
            for key, value in state_of[parameter].items():
                if not isinstance(value, Tensor):
                    continue
                if value.shape == parameter.shape and (value.ndim or key in shaped):
                    state_of[parameter][key] = home = self._home(cast(nn.Parameter, parameter), key, value.dtype)
                    home.copy_(value)
                elif value.numel() > 1:
                    state_of[parameter][key] = self._own_home(value)

    def release(self) -> None:
        """Bring the states to the device for good."""
        for state in self._optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.numel() > 1:
                    state[key] = self._bus.fetch(value)

    # One slice

    def _slices(self, parameters: Mapping[nn.Parameter, Any]) -> list[_Slice]:
        slices: list[_Slice] = []
        ordered = sorted(parameters, key=lambda p: (id(self._slabs[p]), self._slabs[p].offsets[p]))
        for parameter in ordered:
            slab, size = self._slabs[parameter], parameter.numel()
            length = self.slice_size if self._elementwise else size
            for start in range(0, size, length):
                piece = _Piece(parameter, start, min(start + length, size), slab.offsets[parameter] + start)
                last = slices[-1] if slices and slices[-1].slab is slab else None
                joins = last is not None and piece.end - last.start <= self.slice_size
                if last is not None and joins and last.low == _Slice(slab, [piece]).low:
                    last.pieces.append(piece)
                else:
                    slices.append(_Slice(slab, [piece]))
        return slices

    def _fetch(self, one: _Slice, before: Mapping[nn.Parameter, dict[str, Any]]) -> None:
        """Start what the step on a slice needs on its way to the device."""
        slab = one.slab
        if one.low:
            assert slab.home is not None
            one.master = self._bus.fetch(slab.home[one.start : one.stop])
        known = any(self._optimizer.state.get(piece.parameter) for piece in one.pieces)
        one.states = {key: self._bus.fetch(state[one.start : one.stop]) for key, state in slab.states.items() if known}

    def _value(
        self, one: _Slice, piece: _Piece, gradient: Tensor, before: Mapping[nn.Parameter, dict[str, Any]]
    ) -> nn.Parameter:
        """A piece as a parameter of its own, with gradient and state."""
        parameter = piece.parameter
        stretch = slice(piece.offset - one.start, piece.end - one.start)
        shape = (-1,) if self._elementwise or parameter.ndim == 0 else parameter.shape
        weights = one.master[stretch] if one.master is not None else parameter.data.view(-1)[piece.start : piece.stop]
        value = nn.Parameter(weights.view(shape))
        value.grad = gradient.reshape(-1)[piece.start : piece.stop].view(shape)
        state: dict[str, Any] = {}
        for key, entry in before[parameter].items():
            assert one.states is not None
            if not isinstance(entry, Tensor):
                state[key] = entry
            elif key in one.states and entry.shape == parameter.shape:
                state[key] = one.states[key][stretch].view(shape)
            else:
                state[key] = self._bus.fetch(entry) if entry.numel() > 1 else entry.clone()
        if state:
            self._optimizer.state[value] = state
        return value

    def _store(self, one: _Slice, values: list[nn.Parameter]) -> None:
        """Send weights and states home; the parameters' own states say where they are."""
        slab, held = one.slab, one.states
        assert held is not None
        for piece, value in zip(one.pieces, values, strict=True):
            value.grad = None
            stretch = slice(piece.offset - one.start, piece.end - one.start)
            for key, entry in self._optimizer.state.pop(value, {}).items():
                state = self._optimizer.state[piece.parameter]
                if isinstance(entry, Tensor) and entry.ndim and entry.shape == value.shape:
                    state[key] = self._home(piece.parameter, key, entry.dtype)
                    if key in held:
                        held[key][stretch].copy_(entry.view(-1))  # itself, if the optimizer works in place
                    else:
                        self._bus.store(entry.reshape(-1), slab.states[key][piece.offset : piece.end])
                else:
                    state[key] = self._own_home(entry) if isinstance(entry, Tensor) and entry.numel() > 1 else entry
        for key, stretch_of in held.items():
            self._bus.store(stretch_of, slab.states[key][one.start : one.stop])
        if slab.home is not None:
            if one.master is None:
                assert slab.device is not None
                begin = slab.low_size
                self._bus.store(slab.device[1][one.start - begin : one.stop - begin], slab.home[one.start : one.stop])
            else:
                assert slab.low is not None
                self._bus.store(one.master, slab.home[one.start : one.stop])
                self._bus.store(one.master.to(slab.low.dtype), slab.low[one.start : one.stop])
        one.master = one.states = None

    # Where states live

    def _home(self, parameter: nn.Parameter, key: str, dtype: torch.dtype) -> Tensor:
        """The place of the state ``key`` of ``parameter`` on the host, in the parameter's shape."""
        slab = self._slabs[parameter]
        if key not in slab.states:
            slab.states[key] = self._bus.host(slab.size, dtype).zero_()
        return slab.view(slab.states[key], parameter)

    def _own_home(self, value: Tensor) -> Tensor:
        """Host memory for a state that has not its parameter's shape, with its value."""
        home = self._bus.host(value.numel(), value.dtype).view(value.shape)
        self._bus.store(value, home)
        return home
