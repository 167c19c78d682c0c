"""Data parallel: each process trains every module on its own part of the batch; gradients are summed.

        process 0   module 1 ▓▓▓▓▓▓│module 2 ▓▓▓▓▓▓│u1│module 3 ▓▓▓▓▓▓│u2│ … │uK│     ▓ forward and backward
                                   └── Σ of 1 ─────┘  └── Σ of 2 ──────┘              Σ sum over processes
        process 1   module 1 ▓▓▓▓▓▓│module 2 ▓▓▓▓▓▓│u1│module 3 ▓▓▓▓▓▓│u2│ … │uK│     u update, the same everywhere
                    time ───────────────────────────────────────────────────▶

The gradients of a module travel while the next one is trained (with exact gradients: while the previous one is recomputed
and backpropagated), in buckets, once per batch however many parts it has. Then every process clips and updates alike, from
the same sums: found infinities, norms and moving averages agree without being sent. A module whose weights leave the device
(residency="module"), or that a module after it reads from, is waited for at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastlocal.distributed.ranks import Ranks

BUCKET = 25 * 2**20  # bytes; torch's DistributedDataParallel has the same


class Reducer:
    """Sums gradients over the processes along "data".

    Attributes:
        sent: bytes that were handed to torch.distributed so far.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.sent = 0

    def start(self, parameters: Sequence[nn.Parameter]) -> Reduction:
        """Take the gradients of ``parameters``, which are None from here on, and begin to sum them."""
        buckets: list[tuple[list[nn.Parameter], Tensor, dist.Work]] = []
        with self._ranks.waiting():
            for members in _buckets([p for p in parameters if p.grad is not None]):
                flat = torch.cat([p.grad.reshape(-1) for p in members if p.grad is not None])
                for parameter in members:
                    parameter.grad = None
                work = dist.all_reduce(flat, group=self._ranks.data.group, async_op=True)
                assert work is not None
                buckets.append((members, flat, work))
                self.sent += flat.nbytes
        return Reduction(buckets, self._ranks)


class Reduction:
    """Gradients on their way."""

    def __init__(self, buckets: list[tuple[list[nn.Parameter], Tensor, dist.Work]], ranks: Ranks) -> None:
        self._buckets, self._ranks = buckets, ranks

    def finish(self) -> None:
        """Wait for the sums and give them to the parameters."""
        for members, flat, work in self._buckets:
            with self._ranks.waiting():
                work.wait(self._ranks.timeout)
            for parameter, gradient in zip(members, flat.split([p.numel() for p in members]), strict=True):
                parameter.grad = gradient.view(parameter.shape)


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Neighbours whose gradients have one dtype, up to `BUCKET` bytes together."""
    buckets: list[list[nn.Parameter]] = []
    size, dtype = 0, None
    for parameter in parameters:
        assert parameter.grad is not None
        if not buckets or parameter.grad.dtype != dtype or size + parameter.grad.nbytes > BUCKET:
            buckets.append([])
            size, dtype = 0, parameter.grad.dtype
        buckets[-1].append(parameter)
        size += parameter.grad.nbytes
    return buckets


def share_of(batch: int, rank: int, size: int) -> list[int]:
    """Which of the ``batch`` images process ``rank`` of ``size`` takes: whole pairs of the i-th and the i-th last.

    Mixup mixes those two, so the shares of a mixed batch are the mixed shares. Fewer pairs than processes are parted.
    """
    pairs = batch // 2
    if pairs < size:
        return list(range(batch * rank // size, batch * (rank + 1) // size))
    begin, end = (pairs * r // size for r in (rank, rank + 1))
    middle = [pairs] if batch % 2 and rank == size - 1 else []
    return [*range(begin, end), *middle, *range(batch - end, batch - begin)]
