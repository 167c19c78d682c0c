"""What stands between two modules: the features of the whole batch, or the gradient of them, read and written in parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from fastlocal import memory
from fastlocal.bus import Bus

Home = Literal["device", "host"]


class Boundary:
    """A full batch [B, …] that lives on the device or on the host, whose parts are on the device when they are used.

    Args:
        home: ``"device"``, or ``"host"``: then each part crosses the bus when it is written and when it is read, the next
            one behind the compute of the one before.
        batch: B.
        dtype: of what is stored; None keeps that of what is written first.
        clone: copy what is written even where it could be kept, because its memory will be written again.
    """

    def __init__(self, home: Home, bus: Bus, batch: int, dtype: torch.dtype | None = None, *, clone: bool = False):
        self._home: Home = home
        self._bus = bus
        self._batch = batch
        self._dtype = dtype
        self._clone = clone
        self._whole: Tensor | None = None
        self._borrowed = False

    @classmethod
    def of(cls, images: Tensor, home: Home, bus: Bus) -> Boundary:
        """The images [B, channels, height, width] of a batch, moved to the device here unless they live on the host."""
        boundary = cls(home, bus, len(images))
        if home == "device" or images.device.type != "cpu":
            boundary._home = "device"
            boundary._whole = images.to(bus.device, non_blocking=True)
        else:
            boundary._whole = memory.on_host(images)
        return boundary

    def parts(self, parts: Sequence[slice]) -> Iterator[Tensor]:
        """One part after another, [b, …] on the device."""
        assert self._whole is not None
        if self._home == "device":
            for part in parts:
                yield self._whole[part]
            return
        self._bus.settle()
        coming = [self._bus.fetch(self._whole[parts[0]])]
        for following in [*parts[1:], None]:
            self._bus.arrive()
            value = coming.pop()
            if following is not None:
                coming.append(self._bus.fetch(self._whole[following]))
            yield memory.tag(value, "boundary")
            del value

    def write(self, part: slice, value: Tensor) -> None:
        """Store ``value`` [b, …] as ``part`` of the batch."""
        dtype = self._dtype or value.dtype
        if self._home == "device" and len(value) == self._batch:
            value = value.to(dtype)
            self._whole = memory.tag(value.clone() if self._clone else value, "boundary")
            return
        if self._whole is None:
            shape = torch.Size((self._batch, *value.shape[1:]))
            self._borrowed = self._home == "host"
            self._whole = (
                self._bus.borrow(shape, dtype)
                if self._borrowed
                else memory.tag(value.new_empty(shape, dtype=dtype), "boundary")
            )
        if self._home == "host":
            self._bus.store(value.to(dtype), self._whole[part])
        else:
            self._whole[part] = value

    def whole(self) -> Tensor:
        """The whole batch, [B, …] on the device."""
        assert self._whole is not None
        if self._home == "device":
            return self._whole
        self._bus.settle()
        value = self._bus.fetch(self._whole)
        self._bus.arrive()
        return value

    def release(self) -> None:
        """Nobody reads this any more; its host memory may be used again."""
        if self._borrowed and self._whole is not None:
            self._bus.give_back(self._whole)
        self._whole = None
