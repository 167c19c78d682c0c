"""Counts the bytes a training step really needs, on a CPU, on a GPU, or with no arithmetic at all.

How bytes are counted
    One *storage* (the memory behind a tensor and all its views) counts its ``nbytes`` once, from the operation that
    made it to the moment the last tensor, view or autograd node lets go of it. An operation's results count while its
    arguments still live, as they do on a device. Tensors that existed before the step count from the start if they
    are given to the `Meter`, and otherwise from the first operation that reads them.
    A fused op of fastlocal counts the scratch memory that it documents (``workspace_bytes``) beside its results, but
    not on real CPU tensors, where its reference runs in less, which nobody counts. So do torch's sums and means over
    rows if a card is given whose kernels run (`reduction_scratch`): the gradients of biases are such.
    Not counted: scratch memory inside any other operation (a convolution's workspace), that of cuBLAS, which stays
    (`cublas_workspaces`), the allocator's rounding (512 bytes on CUDA, up to 1 MiB where a large block is not split)
    and fragmentation. On CUDA the meter reports torch's own peak beside its own, which includes all but the last.

What the kinds mean (a storage has one kind for its whole life, found out as late as necessary)
    parameters  what is used as a `torch.nn.Parameter`, and the buffers of the given modules
    gradients   what was the ``.grad`` of a parameter after a backward, or when an optimizer stepped
    optimizer   what is in the state of an optimizer that stepped
    inputs      what existed before the step, or came from outside the dispatcher (a batch from a loader)
    boundary    what the engine tagged: activations that modules hand to one another
    graph       made with gradients enabled and still held when a backward operation ran: what autograd saved
    temporary   the rest
"""

from __future__ import annotations

import functools
import math
import os
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass_type,
)
from torch.utils.weak import WeakIdKeyDictionary

from fastlocal.dry_run import dry_run as dry_run
from fastlocal.dry_run import fake_copy as fake_copy
from fastlocal.dry_run import is_dry_run as is_dry_run
from fastlocal.kernels.reconstruction_loss import workspace_bytes

Kind = Literal["parameters", "gradients", "optimizer", "inputs", "boundary", "graph", "temporary"]
KINDS: tuple[Kind, ...] = get_args(Kind)
HOST = "host"  # the name of the pool that `on_host` puts a tensor in

# What a custom op allocates and frees inside is below the dispatcher, so the op must say it: name -> bytes, from its
# arguments.
_SCRATCH: dict[str, Callable[..., int]] = {
    "fastlocal::reconstruction_loss": lambda hidden, weight, bias, target, *_: workspace_bytes(hidden, weight, target),
    "fastlocal::reconstruction_loss_backward": lambda upstream, hidden, weight, bias, target, *_: workspace_bytes(
        hidden, weight, target
    ),
}

# Torch's reductions whose CUDA kernels take scratch memory, from the tensor and the dimensions.
_REDUCTIONS = (torch.ops.aten.sum.dim_IntList, torch.ops.aten.mean.dim)

# The operations that copy between devices.
_COPIES = (torch.ops.aten.copy_.default, torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)

# What the program said about its storages. Marks outlive any one meter: a host copy stays one from step to step.
_tags: WeakIdKeyDictionary = WeakIdKeyDictionary()
_on_host: WeakIdKeyDictionary = WeakIdKeyDictionary()
_active: list[Meter] = []


