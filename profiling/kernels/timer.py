"""Time variants of the same work against each other: launch by launch in turn, so that a clock that drifts, a card that
warms up or a neighbour that wakes slows all of them alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

WARM_UP, ROUNDS = 5, 50

Milliseconds = Callable[[Sequence[Callable[[], Any]]], list[float]]  # one time for each function, run in this order


class Quantiles(NamedTuple):
    """Of the times of one variant, in milliseconds."""

    p20: float
    p50: float
    p80: float


def interleaved(variants: Mapping[str, Callable[[], Any]], milliseconds: Milliseconds) -> dict[str, Quantiles]:
    """Run every variant once a round, each round starting with another one, and take the quantiles of all rounds."""
    names = list(variants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(WARM_UP + ROUNDS):
        order = names[i % len(names) :] + names[: i % len(names)]
        for name, taken in zip(order, milliseconds([variants[name] for name in order]), strict=True):
            if i >= WARM_UP:
                times[name].append(taken)
    return {name: _quantiles(taken) for name, taken in times.items()}


def _quantiles(times: list[float]) -> Quantiles:
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return Quantiles(fifths[0], statistics.median(times), fifths[3])


def differ(one: Quantiles, other: Quantiles) -> bool:
    """Whether two variants' medians lie further apart than either one's times spread: what a claim needs."""
    return abs(one.p50 - other.p50) > max(one.p80 - one.p20, other.p80 - other.p20)


def cuda_milliseconds(before: Callable[[], Any]) -> Milliseconds:
    """A clock of CUDA events. ``before`` runs untimed ahead of each function: it should move more than three times the
    L2 cache, so that inputs come from memory as in training, and last longer than a launch, so that the card never
    waits for the processor and small kernels are timed without their launch."""
    import torch

    def milliseconds(functions: Sequence[Callable[[], Any]]) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in functions]
        for function, (start, end) in zip(functions, events, strict=True):
            before()
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    return milliseconds
