"""The traffic report: bytes each fused op moves, against the minimum and against the ops it replaces; needs no GPU.

Triton's interpreter is slow, so our kernels are counted at two small batches and extended to the real one: what they move
is a fixed part plus a part proportional to the batch (a test counts a third batch to prove it). The unfused ops are counted
at the real batch on fake tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlocal.kernels import use_kernels
from fastlocal.profiling import results
from fastlocal.profiling.traffic import CountTraffic, CudaAutocastPolicy, Traffic
from fastlocal.profiling.workloads import OURS, UNFUSED, Problem, Workload, workloads

BATCH = 64
COUNTED_BATCHES = (1, 2)
DTYPE = torch.bfloat16  # float16 moves the same bytes
TARGETS = {"forward": 1.10, "backward": 1.25}  # distinct bytes, of the compulsory ones
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Comparison:
    """One direction of one op at batch `BATCH`, all in bytes."""

    op: str
    shape: str
    direction: str
    compulsory: int
    ours: Traffic
    unfused: int

    @property
    def distinct_ratio(self) -> float:
        return self.ours.distinct / self.compulsory

    @property
    def within_target(self) -> bool:
        return self.distinct_ratio <= TARGETS[self.direction]

    def row(self) -> dict[str, str | int | float | bool]:
        mebi = 2**20
        return {
            "op": self.op,
            "shape": self.shape,
            "direction": self.direction,
            "compulsory MiB": self.compulsory / mebi,
            "ours MiB": self.ours.distinct / mebi,
            "ours / compulsory": self.distinct_ratio,
            "of it workspace MiB": self.ours.workspace / mebi,
            "every access / compulsory": self.ours.every / self.compulsory,
            "unfused MiB": self.unfused / mebi,
            "unfused / ours": self.unfused / self.ours.distinct,
            "within target": self.within_target,
        }


def traffic_report(only: str = "") -> list[Comparison]:
    """Compare every workload whose name contains ``only``. Triton must be in its interpreter.

    Raises:
        ValueError: no workload matches ``only``.
    """
    chosen = [workload for workload in workloads() if only in workload.name]
    if not chosen:
        raise ValueError(f"no workload has {only!r} in its name; there are: {', '.join(w.name for w in workloads())}.")
    return [comparison for workload in chosen for comparison in _compare(workload)]


def _compare(workload: Workload) -> list[Comparison]:
    ours = extended(lambda batch: count_ours(workload, batch), COUNTED_BATCHES, BATCH)
    with FakeTensorMode():
        problem = workload.problem(BATCH, DTYPE, CPU)
        unfused = count(problem, UNFUSED)
    minimum = {"forward": problem.forward_bytes, "backward": problem.backward_bytes}
    return [
        Comparison(
            workload.op, workload.shape, direction, minimum[direction], ours[direction], unfused[direction].every
        )
        for direction in minimum
    ]


def count_ours(workload: Workload, batch: int) -> dict[str, Traffic]:
    """What our op moves at a small batch, kernels interpreted, by direction."""
    torch.manual_seed(0)
    with use_kernels("triton"):
        return count(workload.problem(batch, DTYPE, CPU), OURS)


def count(problem: Problem, provider: str) -> dict[str, Traffic]:
    """What one provider moves, by direction; the gradient that starts the backward is not its work."""
    run = problem.providers[provider].run
    with CudaAutocastPolicy(), CountTraffic() as forward:
        out = run()
    d_out = torch.randn_like(out)
    with CountTraffic() as backward:
        out.backward(d_out)
    return {"forward": forward.total, "backward": backward.total}


def extended(count_at: Callable[[int], dict[str, Traffic]], counted: tuple[int, int], batch: int) -> dict[str, Traffic]:
    """Extend what is counted at two batches along the line through them."""
    small, large = counted
    first, second = count_at(small), count_at(large)

    def line(name: str, direction: str) -> int:
        a, b = getattr(first[direction], name), getattr(second[direction], name)
        return a + (b - a) * (batch - small) // (large - small)

    return {direction: Traffic(*(line(field.name, direction) for field in fields(Traffic))) for direction in first}


def table(comparisons: list[Comparison]) -> str:
    """The comparisons as Markdown, and what the columns mean."""
    legend = (
        f"Batch {BATCH}, two-byte elements (bfloat16 or float16). *Compulsory*: inputs read once, outputs written once; "
        "a backward reads the inputs again. *Ours*: each 32-byte sector once per kernel launch and direction; loads that "
        "other programs of the same launch repeat (keys and values in every block of queries, the bias table in every "
        "window) are hits in a card's L2 cache, and *every access* counts them too. *Unfused*: timm's or PyTorch's eager "
        "ops under CUDA's autocast rules, each reading its inputs and writing its outputs once. Targets: ours at most "
        f"{TARGETS['forward']:.2f} × compulsory forward, {TARGETS['backward']:.2f} × backward."
    )
    return f"{results.markdown_table([comparison.row() for comparison in comparisons])}\n\n{legend}"
