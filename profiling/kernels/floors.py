"""The least time each fused op can take on a card: bytes, matrix products or exponentials, whichever needs longest.

Computed, not measured, from round figures of the cards; needs no card.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlocal.flops import count
from fastlocal.profiling import results
from fastlocal.profiling.kernels.compile_report import Measurement
from fastlocal.profiling.kernels.workloads import OURS, Problem, Workload, workloads

BATCH = 64
DTYPE = torch.bfloat16
TILE = 64  # tokens: rows and columns of a tile of scores


@dataclass(frozen=True)
class Card:
    """Per second, round figures, unmeasured; exponentials: 16 per clock and multiprocessor (CUDA C Programming Guide,
    arithmetic instructions) at the boost clock."""

    name: str
    architecture: str  # in the compile report
    memory_bytes: float
    products: float  # FLOP of 16-bit products summed in float32, without sparsity
    exponentials: float


CARDS = (
    Card("H100 SXM", "sm_90", 3.35e12, 989e12, 16 * 132 * 1.83e9),
    Card("RTX 4060", "sm_89", 272e9, 30.2e12, 16 * 24 * 2.46e9),
    Card("RTX 3060", "sm_86", 360e9, 25.5e12, 16 * 28 * 1.78e9),
)


@dataclass(frozen=True)
class Work:
    """What one direction of one op cannot do without."""

    memory_bytes: int
    products: float  # FLOP, with tokens filled up to whole tiles
    exponentials: float

    def microseconds(self, card: Card) -> tuple[float, str]:
        """The floor on ``card``, and what sets it."""
        times = {
            "bytes": self.memory_bytes / card.memory_bytes,
            "products": self.products / card.products,
            "exponentials": self.exponentials / card.exponentials,
        }
        limit = max(times, key=times.__getitem__)
        return times[limit] * 1e6, limit


def floors() -> list[dict[str, Any]]:
    """One row for each workload and direction."""
    rows = []
    for workload in workloads():
        with FakeTensorMode():
            problem = workload.problem(BATCH, DTYPE, torch.device("cpu"))
            for direction, work in _work(workload, problem).items():
                row: dict[str, Any] = {"op": workload.op, "shape": workload.shape, "direction": direction}
                row |= {"MiB": work.memory_bytes / 2**20, "GFLOP": work.products / 1e9}
                for card in CARDS:
                    microseconds, limit = work.microseconds(card)
                    row[f"{card.name}, µs"] = f"{microseconds:,.0f} ({limit})"
                rows.append(row)
    return rows


def _work(workload: Workload, problem: Problem) -> dict[str, Work]:
    provider = problem.providers[OURS]
    forward = count(provider.run)
    out = provider.run()
    backward = count(lambda: torch.autograd.grad(out, provider.leaves, torch.empty_like(out)))
    scores, padding = _scores(workload.op, problem)
    return {
        "forward": Work(problem.forward_bytes, forward * padding, scores),
        "backward": Work(problem.backward_bytes, backward * padding, scores),
    }


def _scores(op: str, problem: Problem) -> tuple[float, float]:
    """How many scores whole tiles have, each needing an exponential, and that over the scores there are."""
    shape = problem.providers[OURS].leaves[0].shape
    if op == "window_attention":  # qkv [B, H, W, 3C] and a table of (2w − 1)² entries for each head
        entries, heads = problem.providers[OURS].leaves[1].shape
        tokens = ((math.isqrt(entries) + 1) // 2) ** 2
        groups = math.prod(shape[:3]) // tokens * heads
    elif op == "attention":  # q [B, heads, N, D]
        tokens, groups = shape[2], math.prod(shape[:2])
    else:
        return 0.0, 1.0
    filled = -(-tokens // TILE) * TILE
    return float(groups * filled**2), (filled / tokens) ** 2


# What each workload runs, as the compile report names it. Between Swin's stages only the number of heads differs, a stride.
_LOSSES = {
    "Swin-T stage 1": "4 x 4 x 3",
    "Swin-T stage 2": "2 x 2 x 96",
    "Swin-T stage 3": "2 x 2 x 192",
    "Swin-T stage 4": "2 x 2 x 384",
    "ViT-B/16": "1 x 1 x 768",
}
_PAIRS = {"EVA-02-B/14": "neighbours", "DINOv3-B/16": "halves"}


def kernel(op: str, shape: str, direction: str) -> str:
    """The compile report's name of the kernel that a row of `floors` is the floor of."""
    if op == "window_attention":
        geometry = "shift 0, 24 heads" if shape.endswith("4") else "shift 3, 3 heads"
        return f"window_attention {direction}, window 7, {geometry} of 32, bfloat16"
    if op == "attention":
        name = "forward" if direction == "forward" else "d_k and d_v"  # the longer of two
        return f"attention {name}, head dimension 64, bfloat16"
    if op == "rotary_embedding":
        name, pairs = "forward" if direction == "forward" else "gradient", _PAIRS[shape]
        return f"rotary_embedding {name}, pairs of {pairs}, head dimension 64, bfloat16"
    return f"reconstruction_loss {'loss' if direction == 'forward' else 'gradient'}, mse, {_LOSSES[shape]}, bfloat16"


def with_resources(rows: list[dict[str, Any]], measurements: list[Measurement]) -> list[dict[str, Any]]:
    """The rows, each card's floor beside its kernel's registers, shared KiB and occupancy where they have been measured."""
    found = {(m.case, m.architecture): m for m in measurements if m.error is None}
    for row in rows:
        for card in CARDS:
            m = found.get((kernel(row["op"], row["shape"], row["direction"]), card.architecture))
            if m is not None:
                row[f"{card.name}, µs"] += f" · {m.registers} · {m.shared_bytes // 1024} · {m.occupancy:.0%}"
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, and what the numbers are."""
    legend = (
        f"Batch {BATCH}, bfloat16. Computed, not measured: the longest of compulsory bytes, matrix products (tokens "
        f"filled up to tiles of {TILE}) and exponentials at the cards' nominal rates; what sets it in brackets. After it "
        "the kernel's registers, shared KiB and estimated occupancy on that card, from the compile report."
    )
    return f"{results.markdown_table(rows)}\n\n{legend}"
