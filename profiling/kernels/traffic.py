"""Count the bytes that PyTorch ops and Triton kernels move, on a machine without a GPU.

A PyTorch op reads its inputs and writes its outputs, each once (views are free): less than it really moves, which
favours whatever our kernels are compared with. A Triton kernel runs in Triton's interpreter, where every load and
store shows its addresses, so its bytes are counted, masked lanes excluded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

SECTOR_BYTES = 32  # the unit in which a card's memory and caches move data


@dataclass(frozen=True)
class Traffic:
    """Bytes moved by one PyTorch op, one kernel launch, or a sum of them.

    ``loaded`` and ``stored`` count every access of every program. ``distinct`` counts each 32-byte sector once per
    launch and direction: what crosses the memory bus when accesses repeated within one launch hit the card's L2 cache.
    ``workspace`` is the part of ``distinct`` that lies in tensors which live only inside one of fastlocal's ops.
    """

    loaded: int = 0
    stored: int = 0
    distinct: int = 0
    workspace: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def every(self) -> int:
        return self.loaded + self.stored


@dataclass(frozen=True)
class Entry:
    """What moved, and which op (``"aten.mm"``) or kernel (``"triton._forward"``) moved it."""

    source: str
    traffic: Traffic
    touched: tuple[Any, Any] | None = field(
        default=None, repr=False
    )  # arrays: addresses, and the distinct bytes at each

    def outside(self, tensors: list[Tensor]) -> int:
        """The distinct bytes that are not in the storages of ``tensors``."""
        if self.touched is None:
            return 0
        addresses, sizes = self.touched
        inside = addresses < 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            # The first sector may start before the storage does.
            start, end = storage.data_ptr() - SECTOR_BYTES, storage.data_ptr() + storage.nbytes()
            inside |= (addresses > start) & (addresses < end)
        return int(sizes[~inside].sum())


class CountTraffic(TorchDispatchMode):
    """Collects an `Entry` for each PyTorch op and each interpreted Triton kernel that runs inside it.

    Ops of fastlocal are looked into: what counts is what their implementation moves. On fake tensors, which run no
    kernels, they count as any other op.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Entry] = []

    @property
    def total(self) -> Traffic:
        return sum((entry.traffic for entry in self.entries), Traffic())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastlocal" and not any(map(_is_fake, _tensors((args, kwargs)))):
            first = len(self.entries)
            with self, _count_kernels(self.entries):
                out = func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
            boundary = list(_tensors((args, kwargs, out)))
            for i, entry in enumerate(self.entries[first:], first):
                traffic = replace(entry.traffic, workspace=entry.outside(boundary))
                self.entries[i] = Entry(entry.source, traffic)
            return out
        out = func(*args, **kwargs)
        entry = _op_entry(func, args, kwargs, out)
        if entry.traffic.every:
            self.entries.append(entry)
        return out


# --- PyTorch ops ------------------------------------------------------------------------------------------------------

# Ops that do not read the tensor they are given, and those that do not write the one they return.
_WRITE_ONLY = {
    *("zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones", "new_full"),
    *("zero_", "fill_", "bernoulli_", "uniform_", "normal_"),
}
_FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "empty_permuted",
    "new_empty",
    "new_empty_strided",
    "device",
    "is_pinned",
}


def _op_entry(func: Any, args: Any, kwargs: Any, out: Any) -> Entry:
    """The bytes of one PyTorch op: inputs read and outputs written once; nothing for views and uninitialized memory."""
    source, name = str(func.overloadpacket), func._schema.name.split("::")[-1]
    inputs, outputs = list(_tensors((args, kwargs))), list(_tensors(out))
    if not func._schema.is_mutable:
        own = {tensor.untyped_storage()._cdata for tensor in inputs}
        outputs = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in own]
    if name in _FREE or not outputs:  # without outputs of its own, a view
        return Entry(source, Traffic())
    if name == "copy_":
        inputs = inputs[1:]
    elif name in _WRITE_ONLY:
        inputs = []
    loaded, stored = ([_bytes(tensor) for tensor in tensors] for tensors in (inputs, outputs))
    traffic = Traffic(sum(loaded), sum(stored), sum(loaded) + sum(stored))
    if any(map(_is_fake, outputs)):
        return Entry(source, traffic)
    addresses = numpy.array([tensor.data_ptr() for tensor in inputs + outputs], dtype=numpy.int64)
    return Entry(source, traffic, (addresses, numpy.array(loaded + stored)))


