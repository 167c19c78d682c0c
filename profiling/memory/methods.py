"""How the rivals train: plain loops around a timm model, each with its best settings.

All run bf16 autocast by CUDA's rules, an optimizer without temporaries (what fused AdamW is on CUDA), timm's layers as they
come and non-reentrant checkpointing of every block. FSDP2 and save_on_cpu are torch's own code. On a CPU mesh they
would copy nothing between host and device, because both are the CPU; here they do (`_real_copies`). What needs a card to be
built, or packages that nothing else here needs, is modelled from its code: torchao's CPUOffloadOptimizer, the 8-bit states of
bitsandbytes, peft's LoRA and BAdam.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from fastlocal import memory
from fastlocal.backbones import backbone
from fastlocal.profiling.memory.setups import CLASSES


@dataclass
class Rival:
    """A model made ready to be trained in another way.

    Attributes:
        update: what ends a step, after the last backward.
        holders: what has memory besides the model.
        around: entered around each forward.
    """

    update: Callable[[], None]
    holders: list[Any]
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


def adamw(parameters: Any) -> torch.optim.AdamW:
    """AdamW as all rivals run it, with no temporaries."""
    return torch.optim.AdamW(parameters, lr=5e-4, weight_decay=0.05, fused=True)


def plain(model: nn.Module) -> Rival:
    """AdamW after the backward."""
    optimizer = adamw(parameter for parameter in model.parameters() if parameter.requires_grad)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Rival(update, [optimizer])


def in_backward(model: nn.Module) -> Rival:
    """Each parameter steps as soon as it has its gradient, which is then gone."""
    optimizers = {parameter: adamw([parameter]) for parameter in model.parameters()}

    def step(parameter: Tensor) -> None:
        optimizers[cast(nn.Parameter, parameter)].step()
        parameter.grad = None

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(step)
    return Rival(lambda: None, list(optimizers.values()))


def torchao(model: nn.Module) -> Rival:
    """torchao.optim.CPUOffloadOptimizer(offload_gradients=True), after its code (0.18).

    Gradients go to the host as they come; AdamW runs there, one parameter at a time; the weights come back. Parameters with
    fewer than 4096 elements stay.
    """
    small = [parameter for parameter in model.parameters() if parameter.numel() < 4096]
    on_device = adamw(small)
    optimizers: dict[nn.Parameter, tuple[Tensor, torch.optim.Optimizer]] = {}
    for parameter in (parameter for parameter in model.parameters() if parameter.numel() >= 4096):
        host = nn.Parameter(memory.on_host(torch.empty_like(parameter)))
        host.grad = memory.on_host(torch.empty_like(parameter))
        optimizers[parameter] = host, adamw([host])

    def offload(parameter: Tensor) -> None:
        host, _ = optimizers[cast(nn.Parameter, parameter)]
        cast(Tensor, host.grad).copy_(cast(Tensor, parameter.grad))
        parameter.grad = None

    @torch.no_grad()
    def update() -> None:
        on_device.step()
        on_device.zero_grad()
        for parameter, (host, optimizer) in optimizers.items():
            optimizer.step()
            _keep_on_host(optimizer)
            parameter.copy_(host)

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(offload)
    return Rival(update, [on_device, *(optimizer for _, optimizer in optimizers.values())])


class _AdamW8bit(torch.optim.Optimizer):
    """The memory of bitsandbytes' AdamW8bit: a byte per moment and an fp32 scale per 256 of them; updates in place."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure, no loss
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            if parameter in self.state:
                continue
            for name in ("exp_avg", "exp_avg_sq"):
                if parameter.numel() < 4096:
                    self.state[parameter][name] = torch.zeros_like(parameter)
                else:
                    self.state[parameter][name] = torch.zeros_like(parameter, dtype=torch.uint8)
                    self.state[parameter][f"{name}_scale"] = torch.zeros(
                        -(-parameter.numel() // 256), device=parameter.device
                    )


def eight_bit(model: nn.Module) -> Rival:
    """AdamW with 8-bit states."""
    optimizer = _AdamW8bit(model.parameters())

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Rival(update, [optimizer])


class _LoRA(nn.Module):
    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def lora(model: nn.Module) -> Rival:
    """Rank-16 adapters in fp32 beside every linear layer of the blocks, and the head; the rest is frozen, in bf16."""
    model.bfloat16().requires_grad_(False)
    inside = {layer for block in backbone(model).blocks for layer in block.modules() if isinstance(layer, nn.Linear)}
    for name, layer in [(name, layer) for name, layer in model.named_modules() if layer in inside]:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, _LoRA(cast(nn.Linear, layer), rank=16))
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features == CLASSES:
            module.float().requires_grad_()
    return plain(model)


