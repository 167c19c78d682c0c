"""Parameters side by side in one stretch of memory, so that they cross the bus in one copy."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

# Parameters start at multiples of this many elements, so that a parameter in a slab is aligned as one of its own would be.
ALIGNMENT = 64


@dataclass(eq=False)
class Slab:
    """The layout of parameters, all of one dtype, in a stretch of memory, and what lies on the host in this layout.

    Attributes:
        offsets: of each parameter's first element. Those that are held in a low precision on the device come first.
        size: elements of the whole stretch.
        low_size: elements of the stretch that is held in a low precision.
        home: the weights [size]; None where they stay on the device.
        low: the first ``low_size`` of them, cast.
        homes: each parameter's place in ``home``, in its shape.
        states: the optimizer's [size], by name.
        device: the weights while they are on the device: the stretch in low precision, and the rest.
        versions: of the parameters when ``low`` was made: what changes a parameter in place changes its version.
    """

    offsets: dict[nn.Parameter, int]
    size: int
    low_size: int
    dtype: torch.dtype
    home: Tensor | None = None
    low: Tensor | None = None
    homes: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    states: dict[str, Tensor] = field(default_factory=dict)
    device: tuple[Tensor, Tensor] | None = None
    versions: dict[nn.Parameter, int] = field(default_factory=dict)

    def view(self, stretch: Tensor, parameter: nn.Parameter, start: int = 0) -> Tensor:
        """The place of ``parameter``, in its shape, in ``stretch``, which begins at element ``start`` of the slab."""
        offset = self.offsets[parameter] - start
        return stretch[offset : offset + parameter.numel()].view(parameter.shape)


def lay_out(parameters: Sequence[nn.Parameter], low: Collection[nn.Parameter]) -> Slab:
    """A slab for ``parameters``, with those of ``low`` first, and what is trained as near together as that allows."""
    ordered = sorted(parameters, key=lambda p: (p not in low, p.requires_grad != (p in low)))
    offsets: dict[nn.Parameter, int] = {}
    size = low_size = 0
    for parameter in ordered:
        offsets[parameter] = size
        size += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        if parameter in low:
            low_size = size
    return Slab(offsets, size, low_size, parameters[0].dtype)
