"""Module parallel: each process trains its own modules and sends features on; nothing ever comes back.

        process 0   batch 1 ▓▓▓▓▓▓│batch 2 ▓▓▓▓▓▓│batch 3 ▓▓▓▓▓▓│batch 4 ▓▓▓▓▓▓│    ▓ forward, backward, update
                                  └──▶ 1         └──▶ 2         └──▶ 3              of the modules that it has
        process 1                    batch 1 ▓▓▓▓▓▓│batch 2 ▓▓▓▓▓▓│batch 3 ▓▓▓▓▓▓│
                    time ─────────────────────────────────────────────────▶

A module learns from what the one before it made of the batch before that batch's update, as in one process. So the arrow is
all there is: features, labels, the images if a later objective reads them, and the seed that masks are drawn from. The
pipeline is never emptied between batches, no weights are stale, and on a CPU the result is that of one process bit for bit.

A message is one buffer of a fixed size, headed by what lies in it:

        │ header │ features [B, …] │ images [B, …] │ labels [B, …] │ unused │

Both sides have ``queue`` such buffers under way, and the receiver one more that it reads from: it has asked for the next
messages before it works on one, so that they arrive meanwhile, and the sender waits only where it is ``queue`` messages
ahead. Where a batch needs more than the buffers hold, all that the receiver has asked for is answered with the new size first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from fastlocal.distributed.ranks import RankLost, Ranks

HEADER = 64  # int64 numbers
ALIGNMENT = 64  # bytes
_TYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    *(torch.uint8, torch.int64, torch.int32, torch.bool),
)
_LONGEST_SHAPE = 5
_PER_TENSOR = 2 + 2 * _LONGEST_SHAPE


class Kind(IntEnum):
    """What a message is for."""

    STEP = 1
    PREDICT = 2
    GROW = 3  # the next buffers are larger
    END = 4


@dataclass(frozen=True)
class Message:
    """What one process sends on to the next.

    Attributes:
        x: what the next module reads, [B, …].
        images: [B, …], where a later module's loss needs them.
        labels: [B, …], for a step.
        seed: what the step's masks are drawn from.
        samples: size of the whole batch, over all processes along "data".
    """

    kind: Kind
    x: Tensor
    images: Tensor | None = None
    labels: Tensor | None = None
    seed: int | None = None
    samples: int = 0

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.x, self.images, self.labels


class Pipeline:
    """Receives from the process before this one along "modules", and sends to the one after it.

    Args:
        queue: messages that may be under way on either side.

    Attributes:
        sent: bytes that were sent on so far.

    Raises:
        ValueError: ``queue`` is less than 1.
    """

    _made = 0  # a tag for each, so that what one left behind is not taken for another's

    def __init__(self, ranks: Ranks, queue: int, device: torch.device) -> None:
        if queue < 1:
            raise ValueError(f"queue must be at least 1, got {queue}.")
        Pipeline._made += ranks.modules.size > 1  # a process may have trainers of its own besides
        self._tag = Pipeline._made
        self._ranks, self._queue, self._device = ranks, queue, device
        axis = ranks.modules
        self._before = axis.members[axis.rank - 1] if axis.rank else None
        self._after = axis.members[axis.rank + 1] if axis.rank + 1 < axis.size else None
        self._outgoing: deque[tuple[Tensor, dist.Work | None]] = deque()
        self._incoming: deque[tuple[Tensor, dist.Work]] = deque()
        self._read = torch.empty(0, device=device)  # the buffer that the last message lies in
        self._out_size = self._in_size = 0  # of a buffer, in bytes
        self.sent = 0

    # Sending

    def send(self, message: Message) -> None:
        """Send ``message`` on, if there is a process after this one; its tensors are copied."""
        if self._after is None:
            return
        needed = _layout(message.tensors)[1]
        with self._ranks.waiting():
            if needed > self._out_size:
                self._grow(needed)
            buffer = self._free()
            buffer[: HEADER * 8].copy_(_header(message).view(torch.uint8))
            for tensor, place in zip(message.tensors, _places(buffer, message.tensors), strict=True):
                if tensor is not None and place is not None:
                    place.copy_(tensor)
            self._put(buffer)

    def _grow(self, size: int) -> None:
        header = torch.zeros(HEADER, dtype=torch.int64, device="cpu")
        if not self._out_size:  # the first message of all: the receiver knows no size yet
            header[0], header[1] = Kind.GROW, size
            self._put(header.to(self._device).view(torch.uint8)).wait(self._ranks.timeout)
        else:
            self._announce(Kind.GROW, self._queue + 1, size)
        self._outgoing = deque((self._buffer(size), None) for _ in range(self._queue))
        self._out_size = size

    def _announce(self, kind: Kind, asked: int, size: int = 0) -> None:
        """Answer all that the receiver has ``asked`` for, and wait until it knows."""
        for _ in range(asked):
            buffer = self._free()
            buffer[: HEADER * 8].view(torch.int64)[:2].copy_(torch.tensor([kind, size], device="cpu"))
            self._put(buffer)
        for _, work in self._outgoing:
            if work is not None:
                work.wait(self._ranks.timeout)

    def _free(self) -> Tensor:
        buffer, work = self._outgoing.popleft()
        if work is not None:
            work.wait(self._ranks.timeout)
        return buffer

    def _put(self, buffer: Tensor) -> dist.Work:
        assert self._after is not None
        work = dist.isend(buffer, self._after, group=self._ranks.modules.group, tag=self._tag)
        assert work is not None
        self._outgoing.append((buffer, work))
        self.sent += buffer.nbytes
        return work

    # Receiving

    def receive(self, kind: Kind) -> Message:
        """The next message, which must be for ``kind``; it is valid until the next call.

        Raises:
            ValueError: the process before this one did something else.
            RankLost: it is gone, or has closed its end.
        """
        with self._ranks.waiting():
            if not self._in_size:
                first = self._ask(torch.empty(HEADER * 8, dtype=torch.uint8, device=self._device))
                first.wait(self._ranks.timeout)
                self._make_room(int(self._incoming.pop()[0].view(torch.int64)[1]))
            while True:
                self._ask(self._read)
                self._read, work = self._incoming.popleft()
                work.wait(self._ranks.timeout)
                message, size = _opened(self._read)
                if message is not None:
                    break
                if not size:
                    raise RankLost("the process before this one along 'modules' has closed its trainer.")
                self._drain()
                self._make_room(size)
        if message.kind != kind:
            did, does = (one.name.lower() for one in (message.kind, kind))
            raise ValueError(f"the process before this one along 'modules' called {did}, and this one calls {does}.")
        return message

    def _ask(self, buffer: Tensor) -> dist.Work:
        assert self._before is not None
        work = dist.irecv(buffer, self._before, group=self._ranks.modules.group, tag=self._tag)
        assert work is not None
        self._incoming.append((buffer, work))
        return work

    def _make_room(self, size: int) -> None:
        self._in_size, self._read = size, self._buffer(size)
        for _ in range(self._queue):
            self._ask(self._buffer(size))

    def _drain(self) -> None:
        while self._incoming:
            self._incoming.popleft()[1].wait(self._ranks.timeout)

    def _buffer(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.uint8, device=self._device)

    def close(self) -> None:
        """No more messages: leave nothing under way. Every process of the mesh must call it."""
        with self._ranks.waiting():
            if self._in_size:
                self._drain()
                self._in_size = 0
            if self._out_size:
                self._announce(Kind.END, self._queue)
                self._out_size = 0
                self._outgoing.clear()


def assign(costs: Sequence[float], processes: int) -> list[range]:
    """Consecutive modules for each of ``processes``, such that the most that one has to do is least (dynamic programming).

    Args:
        costs: of each module; there are at least as many as processes.
    """
    # best[j]: the cheapest way to give modules[:j] to the processes so far (its largest cost, for ties the sum of squares).
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [0])}
    for _ in range(processes):
        grown: dict[int, tuple[float, float, list[int]]] = {}
        for i, (largest, squares, edges) in best.items():
            own = 0.0
            for j in range(i + 1, len(costs) + 1):
                own += costs[j - 1]
                candidate = (max(largest, own), squares + own**2, [*edges, j])
                grown[j] = min(grown.get(j, candidate), candidate)
        best = grown
    return [range(start, stop) for start, stop in pairwise(best[len(costs)][2])]


# Messages and buffers


def _layout(tensors: Sequence[Tensor | None]) -> tuple[list[int], int]:
    """Where in a buffer each tensor begins, and where the last ends, in bytes."""
    starts, end = [], HEADER * 8
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT if tensor is not None else 0
    return starts, end


def _order(tensor: Tensor) -> list[int]:
    """The dimensions as they lie in memory, or in their own order where that leaves gaps."""
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return order if tensor.permute(order).is_contiguous() else list(range(tensor.ndim))


def _header(message: Message) -> Tensor:
    numbers: list[int] = [message.kind, 0, message.seed or 0, message.samples]
    for tensor in message.tensors:
        about = [] if tensor is None else [_TYPES.index(tensor.dtype) + 1, tensor.ndim]
        if tensor is not None:
            gap = [0] * (_LONGEST_SHAPE - tensor.ndim)
            about += [*tensor.shape, *gap, *_order(tensor), *gap]
        numbers += about or [0] * _PER_TENSOR
    return torch.tensor(numbers + [0] * (HEADER - len(numbers)), dtype=torch.int64, device="cpu")


def _places(buffer: Tensor, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The place of each tensor in ``buffer``."""
    starts, _ = _layout(tensors)
    return [
        None if tensor is None else _view(buffer, start, tensor.dtype, list(tensor.shape), _order(tensor))
        for start, tensor in zip(starts, tensors, strict=True)
    ]


