"""What several devices would gain: a model of a step's time and of what is sent, from the costs of its modules. Nothing is run.

One device takes ``seconds`` for all modules. On N devices, with links of ``bandwidth`` bytes a second each way:

    modules   the slowest device: its modules' compute, or what it sends on, whichever takes longer (they overlap)
    data      1/N of the compute; a ring sums the gradients, 2 (N − 1)/N of their bytes, hidden but for the last module's
    both      rows × columns of the two
    pipeline  exact gradients, 1F1B or GPipe: compute/N · (M + N − 1)/M with M parts: a bubble of (N − 1)/(M + N − 1)

A pipeline's stages send boundaries and their gradients, parts of them at a time; the slower of compute and link counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fastlocal.distributed.module_parallel import ALIGNMENT, HEADER, assign

PARTS = 8  # of a batch, in a pipeline with exact gradients
Way = Literal["modules", "data", "both", "pipeline"]


@dataclass(frozen=True)
class ModuleCost:
    """A module, as far as sharing it out goes.

    Attributes:
        seconds: of its forward, backward and update on a whole batch, on one device.
        sent: bytes of each tensor that is sent on after it for a whole batch: features, images if a later module reads
            them, labels.
        weights: bytes of its gradients.
    """

    seconds: float
    sent: tuple[float, ...]
    weights: float

    def message(self, rows: int = 1) -> float:
        """Bytes of the message that carries a device's share of ``sent``, one of ``rows`` alike."""
        return 8 * HEADER + sum(-(-size / rows // ALIGNMENT) * ALIGNMENT for size in self.sent)


@dataclass(frozen=True)
class Scaling:
    """What a way of sharing comes to.

    Attributes:
        grid: devices along "data" and along "modules".
        spans: modules of each device along "modules".
        seconds: of a step, once the pipeline is full.
        speed_up: over one device.
        balance: mean over largest compute of the devices; 1 is even.
        bytes_sent: by the device that sends most, per step.
    """

    way: Way
    grid: tuple[int, int]
    spans: tuple[range, ...]
    seconds: float
    speed_up: float
    balance: float
    bytes_sent: float


def scaling(
    modules: Sequence[ModuleCost], devices: int, bandwidth: float, *, parts: int = PARTS, alone: float | None = None
) -> list[Scaling]:
    """Each way of sharing ``modules`` over ``devices``, the fastest local one first, and a pipeline with exact gradients.

    Args:
        bandwidth: of a link, bytes/s each way.
        parts: of a batch, in the pipeline with exact gradients.
        alone: seconds of an exact step on one device, which the pipeline shares out and speed-ups are over, if it is not
            as long as the local one.

    Raises:
        ValueError: fewer than 1 device, or a bandwidth that is not positive.
    """
    if devices < 1 or not bandwidth > 0:
        raise ValueError(f"devices must be at least 1 and bandwidth positive, got {devices} and {bandwidth}.")
    alone = sum(module.seconds for module in modules) if alone is None else alone
    columns = [n for n in range(1, min(devices, len(modules)) + 1) if devices % n == 0]
    found = sorted((_shared(modules, devices // n, n, bandwidth, alone) for n in columns), key=lambda one: one.seconds)
    if 1 < devices <= len(modules):
        found.append(_pipeline(modules, devices, bandwidth, parts, alone))
    return found


def _shared(modules: Sequence[ModuleCost], rows: int, columns: int, bandwidth: float, alone: float) -> Scaling:
    spans = assign([module.seconds for module in modules], columns)
    compute = [sum(modules[k].seconds for k in span) / rows for span in spans]
    ring = 2 * (rows - 1) / rows
    seconds = most = 0.0
    for span, own in zip(spans, compute, strict=True):
        passed_on = modules[span[-1]].message(rows) if span.stop < len(modules) else 0.0
        sent = ring * sum(modules[k].weights for k in span) + passed_on
        exposed = ring * modules[span[-1]].weights / bandwidth  # the last gradients have nothing to hide behind
        seconds, most = max(seconds, own + exposed, sent / bandwidth), max(most, sent)
    way: Way = "data" if columns == 1 else "modules" if rows == 1 else "both"
    balance = sum(compute) / len(compute) / max(compute)
    return Scaling(way, (rows, columns), tuple(spans), seconds, alone / seconds, balance, most)


def _pipeline(modules: Sequence[ModuleCost], devices: int, bandwidth: float, parts: int, alone: float) -> Scaling:
    spans = assign([module.seconds for module in modules], devices)
    share = alone / sum(module.seconds for module in modules)
    compute = [share * sum(modules[k].seconds for k in span) for span in spans]
    links = [modules[span[-1]].sent[0] for span in spans[:-1]]  # features one way, as much in gradients the other
    slowest = max(max(compute), max(links) / bandwidth) / parts
    seconds = slowest * (parts + devices - 1)
    balance = sum(compute) / len(compute) / max(compute)
    return Scaling("pipeline", (1, devices), tuple(spans), seconds, alone / seconds, balance, max(links))
