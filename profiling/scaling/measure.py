"""What each process of ``fastlocal bench scaling`` runs: every way to train in turn, round after round."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

import fastlocal
from fastlocal.backbones import backbone
from fastlocal.distributed import assign
from fastlocal.distributed.data_parallel import share_of

SWIN: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 32,
    "depths": (2, 2, 2, 2),
    "num_heads": (2, 4, 8, 16),
}
# Schedules of torch.distributed.pipelining, with the stages that each process has. Those without a bubble part the backward
# of inputs from that of weights, which fails on a Swin (torch 2.14: "Failed to run stage backward input").
SCHEDULES = {"GPipe": 1, "1F1B": 1, "Interleaved1F1B": 2}
PARTS = (4, 8)  # of a batch, in the rival's pipeline
Step = Callable[[], object]


def measure(rank: int, processes: int, device: str, batch_size: int, rounds: int, steps: int, file: str) -> None:
    """Process ``rank`` of the benchmark; the first one writes what was found to ``file``."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    place = torch.device(device, rank) if device == "cuda" else torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch_size, 3, 32, 32), generator=generator, dtype=torch.uint8, device="cpu")
    labels = torch.randint(10, (batch_size,), generator=generator, device="cpu")

    cuts, rank_cuts = _balanced(images, labels, place, processes)
    share = share_of(batch_size, rank, processes)
    alone = _trainer(place, modules=cuts) if rank == 0 else None
    apart = _trainer(place, _mesh(device, 1, processes), modules=cuts, rank_cuts=rank_cuts)
    split = _trainer(place, _mesh(device, processes, 1), modules=cuts)
    exact = _trainer(place, _mesh(device, processes, 1), modules=1, objective="end-to-end")
    ways: dict[str, Step | None] = {
        "one process": (lambda: alone.step(images, labels)) if alone is not None else None,
        "modules": lambda: apart.step(images, labels),
        "data": lambda: split.step(images[share], labels[share]),
        "data, end-to-end": lambda: exact.step(images[share], labels[share]),
    }
    ways |= _rivals(rank, processes, place, images, labels, _seconds_of(rounds=1, steps=3, device=device))
    timed = _seconds_of(rounds=rounds, steps=steps, device=device)
    rates = {name: [batch_size / seconds for seconds in values] for name, values in timed(ways).items()}
    apart.close()
    if rank == 0:
        about = f"blocks cut at {cuts}, modules of the processes at {rank_cuts}"
        Path(file).write_text(json.dumps({"images_per_second": rates, "about": about}))
    dist.destroy_process_group()


def _mesh(device: str, data: int, modules: int) -> DeviceMesh:
    return init_device_mesh(device, (data, modules), mesh_dim_names=("data", "modules"))


def _model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, **SWIN)


def _trainer(place: torch.device, mesh: DeviceMesh | None = None, **options: Any) -> fastlocal.LocalTrainer:
    return fastlocal.LocalTrainer(_model(), device=place, mesh=mesh, **{"objective": "feature", **options})


def _balanced(images: Tensor, labels: Tensor, place: torch.device, processes: int) -> tuple[list[int], list[int]]:
    """Cuts that make one module for each process, of equal time as far as blocks allow; found by the first process."""
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        trainer = _trainer(place, modules=list(range(1, 8)))
        moments: list[float] = []
        trainer.on_module_end = lambda *_: moments.append(time.perf_counter())
        seconds: list[list[float]] = []
        for _ in range(4):
            moments[:] = [time.perf_counter()]
            trainer.step(images, labels)
            seconds.append([b - a for a, b in pairwise(moments)])
        medians = [statistics.median(values) for values in zip(*seconds[1:], strict=True)]
        box = [[span.start for span in assign(medians, processes)][1:]]
    dist.broadcast_object_list(box, 0)
    return box[0], list(range(1, processes))


def _seconds_of(rounds: int, steps: int, device: str) -> Callable[[dict[str, Step | None]], dict[str, list[float]]]:
    """Times ways to train: seconds of a step in each round, on every process, by the clock of the last one that trains."""

    def timed(ways: dict[str, Step | None]) -> dict[str, list[float]]:
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        last = dist.get_world_size() - 1
        for round in range(rounds + 1):  # the first warms up
            for name, step in ways.items():
                dist.barrier()
                begun = 0.0
                for i in range(steps if step is not None else 0):
                    assert step is not None
                    step()
                    if i == 0:
                        begun = _now(device)
                own = torch.tensor([(_now(device) - begun) / (steps - 1) if step is not None else 0.0])
                dist.broadcast(own, 0 if name == "one process" else last)
                if round:
                    seconds[name].append(float(own))
        return seconds

    return timed


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _rivals(
    rank: int,
    processes: int,
    place: torch.device,
    images: Tensor,
    labels: Tensor,
    timed: Callable[[dict[str, Step | None]], dict[str, list[float]]],
) -> dict[str, Step | None]:
    """The fastest schedule of torch.distributed.pipelining here, with exact gradients of the same model and batch."""
    ways: dict[str, Step | None] = {}
    for name, stages in SCHEDULES.items():
        for parts in PARTS:
            ways[f"pipelining, {name}, {parts} parts"] = _pipelined(
                rank, processes, place, images, labels, name, stages, parts
            )
    seconds = timed(ways)
    best = min(seconds, key=lambda name: min(seconds[name]))
    return {best: ways[best]}


def _pipelined(
    rank: int, processes: int, place: torch.device, images: Tensor, labels: Tensor, name: str, stages: int, parts: int
) -> Step:
    view = backbone(_model())
    blocks = len(view.blocks)
    count = processes * stages
    edges = [i * blocks // count for i in range(count + 1)]

    def stage(index: int) -> PipelineStage:
        module = _Stage(view, edges[index], edges[index + 1]).to(place)
        return PipelineStage(module, index, count, place)

    own = [stage(rank + i * processes) for i in range(stages)]
    schedule = get_schedule_class(name)(own if stages > 1 else own[0], parts, loss_fn=nn.functional.cross_entropy)
    parameters = [p for one in own for p in one.submod.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=5e-4, weight_decay=0.05)
    normalized, targets = (images.float() / 128 - 1).to(place), labels.to(place)

    def step() -> None:
        optimizer.zero_grad()
        given = (normalized,) if rank == 0 else ()
        wanted = {"target": targets} if rank == processes - 1 else {}
        schedule.step(*given, **wanted)
        optimizer.step()

    return step


class _Stage(nn.Module):
    """Consecutive blocks of a backbone, with the stem or the head at the ends."""

    def __init__(self, view: fastlocal.Backbone, start: int, stop: int) -> None:
        super().__init__()
        self.stem = view.stem if start == 0 else None
        self.blocks = nn.ModuleList(view.blocks[start:stop])
        self.head = view.head if stop == len(view.blocks) else None

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.stem is None else self.stem(x)
        for block in self.blocks:
            _, x = block(x)
        return x if self.head is None else self.head(x)
