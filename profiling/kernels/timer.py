"""Time variants of the same work against each other: launch by launch in turn, so that a clock that drifts, a card that
warms up or a neighbour that wakes slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

WARM_UP, ROUNDS = 5, 50
MOST_TIMES = 16  # that a function is preceded by what hides its launch

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
    L2 cache, so that inputs come from memory as in training. Where it does not last until the function is launched, it runs
    twice as often the next time: the card must never wait for the processor, or the launches are timed, not the work."""
    import torch

    times: dict[Callable[[], Any], int] = {}

    def milliseconds(functions: Sequence[Callable[[], Any]]) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(3)] for _ in functions]
        launched = []
        for function, (ahead, start, end) in zip(functions, events, strict=True):
            ahead.record()
            for _ in range(times.setdefault(function, 1)):
                before()
            start.record()
            begun = time.perf_counter()
            function()
            launched.append(1e3 * (time.perf_counter() - begun))
            end.record()
        torch.cuda.synchronize()
        for function, (ahead, start, _), launch in zip(functions, events, launched, strict=True):
            if launch > ahead.elapsed_time(start):
                times[function] = min(2 * times[function], MOST_TIMES)
        return [start.elapsed_time(end) for _, start, end in events]

    return milliseconds