def _view(buffer: Tensor, start: int, dtype: torch.dtype, shape: list[int], order: list[int]) -> Tensor:
    lying = [shape[d] for d in order]
    nbytes = torch.Size(lying).numel() * dtype.itemsize
    stretch = buffer[start : start + nbytes].view(dtype).view(lying)
    return stretch.permute([order.index(d) for d in range(len(order))])


def _opened(buffer: Tensor) -> tuple[Message | None, int]:
    """The message in ``buffer``; None, and the size of the next buffers (0 if there are none), if it is about those."""
    kind, size, seed, samples, *about = buffer[: HEADER * 8].view(torch.int64).tolist()
    if kind in (Kind.GROW, Kind.END):
        return None, size
    tensors: list[Tensor | None] = []
    start = HEADER * 8
    for entry in (about[i * _PER_TENSOR : (i + 1) * _PER_TENSOR] for i in range(3)):
        if not entry[0]:
            tensors.append(None)
            continue
        ndim = entry[1]
        shape, order = entry[2 : 2 + ndim], entry[2 + _LONGEST_SHAPE : 2 + _LONGEST_SHAPE + ndim]
        tensors.append(_view(buffer, start, _TYPES[entry[0] - 1], shape, order))
        start = _layout([*tensors])[1]
    x, images, labels = tensors
    assert x is not None
    return Message(Kind(kind), x, images, labels, seed, samples), 0
