"""The processes of a run: torchrun starts them, each runs the same command, the first reads, writes and reports for all.

        process 0       ▶ batch ▶ step ▶ … ▶ save ▶        reads checkpoints, owns the run folder, prints
        other ones      ▶ go?   ▶ step ▶ … ▶ give ▶        are told whether to go on, give what they trained to be saved

Along "data" all read their share of each batch. Along "modules" only the first reads; the others follow it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fastlocal.distributed import Ranks
from fastlocal.train.config import TrainConfig
from fastlocal.train.errors import UserError
from fastlocal.train.options.values import flag
from fastlocal.train.report import Report
from fastlocal.train.signals import StopRequest
from fastlocal.train.watch import GRACE, JOIN, ending_after, joined_store, watched

T = TypeVar("T")

# What may differ from process to process, as machines do.
OWN = {
    *("data_dir", "workers", "device", "kernels", "micro_batch", "recompute", "residency", "boundaries", "weights")
} | {*("prefetch", "log_interval", "download")}


def processes() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first_process() -> bool:
    """Whether this is the process that reads, writes and reports."""
    return os.environ.get("RANK", "0") == "0"


def to_resume(config: TrainConfig) -> Path | None:
    """The run that this command continues because torchrun has started it again (``--max-restarts``), if there is one.

    Raises:
        UserError: it could not be found again.
    """
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) == 0:
        return None
    name = config.reports.experiment
    if not name:
        raise UserError(
            "--max-restarts of torchrun needs --experiment NAME, by which a run that is started again is found."
        )
    path = Path(config.reports.output) / name
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return path if again and (path / "last.pt").exists() else None


@contextlib.contextmanager
def joined(config: TrainConfig) -> Iterator[Crew]:
    """Join the other processes of the run.

    Raises:
        UserError: their number or their options do not fit.
    """
    count, options = processes(), config.devices
    if count == 1:
        yield Crew(None, Ranks())
        return
    rows = options.data_parallel if options.parallel == "modules" else count
    if count % rows:
        raise UserError(f"--data-parallel {rows} does not divide the {count} processes that torchrun started.")
    card = config.memory.device != "cpu" and torch.cuda.is_available()
    timeout = timedelta(seconds=options.timeout)
    with contextlib.ExitStack() as watch:
        rank = int(os.environ.get("RANK", "0"))
        with Ranks(timeout=JOIN).waiting(), ending_after(JOIN + GRACE):
            store = joined_store(rank)
            watch.enter_context(watched(store, rank, count, options.timeout))
        with Ranks(timeout=options.timeout).waiting():
            store.set_timeout(timeout)
            backend = "cpu:gloo,cuda:nccl" if card else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timeout)
            shape = (rows, count // rows)
            mesh = init_device_mesh("cuda" if card else "cpu", shape, mesh_dim_names=("data", "modules"))
        crew = Crew(mesh, Ranks(mesh, options.timeout))
        theirs = {flag(name): value for name, value in config.to_dict().items() if name not in OWN}
        crew.ranks.check_same(theirs)
        yield crew
        dist.destroy_process_group()  # not after an error: others may be gone, and it would wait for them


class Crew:
    """The processes of a run, or one alone."""

    def __init__(self, mesh: DeviceMesh | None, ranks: Ranks) -> None:
        self.mesh, self.ranks = mesh, ranks
        self.alone = mesh is None
        self.failure: Exception | None = None  # why this process could not read on

    @property
    def first(self) -> bool:
        return self.ranks.first

    @property
    def reads(self) -> bool:
        """Whether this process is given batches, and not features by another one."""
        return self.ranks.modules.rank == 0

    @property
    def share(self) -> tuple[int, int]:
        """Which part of each batch this process has: number and count."""
        return self.ranks.data.rank, self.ranks.data.size

    def until(self, stop: StopRequest, items: Iterable[T], count: int) -> Iterator[T]:
        """``items``, of which there are ``count``, until a process that reads is stopped or cannot read on: then none does."""
        if self.alone:
            yield from stop.until(items)
            return
        own = stop.until(items) if self.reads else iter(items)
        for _ in range(count):
            item = None
            try:
                item = next(own, None)
            except Exception as error:
                self.failure = error
            if not self.ranks.go_on(item is not None) or item is None:
                return
            yield item

    def check_batch(self, size: int) -> None:
        """Refuse batches of ``size`` that are too small to be split.

        Raises:
            UserError: there are not two images for each process.
        """
        rows = self.ranks.data.size
        if rows > 1 and size < 2 * rows:
            raise UserError(f"a batch of {size} images is too small for {rows} processes: each needs at least two.")

    def totals(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the modules of all processes, of sums that each process has of its own modules, and ``samples``."""
        if self.alone or not ours:
            return dict(ours)
        first_row = self.ranks.data.rank == 0
        counted = {name: self.first if name == "samples" else first_row for name in ours}
        return {
            name: self.ranks.sum(total if counted[name] else torch.zeros_like(total)) for name, total in ours.items()
        }

    def described(self, spans: Sequence[range]) -> str:
        """The processes in one line, given the modules of each along "modules"."""
        rows = self.ranks.data.size
        parts = [f"each batch split over {rows}"] if rows > 1 else []
        if len(spans) > 1:
            parts.append("modules " + " | ".join(f"{span.start + 1}–{span.stop}" for span in spans))
        return f"{rows * len(spans)} processes: {', '.join(parts)}"

    def done_by_first(self, action: Callable[[], T]) -> T | None:
        """Let the first process do something before the others go on."""
        result = action() if self.first else None
        self.ranks.broadcast(None)
        return result


class Silence:
    """The report of a process that leaves reporting to the first; see `report.Report`."""

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def step(self, *_: Any) -> None:
        pass

    def epoch(self, *_: Any) -> None:
        pass

    def validating(self, batches: Iterator[T], total: int) -> Iterator[T]:
        return batches


AnyReport = Report | Silence
