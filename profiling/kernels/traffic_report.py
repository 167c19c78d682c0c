"""The traffic report: bytes each fused op moves, against the minimum and against the ops it replaces; needs no GPU.

Triton's interpreter is slow, so our kernels are counted at small sizes and extended to the real one. What they move is
a fixed part, a part for each image, and a part for each piece that an op cuts its work into to fill a card (slices of
windows, tiles of the reconstruction): three counts give the three parts, and a test proves with a fourth that there
are no others. The unfused ops are counted at the real batch on fake tensors.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlocal.kernels import use_kernels
from fastlocal.profiling import results
from fastlocal.profiling.kernels.traffic import CountTraffic, CudaAutocastPolicy, Traffic
from fastlocal.profiling.kernels.workloads import OURS, UNFUSED, Problem, Workload, workloads

BATCH = 64
MULTIPROCESSORS = 132  # of the card whose number of pieces is counted, an H100; smaller cards make fewer
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

    def row(self) -> dict[str, Any]:
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
    comparisons = []
    for i, workload in enumerate(chosen, start=1):
        print(
            f"{i}/{len(chosen)} {workload.name}", end="", file=sys.stderr, flush=True
        )  # the interpreter takes minutes
        found = _compare(workload)
        ratios = ", ".join(f"{c.direction} {c.distinct_ratio:.2f} × compulsory" for c in found)
        print(f": {ratios}", file=sys.stderr, flush=True)
        comparisons += found
    return comparisons


def _compare(workload: Workload) -> list[Comparison]:
    ours = extended(lambda batch, pieces: count_ours(workload, batch, pieces))
    with FakeTensorMode():
        problem = workload.problem(BATCH, DTYPE, CPU)
        unfused = {direction: found.traffic for direction, found in count(problem, UNFUSED).items()}
    minimum = {"forward": problem.forward_bytes, "backward": problem.backward_bytes}
    return [
        Comparison(
            workload.op, workload.shape, direction, minimum[direction], ours[direction], unfused[direction].every
        )
        for direction in minimum
    ]


@dataclass(frozen=True)
class Count:
    """What one direction moved, and into how many pieces a card would cut it at batch `BATCH`."""

    traffic: Traffic
    pieces_on_card: int = 1


def count_ours(workload: Workload, batch: int, pieces: int) -> dict[str, Count]:
    """What our op moves at a small batch and number of pieces, kernels interpreted, by direction."""
    torch.manual_seed(0)
    with use_kernels("triton"), _as_on_a_card(batch, pieces) as pieces_on_card:
        return count(workload.problem(batch, DTYPE, CPU), OURS, pieces_on_card)


def count(problem: Problem, provider: str, pieces_on_card: list[int] | None = None) -> dict[str, Count]:
    """What one provider moves, by direction; the gradient that starts the backward is not its work."""
    pieces_on_card = [1] if pieces_on_card is None else pieces_on_card
    implementation = problem.providers[provider]
    with CudaAutocastPolicy(), CountTraffic() as counter:
        out = implementation.run()
    forward = Count(counter.total, pieces_on_card[-1])
    d_out = torch.randn_like(out)
    with CountTraffic() as counter:
        torch.autograd.grad(out, implementation.leaves, d_out)
    return {"forward": forward, "backward": Count(counter.total, pieces_on_card[-1])}


def extended(count_at: Callable[[int, int], dict[str, Count]]) -> dict[str, Traffic]:
    """Traffic at batch `BATCH` on a card, from three counts: ``count_at(batch, pieces)``."""
    base, larger, cut = count_at(1, 1), count_at(2, 1), count_at(2, 2)
    return {
        direction: extend(base[direction].traffic, larger[direction].traffic, cut[direction].traffic, BATCH, pieces)
        for direction, pieces in ((direction, cut[direction].pieces_on_card) for direction in base)
    }


def extend(base: Traffic, larger: Traffic, cut: Traffic, batch: int, pieces: int) -> Traffic:
    """Traffic at ``batch`` and ``pieces``, from that at (1, 1), (2, 1) and (2, 2)."""

    def value(name: str) -> int:
        one, two, two_in_pieces = (getattr(traffic, name) for traffic in (base, larger, cut))
        return one + (two - one) * (batch - 1) + (two_in_pieces - two) * (pieces - 1)

    return Traffic(*(value(field.name) for field in fields(Traffic)))


@contextmanager
def _as_on_a_card(batch: int, pieces: int) -> Iterator[list[int]]:
    """Run launchers as on a card, but cut into ``pieces``; yields what a card would have cut the real batch into."""
    window_attention: Any = importlib.import_module("fastlocal.kernels.window_attention_triton")
    reconstruction_loss: Any = importlib.import_module("fastlocal.kernels.reconstruction_loss")
    slices, tiles = window_attention._slices, reconstruction_loss._tiles
    on_card = [1]

    def cut_windows(device: torch.device, windows: int, *geometry: int) -> int:
        on_card.append(slices(torch.device("cuda"), windows * BATCH // batch, *geometry))
        return min(pieces, windows)

    def tile_tokens(outputs: int, channels: int, device: torch.device) -> int:
        elements = reconstruction_loss.TILE_ELEMENTS_PER_MULTIPROCESSOR * MULTIPROCESSORS
        return max(1, elements // max(outputs, channels))

    def cut_samples(hidden: Tensor, outputs: int) -> Iterator[tuple[slice, ...]]:
        real = torch.empty((BATCH, *hidden.shape[1:]), device="meta")
        on_card.append(len(list(tiles(real, outputs))))
        size = -(-len(hidden) // pieces)
        return ((slice(i, i + size), slice(None), slice(None)) for i in range(0, len(hidden), size))

    def add_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
        return reconstruction_loss._add(total, _mm_float32(left.t(), right))

    with (
        patch.object(window_attention, "_slices", cut_windows),
        patch.object(window_attention, "_processors", lambda device: MULTIPROCESSORS),
        patch.object(reconstruction_loss, "_tiles", cut_samples),
        patch.object(reconstruction_loss, "_tile_tokens", tile_tokens),
        patch.object(reconstruction_loss, "_add_product", add_product),
    ):
        yield on_card


@torch.library.custom_op("fastlocal_profiling::mm_float32", mutates_args=())
def _mm_float32(left: Tensor, right: Tensor) -> Tensor:
    """What ``torch.mm(left, right, out_dtype=torch.float32)`` is on CUDA; the CPU has to cast its inputs first."""
    return left.float() @ right.float()


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of comparisons as Markdown, and what the columns mean."""
    legend = (
        f"Batch {BATCH}, two-byte elements (bfloat16, float16). *Compulsory*: inputs read once, outputs written once; "
        "a backward reads the inputs again. *Ours*: each 32-byte sector once per kernel launch and direction; loads "
        "that other programs of the same launch repeat (keys and values in every block of queries, the bias table in "
        "every window) are hits in a card's L2 cache; *every access* counts those too. *Workspace*: the part of ours "
        "in tensors that live inside the op only, in reconstruction_loss tiles sized to stay in the L2 cache. "
        "*Unfused*: timm's or PyTorch's eager ops under CUDA's autocast rules, inputs read once, outputs written once. "
        f"Targets: ours at most {TARGETS['forward']:.2f} × compulsory forward, {TARGETS['backward']:.2f} × backward."
    )
    return f"{results.markdown_table(rows)}\n\n{legend}"