def tag(tensor: Tensor, kind: Kind) -> Tensor:
    """Say what the storage of ``tensor`` is for; it keeps this kind while it lives. Returns ``tensor``.

    Raises:
        ValueError: ``kind`` is none of `KINDS`.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    return _mark(tensor, _tags, kind)


def on_host(tensor: Tensor) -> Tensor:
    """Count the storage of ``tensor`` in the pool ``"host"``, whatever its device. Returns ``tensor``.

    On a machine without a GPU both sides of an offload are CPU tensors; this mark tells them apart. It holds for the
    whole life of the storage, so the moment between making a host copy and marking it is not counted on the device.
    """
    return _mark(tensor, _on_host, HOST)


def cublas_workspaces(device: torch.device | str) -> int:
    """Bytes that torch's allocator holds for cuBLAS while a model trains on ``device``; 0 where that is no CUDA device.

    cuBLAS has a workspace for each thread and stream that multiplies: the main thread's and that of the backward. torch
    takes 8.1 MiB each, and 32 MiB from compute capability 9.0 on (as where there is no card to ask), or what
    CUBLAS_WORKSPACE_CONFIG says, and shares them with cuBLASLt. ROCm, or TORCH_CUBLASLT_UNIFIED_WORKSPACE=0, has more.
    """
    if torch.device(device).type != "cuda":
        return 0
    asked = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if asked:
        each = sum(int(kibibytes) * int(count) for kibibytes, count in asked) * 2**10
    else:
        large = not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (9, 0)
        each = 32 * 2**20 if large else 2 * 4096 * 2**10 + 8 * 16 * 2**10
    return 2 * each


def reduction_scratch(x: Tensor, dims: Sequence[int] | None, card: torch.device) -> int:
    """Bytes that a CUDA kernel of torch takes and gives back for the sum of ``x`` over ``dims``, its last one kept.

    Partial sums, which torch places as if every thread had all of its block's (aten/src/ATen/native/cuda/Reduce.cuh): eight
    bytes per element, up to as many as fill the card. On an H100, 73.5 MiB for [25088, 384], the widest layer of Swin-T's
    first stage with 8 images.
    """
    reduced = {dim % x.ndim for dim in dims or ()}
    if not reduced or x.ndim - 1 in reduced or math.prod(x.shape[dim] for dim in reduced) < 64:
        return 0
    properties = torch.cuda.get_device_properties(card)
    return min(8 * x.numel(), 512 * properties.max_threads_per_multi_processor * properties.multi_processor_count)


def is_on_host(tensor: Tensor) -> bool:
    """Whether `on_host` has marked the storage of ``tensor``."""
    return any(storage in _on_host for storage in _storages(tensor))


def _mark(tensor: Tensor, marks: WeakIdKeyDictionary, mark: str) -> Tensor:
    for storage in _storages(tensor):
        marks[storage] = mark
        for meter in _active:
            meter._apply_marks(storage)
    return tensor


class _Record:
    """One storage: its size now, where and what for. ``nbytes`` changes only when the storage is resized."""

    __slots__ = ("kind", "nbytes", "pool", "reference")

    def __init__(self, pool: str, kind: Kind) -> None:
        self.nbytes = 0
        self.pool = pool
        self.kind = kind
        self.reference: weakref.ref[torch.UntypedStorage] | None = None


class Meter(TorchDispatchMode):
    """Follows every storage that lives while the block runs.

    Works on real CPU and CUDA tensors, and inside `dry_run`. One meter measures one block.

        with Meter(model, optimizer, images) as meter:
            step(images)
        meter.peak, meter.peak_by_kind

    Args:
        given: modules, optimizers and tensors that exist before the block, counted from its start.
        device: the device whose bytes `peak` and the other readings mean by default. None takes the accelerator that
            the given tensors are on, or the CPU if there is none: name it where all of them wait on the host.
        card: a CUDA device of this machine that a dry run stands for. Default: ``device``, if it is one.

    Attributes:
        torch_peak: on CUDA, ``torch.cuda.max_memory_allocated`` of the block in bytes; None elsewhere.
        traffic: bytes copied from one device, or pool, to another: what crosses the bus, both ways together.
    """

    def __init__(
        self,
        *given: nn.Module | torch.optim.Optimizer | Tensor,
        device: torch.device | str | None = None,
        card: torch.device | None = None,
    ):
        super().__init__()
        devices = (tensor.device for tensor, _ in _given_tensors(given))
        self.device = torch.device(device or next((one for one in devices if one.type != "cpu"), "cpu"))
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.card = card or (self.device if self.device.type == "cuda" else None)
        self.torch_peak: int | None = None
        self.traffic = 0
        self._given = given
        self._records: dict[int, _Record] = {}  # by id(storage): torch keeps that object as long as the memory
        self._events: list[tuple[_Record, int]] = []
        self._start = 0  # how many of them register what was given
        self._undecided: dict[int, _Record] = {}  # made with gradients enabled since the last backward operation
        self._handles: list[Any] = []
        self._hooked: WeakIdKeyDictionary = WeakIdKeyDictionary()

    # What was measured

    @property
    def peak(self) -> int:
        """The largest number of bytes alive at one time on `device`."""
        return self.peak_by_device.get(str(self.device), 0)

    @property
    def events(self) -> int:
        """How many allocations and releases there were so far: the numbers of `timeline`."""
        return len(self._events) - self._start

    @property
    def peak_by_kind(self) -> dict[Kind, int]:
        """The bytes on `device` by kind at the moment of the peak."""
        return self.timeline(points=1)[0][1]

    @property
    def peak_by_device(self) -> dict[str, int]:
        """The peak of every device that held a tensor, and of ``"host"``; they need not coincide in time."""
        now: dict[str, int] = {}
        peak: dict[str, int] = {}
        for record, change in self._events:
            now[record.pool] = now.get(record.pool, 0) + change
            peak[record.pool] = max(peak.get(record.pool, 0), now[record.pool])
        return peak

    @property
    def live(self) -> int:
        """The bytes alive on `device` now, or at the end of the block once it is left."""
        return sum(self.live_by_kind.values())

    @property
    def live_by_kind(self) -> dict[Kind, int]:
        """`live`, by kind. What a later backward would show to be graph is still temporary here."""
        state: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        for record, change in self._events:
            if record.pool == str(self.device):
                state[record.kind] += change
        return state

    def timeline(self, points: int | None = None, device: str | None = None) -> list[tuple[int, dict[Kind, int]]]:
        """The bytes by kind over the block: (number of the allocation or release, bytes by kind), in order.

        Number 0 is the start of the block, with all that was given.

        Args:
            points: at most this many, each the largest moment of an equal share of the events; all when None.
            device: another of the devices in `peak_by_device`, or ``"host"``.
        """
        share = 1 if points is None else -(-(len(self._events) - self._start + 1) // points)
        line: list[tuple[int, dict[Kind, int]]] = []
        total = -1
        for index, state in enumerate(self.states(device)):
            bytes_now = sum(state.values())
            if index % share == 0:
                line.append((index, dict(state)))
                total = bytes_now
            elif bytes_now > total:
                line[-1] = (index, dict(state))
                total = bytes_now
        return line

    def states(self, device: str | None = None) -> Iterator[dict[Kind, int]]:
        """The bytes by kind at the start of the block and after every event: one dictionary, changed."""
        pool = device or str(self.device)
        state: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        for index, (record, change) in enumerate(self._events):
            if index == self._start:
                yield state
            if record.pool == pool:
                state[record.kind] += change
            if index >= self._start:
                yield state
        if len(self._events) == self._start:
            yield state

    # Following the storages

    def __enter__(self) -> Meter:
        for tensor, kind in _given_tensors(self._given):
            self._see(tensor, kind)
        self._start = len(self._events)
        self._handles = [
            register_optimizer_step_pre_hook(self._before_optimizer_step),
            register_optimizer_step_post_hook(self._after_optimizer_step),
        ]
        self._resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = self._resize_and_count(self._resize)  # type: ignore[method-assign]  # patched for this block
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        _active.append(self)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        if self.device.type == "cuda":
            self.torch_peak = torch.cuda.max_memory_allocated(self.device)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]  # patched for this block
        for handle in [*self._handles, *self._hooked.values()]:
            handle.remove()
        _active.remove(self)
        self._hooked.clear()
        self._undecided.clear()
        self._records.clear()  # drops the weak references, and with them what would have been counted later

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._follow(func, types, args, kwargs or {})

    def _follow(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func is torch.ops.prim.device.default:  # of a fake tensor; more than half of what a dry run calls
            return args[0].device
        if any(map(_is_wrapper, types)):
            return NotImplemented  # the subclass runs first; its inner operations come back here
        if self._undecided and torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled():
            # A backward operation. What the forward made and is still held was saved by autograd.
            for record in self._undecided.values():
                record.kind = "graph" if record.kind == "temporary" else record.kind
            self._undecided.clear()
        for tensor in tensors_in((args, kwargs)):
            if isinstance(tensor, nn.Parameter):
                self._see(tensor, "parameters")
                self._watch_gradient(tensor)
            else:
                self._see(tensor, None)
        result = func(*args, **kwargs)
        for tensor in tensors_in(result):
            self._see(tensor, None, made=True)
        if func in _COPIES:
            copied = args[1] if func is torch.ops.aten.copy_.default else args[0]
            if self._pool(copied) != self._pool(result):
                self.traffic += copied.nbytes
        if scratch := self._scratch(func, args):
            record = _Record(_name(args[0].device), "temporary")
            self._count(record, scratch)
            self._count(record, 0)
        return result

    def _scratch(self, func: Any, args: tuple[Any, ...]) -> int:
        """Bytes that ``func`` allocates and frees inside."""
        if func in _REDUCTIONS:
            return 0 if self.card is None else reduction_scratch(args[0], args[1], self.card)
        documented = _SCRATCH.get(func._schema.name) if func.namespace == "fastlocal" else None
        if documented is None or (args[0].device.type == "cpu" and not is_dry_run()):
            return 0  # real CPU tensors: the reference runs, without the kernel's scratch memory
        return documented(*args)

    def _see(self, tensor: Tensor, kind: Kind | None, made: bool = False) -> None:
        """Count the storage of ``tensor`` if it is new or was resized; ``kind`` says what it is for, if known."""
        for storage in _storages(tensor):
            key = id(storage)
            record = self._records.get(key)
            if record is None:
                record = _Record(_name(tensor.device), kind or ("temporary" if made else "inputs"))
                record.reference = weakref.ref(storage, functools.partial(self._release, key))
                self._records[key] = record
                if made and torch.is_grad_enabled():
                    self._undecided[key] = record
                self._apply_marks(storage)
            elif kind is not None and kind != record.kind:
                record.kind = _tags.get(storage, kind)
            self._count(record, storage.nbytes())

    def _pool(self, tensor: Tensor) -> str | None:
        """Where the storage of ``tensor``, seen before, is counted."""
        return next((self._records[id(storage)].pool for storage in _storages(tensor)), None)

    def _count(self, record: _Record, nbytes: int) -> None:
        if nbytes != record.nbytes:
            self._events.append((record, nbytes - record.nbytes))
            record.nbytes = nbytes

    def _release(self, key: int, _: object) -> None:
        record = self._records.pop(key, None)
        self._undecided.pop(key, None)
        if record is not None:
            self._count(record, 0)

    def _apply_marks(self, storage: torch.UntypedStorage) -> None:
        record = self._records.get(id(storage))
        if record is not None:
            record.kind = _tags.get(storage, record.kind)
            record.pool = _on_host.get(storage, record.pool)

    def _resize_and_count(self, resize: Any) -> Any:
        def resize_and_count(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            record = self._records.get(id(storage))
            if record is not None:
                self._count(record, storage.nbytes())

        return resize_and_count

    # Finding gradients and optimizer states

    def _watch_gradient(self, parameter: Tensor) -> None:
        if parameter.requires_grad and parameter.is_leaf and parameter not in self._hooked:
            self._hooked[parameter] = parameter.register_post_accumulate_grad_hook(self._see_gradient)

    def _see_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._see(parameter.grad, "gradients")

    def _before_optimizer_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._see_gradient(parameter)

    def _after_optimizer_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for tensor, kind in _given_tensors((optimizer,)):
            self._see(tensor, kind)


class DryMeter(Meter):
    """A meter for `dry_run`s alone. torch hides each call of a mode from its compiler, which takes as long as the rest, and in
    a dry run nothing is compiled."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    # Written again because torch asks `_should_skip_dynamo` of a class that has this method itself.
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._follow(func, types, args, kwargs or {})