def _bytes(tensor: Tensor) -> int:
    """Bytes of memory behind a tensor; an expanded dimension has its elements once."""
    return tensor.itemsize * math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _is_fake(value: Any) -> bool:
    return isinstance(value, torch._subclasses.FakeTensor)


_FLOAT32_ON_CUDA = {
    *("softmax", "log_softmax", "layer_norm", "sum"),
    *("mse_loss", "l1_loss", "smooth_l1_loss", "cross_entropy"),
}


class CudaAutocastPolicy(TorchFunctionMode):
    """On CPU tensors, autocast's float32 list of CUDA: that of the CPU lacks these ops, so eager would seem to move
    less.

    Use inside ``torch.autocast("cpu", ...)``.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _FLOAT32_ON_CUDA and torch.is_autocast_enabled("cpu"):
            args = [a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        return func(*args, **(kwargs or {}))


# --- Triton kernels ---------------------------------------------------------------------------------------------------


@dataclass
class _Launch:
    """The accesses of one kernel launch so far."""

    loaded: int = 0
    stored: int = 0
    sectors_loaded: list[Any] = field(default_factory=list)
    sectors_stored: list[Any] = field(default_factory=list)

    def entry(self, kernel: str) -> Entry:
        distinct = [
            numpy.unique(numpy.concatenate(sectors))
            for sectors in (self.sectors_loaded, self.sectors_stored)
            if sectors
        ]
        addresses = numpy.concatenate(distinct).astype(numpy.int64) * SECTOR_BYTES
        traffic = Traffic(self.loaded, self.stored, addresses.size * SECTOR_BYTES)
        return Entry(f"triton.{kernel}", traffic, (addresses, numpy.full(addresses.size, SECTOR_BYTES)))


@contextmanager
def _count_kernels(entries: list[Entry]) -> Iterator[None]:
    """Append an entry to ``entries`` for every kernel that Triton's interpreter runs in this block."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    names = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")
    original: dict[str, Callable[..., Any]] = {name: getattr(builder, name) for name in names}
    run = executor.__call__
    launch = _Launch()

    def touched(pointers: Any, mask: Any) -> tuple[int, Any]:
        lanes = pointers.data.ravel() if mask is None else pointers.data[mask.data]
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        return lanes.size * itemsize, numpy.unique(lanes // SECTOR_BYTES)

    def record_load(pointers: Any, mask: Any) -> None:
        size, sectors = touched(pointers, mask)
        launch.loaded += size
        launch.sectors_loaded.append(sectors)

    def record_store(pointers: Any, mask: Any) -> None:
        size, sectors = touched(pointers, mask)
        launch.stored += size
        launch.sectors_stored.append(sectors)

    def load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        record_load(pointers, mask)
        return original["create_masked_load"](self, pointers, mask, *rest, **options)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        record_store(pointers, mask)
        return original["create_masked_store"](self, pointers, value, mask, *rest, **options)

    def atomic(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        record_load(pointers, mask)
        record_store(pointers, mask)
        return original["create_atomic_rmw"](self, operation, pointers, value, mask, *rest)

    def compare_and_swap(self: Any, pointers: Any, *rest: Any) -> Any:
        record_load(pointers, None)
        record_store(pointers, None)
        return original["create_atomic_cas"](self, pointers, *rest)

    def counted_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal launch
        launch = _Launch()
        with torch.utils._python_dispatch._disable_current_modes():  # the interpreter's own copies are no traffic
            result = run(self, *args, **kwargs)
        entries.append(launch.entry(self.fn.__name__))
        return result

    replacements = dict(zip(names, (load, store, atomic, compare_and_swap), strict=True))
    for name, replacement in replacements.items():
        setattr(builder, name, replacement)
    executor.__call__ = counted_run
    try:
        yield
    finally:
        for name, method in original.items():
            setattr(builder, name, method)
        executor.__call__ = run
