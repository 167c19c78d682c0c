"""What the processes of `test_distributed` run: the same training with a mesh as without one."""

from __future__ import annotations

import time
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import fastlocal
from fastlocal.distributed.data_parallel import share_of
from fastlocal.memory import Meter

SWIN: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 2,
    "window_size": 2,
    "embed_dim": 8,
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 1, 2, 2),
}
VIT: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 5, "num_heads": 2}


def build(family: str, **overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    name, options = {
        "swin": ("swin_tiny_patch4_window7_224", SWIN),
        "vit": ("vit_tiny_patch16_224", VIT),
        "beit": ("beit_base_patch16_224", {**VIT, "use_shared_rel_pos_bias": True, "use_rel_pos_bias": False}),
        "convnet": ("levit_128s", {}),
    }[family]
    return timm.create_model(name, num_classes=4, **{**options, **overrides})


def batches(steps: int, size: int, floating: bool) -> list[tuple[Tensor, Tensor]]:
    """The last one is smaller by one."""
    generator = torch.Generator().manual_seed(7)
    sizes = [size] * (steps - 1) + [size - 1]
    made = [
        (
            torch.randint(256, (n, 3, 16, 16), generator=generator, dtype=torch.uint8),
            torch.randint(4, (n,), generator=generator),
        )
        for n in sizes
    ]
    return [(images.double() / 128 - 1, labels) if floating else (images, labels) for images, labels in made]


def train(
    shape: dict[str, int] | None,
    family: str,
    steps: int = 3,
    size: int = 8,
    double: bool = False,
    model: dict[str, Any] | None = None,
    exact: bool = False,
    opt: str = "adamw",
    loud: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train; returns what the first process has at the end, and each process's measurements."""
    mesh = init_device_mesh("cpu", tuple(shape.values()), mesh_dim_names=tuple(shape)) if shape else None
    torch.set_default_dtype(torch.float64 if double else torch.float32)
    try:
        return _train(mesh, build(family, **(model or {})), steps, size, double, exact, opt, loud, options)
    finally:
        torch.set_default_dtype(torch.float32)


def _train(
    mesh: DeviceMesh | None,
    network: nn.Module,
    steps: int,
    size: int,
    double: bool,
    exact: bool,
    opt: str,
    loud: bool,
    options: dict[str, Any],
) -> dict[str, Any]:
    if loud:
        with torch.no_grad():
            network.get_parameter("head.weight").mul_(1000)
    make = {
        "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
        "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-1, momentum=0.9),
    }[opt]
    torch.manual_seed(3)
    trainer = fastlocal.LocalTrainer(network, mesh=mesh, optimizer=make, **options)
    data, modules = trainer.ranks.data, trainer.ranks.modules
    torch.manual_seed(5)
    metrics = []
    for images, labels in batches(steps, size, double):
        share = share_of(len(images), data.rank, data.size)
        given = (images[share], labels[share]) if modules.rank == 0 else ()
        metrics.append(trainer.step(*given, exact=exact))
    images = batches(1, size + 9, double)[0][0]  # more than a step's: the buffers must grow
    logits = trainer.predict(images) if modules.rank == 0 else trainer.predict()
    exits = trainer.own_exits
    state = trainer.state_dict()
    trainer.close()
    return {
        "state": state,
        "loss": torch.stack([m.loss for m in metrics]),
        "correct": torch.stack([m.correct for m in metrics]),
        "norm": torch.stack([m.gradient_norm for m in metrics]),
        "skipped": torch.stack([m.skipped for m in metrics]),
        "exits": (exits.start, exits.stop),
        "logits": logits,
        "own": (trainer.own.start, trainer.own.stop),
        "sent": trainer.pipeline.sent,
        "reduced": trainer.engine._reducer.sent if trainer.engine._reducer is not None else 0,
    }


def refused(shape: dict[str, int], family: str = "vit", **options: Any) -> str:
    """The sentence with which a trainer is refused."""
    try:
        train(shape, family, **options)
    except ValueError as error:
        return str(error)
    return ""


def refused_by_rank(shape: dict[str, int], each: list[dict[str, Any]]) -> str:
    return refused(shape, **each[dist.get_rank()])


def traffic(shape: dict[str, int], family: str, **options: Any) -> dict[int, int]:
    """Bytes that this process sends to each other one in a step, whatever function of torch.distributed carries them."""
    mesh = init_device_mesh("cpu", tuple(shape.values()), mesh_dim_names=tuple(shape))
    trainer = fastlocal.LocalTrainer(build(family), mesh=mesh, **options)
    (images, labels), *_ = batches(2, 8, False)
    trainer.step(images, labels)
    dist.barrier()
    sent: dict[int, int] = {}
    usual, replaced = dist.isend, {}

    def isend(tensor: Tensor, dst: int, **rest: Any) -> Any:
        sent[dst] = sent.get(dst, 0) + tensor.nbytes
        return usual(tensor, dst, **rest)

    def nothing_else(*_: Any, **__: Any) -> None:
        raise AssertionError("a step along 'modules' sends to the next process, and nothing else")

    others = ("send", "all_reduce", "broadcast", "all_gather_object", "broadcast_object_list", "send_object_list")
    for name in others:
        replaced[name] = getattr(dist, name)
        setattr(dist, name, nothing_else)
    dist.isend = isend
    try:
        trainer.step(images, labels)
    finally:
        dist.isend = usual
        for name, function in replaced.items():
            setattr(dist, name, function)
    trainer.close()
    return sent


def one_bad_batch(shape: dict[str, int]) -> str:
    mesh = init_device_mesh("cpu", tuple(shape.values()), mesh_dim_names=tuple(shape))
    trainer = fastlocal.LocalTrainer(build("vit"), mesh=mesh)
    side = 16 if dist.get_rank() == 0 else 17
    try:
        trainer.step(torch.zeros(2, 3, side, side), torch.zeros(2, dtype=torch.int64))
    except ValueError as error:
        return str(error)
    return ""


def initial(shape: dict[str, int]) -> dict[str, Any]:
    """The weights that a process starts from, whose seed is its own."""
    mesh = init_device_mesh("cpu", tuple(shape.values()), mesh_dim_names=tuple(shape))
    torch.manual_seed(dist.get_rank())
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, **VIT)
    trainer = fastlocal.LocalTrainer(model, mesh=mesh, ema_decay=0.9)
    assert trainer.ema is not None
    heads = [module.heads.state_dict() for module in trainer.modules]
    return {"model": model.state_dict(), "average": trainer.ema.module.state_dict(), "heads": heads}


def measured(
    shape: dict[str, int],
    family: str,
    pause: float = 0.0,
    steps: int = 2,
    model: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Bytes handed over in a step, its seconds, and the most that tensors took in it; each module sleeps as it is trained.

    Args:
        pause: seconds that a whole batch of a module takes at least.
    """
    mesh = init_device_mesh("cpu", tuple(shape.values()), mesh_dim_names=tuple(shape))
    trainer = fastlocal.LocalTrainer(build(family, **(model or {})), mesh=mesh, **options)
    rows, rank = trainer.ranks.data.size, trainer.ranks.data.rank
    (images, labels), *_ = batches(2, 8, False)
    share = share_of(len(images), rank, rows)
    trainer.on_module_end = lambda *_: time.sleep(pause / rows)

    def given() -> tuple[Tensor, ...]:
        return (images[share], labels[share]) if trainer.ranks.modules.rank == 0 else ()

    def handed_over() -> tuple[int, int]:
        reducer = trainer.engine._reducer
        return trainer.pipeline.sent, reducer.sent if reducer is not None else 0

    trainer.step(*given())
    before, begun = handed_over(), time.perf_counter()
    for _ in range(steps):
        trainer.step(*given())
    seconds = (time.perf_counter() - begun) / steps
    sent, reduced = ((b - a) // steps for a, b in zip(before, handed_over(), strict=True))
    queued = [buffer for buffer, _ in (*trainer.pipeline._incoming, *trainer.pipeline._outgoing)]
    own = [trainer.modules[k] for k in trainer.own]
    optimizers = [o for k in trainer.own if (o := trainer.engine.optimizers[k]) is not None]
    with Meter(*own, *optimizers, *queued, trainer.pipeline._read, *given()) as meter:
        trainer.step(*given())
    trainer.close()
    return {"sent": sent, "reduced": reduced, "seconds": seconds, "peak": meter.peak}