def _given_tensors(given: Iterable[nn.Module | torch.optim.Optimizer | Tensor]) -> Iterator[tuple[Tensor, Kind]]:
    """Every tensor of modules and optimizers, and what it is for."""
    for one in given:
        if isinstance(one, nn.Module):
            yield from _with_gradients(one.parameters())
            yield from ((buffer, "parameters") for buffer in one.buffers())
        elif isinstance(one, torch.optim.Optimizer):
            yield from _with_gradients(parameter for group in one.param_groups for parameter in group["params"])
            for state in one.state.values():
                yield from ((value, "optimizer") for value in state.values() if isinstance(value, Tensor))
        elif isinstance(one, nn.Parameter):
            yield from _with_gradients([one])
        else:
            yield one, "inputs"


def _with_gradients(parameters: Iterable[Tensor]) -> Iterator[tuple[Tensor, Kind]]:
    for parameter in parameters:
        yield parameter, "parameters"
        if parameter.grad is not None:
            yield parameter.grad, "gradients"


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in an operation's arguments or results."""
    if isinstance(tree, Tensor):
        return [tree]
    branches = tree if isinstance(tree, (tuple, list)) else tree.values() if isinstance(tree, dict) else ()
    found: list[Tensor] = []
    for branch in branches:
        if isinstance(branch, Tensor):
            found.append(branch)
        elif isinstance(branch, (tuple, list, dict)):
            found += tensors_in(branch)
    return found


_name = functools.cache(str)  # of a device


@functools.cache
def _is_wrapper(kind: type) -> bool:
    return is_traceable_wrapper_subclass_type(kind)


def _storages(tensor: Tensor) -> Sequence[torch.UntypedStorage]:
    """The memory behind ``tensor``: of its parts if it is a wrapper; none on ``meta`` or without strides (sparse)."""
    if _is_wrapper(type(tensor)):
        parts = (getattr(tensor, name) for name in cast(Any, tensor).__tensor_flatten__()[0])
        # A DTensor counts its device mesh among its parts.
        return [storage for part in parts if isinstance(part, Tensor) for storage in _storages(part)]
    if tensor.layout is torch.strided and tensor.device.type != "meta":
        return (tensor.untyped_storage(),)
    return ()