def badam(model: nn.Module) -> Rival:
    """All weights in bf16; the block with most parameters has an fp32 copy of them, gradients and AdamW states."""
    model.bfloat16().requires_grad_(False)
    largest = max(backbone(model).blocks, key=lambda block: sum(p.numel() for p in block.parameters()))
    largest.requires_grad_()
    masters = {p: nn.Parameter(p.detach().float()) for p in largest.parameters()}
    optimizer = adamw(masters.values())

    @torch.no_grad()
    def update() -> None:
        for parameter, master in masters.items():
            master.grad, parameter.grad = cast(Tensor, parameter.grad).float(), None
        optimizer.step()
        optimizer.zero_grad()
        for parameter, master in masters.items():
            parameter.copy_(master)

    return Rival(update, [optimizer])


def shard(model: nn.Module, mesh: DeviceMesh, *, bf16: bool, pinned: bool) -> None:
    """FSDP2 as its users would write it for one device: a block at a time there, everything else on the host."""
    options: Any = {"mesh": mesh, "offload_policy": CPUOffloadPolicy(pin_memory=pinned)}
    if bf16:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    blocks: Any = getattr(model, "blocks", None)
    if blocks is None:  # in stages
        codes = [block.code for block in backbone(model).blocks]
        blocks = [part for code in codes for part in (code if isinstance(code, nn.ModuleList) else (code,))]
    for block in blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)


def fsdp(model: nn.Module, *, bf16: bool = False, saved: bool = False) -> Rival:
    """FSDP2 with a process of its own: weights, gradients and AdamW on the host, a block's weights on the device."""
    with unset_fake_temporarily():  # a mesh looks at values
        mesh = init_device_mesh("cpu", (1,))
    shard(model, mesh, bf16=bf16, pinned=False)
    for parameter in model.parameters():
        memory.on_host(parameter)
    rival = plain(model)
    (optimizer,) = rival.holders
    step = rival.update

    def update() -> None:
        if optimizer.state:  # a step on the host, in place, takes no more memory than there is already
            optimizer.zero_grad()
        else:
            step()
            _keep_on_host(optimizer)

    save = torch.autograd.graph.save_on_cpu if saved else contextlib.nullcontext
    return Rival(update, [optimizer], around=save)


RIVALS: dict[str, Callable[[nn.Module], Rival]] = {
    "": plain,
    "in-backward": in_backward,
    "torchao": torchao,
    "8-bit": eight_bit,
    "lora": lora,
    "badam": badam,
    "fsdp": fsdp,
    "fsdp bf16": lambda model: fsdp(model, bf16=True),
    "fsdp saved": lambda model: fsdp(model, saved=True),
    "fsdp bf16 saved": lambda model: fsdp(model, bf16=True, saved=True),
}


def _keep_on_host(optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        for value in state.values():
            memory.on_host(value)


@contextlib.contextmanager
def sharding() -> Iterator[None]:
    """Inside, `fsdp` has the process group that it needs, whose only process is this one and which never talks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    try:
        with _real_copies():
            yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _real_copies() -> Iterator[None]:
    """Copy where ``tensor.to(device)`` and ``tensor.cpu()`` would on a card: from the host if it is there, else to it."""
    to = torch.Tensor.to

    @torch.no_grad()
    def copied(tensor: Tensor) -> Tensor:
        if memory.is_on_host(tensor):
            return tensor.clone()
        return memory.on_host(torch.empty_like(tensor)).copy_(tensor)

    def to_device(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        if args and isinstance(args[0], torch.device):
            return copied(tensor)
        return to(tensor, *args, **options)

    with mock.patch.object(torch.Tensor, "to", to_device), mock.patch.object(torch.Tensor, "cpu", copied):
        yield
