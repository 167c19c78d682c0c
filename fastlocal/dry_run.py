"""Steps without arithmetic: tensors that have shapes, lifetimes and no data.

The tensors are torch's fake ones. What an operation makes, a kernel for tensors on "meta" says, and only once for every
operation and shapes: a dry run repeats its blocks, whose parameters only lie elsewhere. torch's fake tensor mode, whose own
memory of results hangs on where they lie, is asked for what hangs on more than shapes.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
)


def is_dry_run() -> bool:
    """Whether tensors have shapes but no data here: inside `dry_run`, or any other fake tensor mode."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def is_dry_run_of_cuda() -> bool:
    """Whether this is a `dry_run` of what will run on a CUDA device."""
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    return isinstance(mode, _DryRun) and mode.of_cuda


@contextmanager
def dry_run(device: torch.device | str = "cuda") -> Iterator[None]:
    """Inside this block operations on tensors made in it, or by `fake_copy`, compute shapes and lifetimes, no values.

    The fake tensors say they are on the CPU, so optimizers step one parameter at a time unless told otherwise.

    Args:
        device: where what is rehearsed will run. On "cuda" autocast follows CUDA's rules: softmax, LayerNorm and losses are
            float32, and what they save is.

    Reading a value that is not known (``.item()``, ``float()``, ``if tensor:``) gives zero: 0.0, 0 or False. So a
    GradScaler finds no overflow, and a test that must hold for the step to go on asks `is_dry_run` first.

        with fastlocal.memory.dry_run():
            model = fastlocal.memory.fake_copy(model)
            ...
            with fastlocal.memory.Meter(model, images) as meter:
                loss_of(model, images).backward()
    """
    # Module.to() would swap fake parameters, which fails where a weak reference to them exists, and the fake mode
    # itself holds some; so it assigns their data, as it does for real ones. And deepcopy would copy the data.
    swap_tensors, deepcopy = torch.utils.swap_tensors, Tensor.__deepcopy__
    torch.utils.swap_tensors = _assign_data
    Tensor.__deepcopy__ = _copy_without_data  # type: ignore[method-assign]  # patched for this block
    of_cuda = torch.device(device).type == "cuda"
    try:
        with _cuda_autocast() if of_cuda else nullcontext(), _DryRun(of_cuda):
            yield
    finally:
        torch.utils.swap_tensors = swap_tensors
        Tensor.__deepcopy__ = deepcopy  # type: ignore[method-assign]  # patched for this block


@contextmanager
def without_values() -> Iterator[None]:
    """Operations give tensors that have shapes and no values, also where they read real ones, which stay as they are."""
    if is_dry_run():
        yield
        return
    log = logging.getLogger("torch._subclasses.fake_tensor")  # it tells of each error that is raised anyway
    silent, log.disabled = log.disabled, True
    try:
        with _DryRun(of_cuda=False, allow_non_fake_inputs=True):
            yield
    finally:
        log.disabled = silent


def fake_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` for the present `dry_run`, its parameters and buffers without data. ``model`` stays as it is.

    ``model`` may be on any device, ``meta`` too: ``with torch.device("meta"): timm.create_model(...)`` takes no memory.

    Raises:
        RuntimeError: called outside `dry_run`.
    """
    if not is_dry_run():
        raise RuntimeError("fake_copy makes tensors without data, which only work inside fastlocal.memory.dry_run().")
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): _without_data(tensor) for tensor in tensors})


def _without_data(tensor: Tensor) -> Tensor:
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def _copy_without_data(tensor: Tensor, copied: dict[int, Any]) -> Tensor:
    if id(tensor) not in copied:
        copied[id(tensor)] = _without_data(tensor)
    return copied[id(tensor)]


def _assign_data(to: Tensor, value: Tensor) -> None:
    to.data = value.data


# What CUDA's autocast computes in float32 and the CPU's does not: on arguments that are cast, or given the result's dtype.
_CAST_ON_CUDA = {
    *("layer_norm", "native_layer_norm", "group_norm", "rms_norm", "cosine_similarity", "softplus", "logsumexp", "pow"),
    *("exp", "expm1", "log", "log10", "log2", "log1p", "rsqrt", "reciprocal", "acos", "asin", "cosh", "sinh", "tan"),
    *("erfinv", "dist", "pdist", "renorm", "frobenius_norm", "nuclear_norm"),
    *("upsample_nearest1d", "upsample_nearest2d"),
    *("upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d"),
    *("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
}
_GIVEN_DTYPE_ON_CUDA = {
    "softmax",
    "log_softmax",
    "sum",
    "cumsum",
    "cumprod",
    "linalg_vector_norm",
    "linalg_matrix_norm",
}


@contextmanager
def _cuda_autocast() -> Iterator[None]:
    """In dry runs of CUDA in this block, the CPU's autocast has the float32 list of CUDA's.

    It is added where torch's own lists are, below Python: so composite operations follow it, and what a backward recomputes.
    """
    library = torch.library.Library("aten", "IMPL", "AutocastCPU")
    try:
        for op in _float32_on_cuda():
            library.impl(op.name(), _in_float32(op), with_keyset=True)
        yield
    finally:
        library._destroy()


@functools.cache
def _float32_on_cuda() -> list[Any]:
    listed, has_kernel = _CAST_ON_CUDA | _GIVEN_DTYPE_ON_CUDA, torch._C._dispatch_has_kernel_for_dispatch_key
    ops = []
    for name in torch._C._dispatch_get_all_op_names():
        base, _, overload = name.removeprefix("aten::").partition(".")
        if base in listed and has_kernel(name, "AutocastCUDA") and not has_kernel(name, "AutocastCPU"):
            ops.append(getattr(getattr(torch.ops.aten, base), overload or "default"))
    return ops


def _in_float32(op: Any) -> Callable[..., Any]:
    """Autocast's rule for ``op``."""
    gives_dtype = op._schema.name.removeprefix("aten::") in _GIVEN_DTYPE_ON_CUDA
    dtype = [argument.name for argument in op._schema.arguments].index("dtype") if gives_dtype else -1

    def rule(keys: torch.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        if not is_dry_run_of_cuda():  # but another thread's step
            return op.redispatch(keys.remove(torch.DispatchKey.AutocastCPU), *args, **kwargs)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch.DispatchKey.AutocastCPU)):
            if not gives_dtype:
                return op(*map(_float32, args), **{name: _float32(value) for name, value in kwargs.items()})
            if _is_eligible(args[0]) and kwargs.get("dtype", args[dtype] if len(args) > dtype else None) is None:
                args, kwargs = args[:dtype], {**kwargs, "dtype": torch.float32}
            return op(*args, **kwargs)

    return rule


def _is_eligible(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype is not torch.float64


def _float32(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_float32(one) for one in value]
    return value.float() if _is_eligible(value) else value


class _Made(NamedTuple):
    """A tensor that an operation makes. For a view ``offset`` counts from the offset of what is viewed."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    offset: int = 0


class _Unknown(Exception):
    """An operation whose result cannot be told from its arguments' shapes."""


def _slice(x: FakeTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> _Made:
    picked = range(x.shape[dim])[start:end:step]
    shape, stride = list(x.shape), list(x.stride())
    shape[dim], stride[dim] = len(picked), stride[dim] * step
    return _Made(tuple(shape), tuple(stride), x.dtype, x.fake_device, picked.start * x.stride()[dim])


def _as_strided(x: FakeTensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> _Made:
    moved = 0 if offset is None else offset - int(x.storage_offset())
    return _Made(tuple(size), tuple(stride), x.dtype, x.fake_device, moved)


# Views at a place that is another each time.
_VIEWS: dict[Any, Callable[..., _Made]] = {
    torch.ops.aten.slice.Tensor: _slice,
    torch.ops.aten.as_strided.default: _as_strided,
}
# Operations whose memory format hangs on the device.
_OWN_WAYS = {
    torch.ops.aten.convolution.default,
    torch.ops.aten.convolution_backward.default,
}
# Whether an operation makes new tensors, or views of its first argument, or changes that in place; None for any other.
_Kind = Literal["new", "view", "in place"]
_kinds: dict[Any, _Kind | None] = {}
# What an operation made, by its arguments: a tensor, or a sequence of them; () where it changed its first argument, None where
# the result hangs on more than shapes.
_Result = _Made | tuple[_Made, ...] | list[_Made]
_results: dict[Any, _Result | None] = {}


class _DryRun(FakeTensorMode):
    def __init__(self, of_cuda: bool, allow_non_fake_inputs: bool = False) -> None:
        super().__init__(allow_non_fake_inputs=allow_non_fake_inputs)
        self.of_cuda = of_cuda
        # What torch's constructor, which takes longer than all else here, sets in every tensor on a device.
        self._states: dict[torch.device, dict[str, Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in a dry run, and each operation would go through two more functions

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        if func is torch.ops.aten._local_scalar_dense.default and not self.allow_non_fake_inputs:
            return _value(args[0])
        if func is torch.ops.aten.lift_fresh.default and type(args[0]) is Tensor:
            return self._lift(args[0])
        if func in _VIEWS and isinstance(args[0], FakeTensor) and args[0].constant is None and not kwargs:
            return self._make(_VIEWS[func](*args), args[0])
        if func not in _kinds:
            _kinds[func] = _kind(func)
        kind = _kinds[func]
        if kind is None:
            return super().__torch_dispatch__(func, types, args, kwargs)
        try:
            key = (func, _described(args, self), _described(kwargs, self))
            known = _results.get(key, key)
        except (_Unknown, TypeError):  # an unhashable argument
            return super().__torch_dispatch__(func, types, args, kwargs)
        if known is None:
            return super().__torch_dispatch__(func, types, args, kwargs)
        if known is key:
            known = _asked(func, args, kwargs, kind)
            if known is None:
                result = super().__torch_dispatch__(func, types, args, kwargs)
                _results[key] = () if kind == "in place" else _told(result, args, kind)
                return result
            _results[key] = known
        if kind == "in place":
            return args[0] if func._schema.returns else None
        viewed = args[0] if kind == "view" else None
        if isinstance(known, _Made):
            return self._make(known, viewed)
        made = [self._make(cast(_Made, one), viewed) for one in known]
        return made if isinstance(known, list) else tuple(made)

    def _lift(self, tensor: Tensor) -> FakeTensor:
        """What a call of torch.tensor gives: of a single element the value stays known."""
        fake = self._make(_made(tensor, tensor.device), None)
        if tensor.numel() == 1:
            fake.constant = tensor.clone()
            self.fake_tensor_converter.add_constant_storage_mapping(fake)  # torch forgets it when it is written to
        return fake

    def _make(self, made: _Made, viewed: Tensor | None) -> FakeTensor:
        inside = torch.empty_strided(made.shape, made.stride, dtype=made.dtype, device="meta")
        if isinstance(viewed, FakeTensor):
            inside.set_(viewed.untyped_storage(), viewed.storage_offset() + made.offset, made.shape, made.stride)
        state = self._states.get(made.device)
        if state is None:
            first = FakeTensor(self, inside, made.device)
            self._states[made.device] = dict(vars(first))
            return first
        fake = Tensor._make_subclass(
            FakeTensor, inside, False, dispatch_device=True, device_for_backend_keys=made.device
        )
        torch._C._set_throw_on_mutable_data_ptr(fake)
        vars(fake).update(state)
        return fake


def _value(tensor: Tensor) -> bool | float | int:
    """Zero, unless it is known, as an optimizer's step count is."""
    known = tensor.constant if isinstance(tensor, FakeTensor) else tensor
    if known is not None:
        return known.item()
    return False if tensor.dtype is torch.bool else 0.0 if tensor.is_floating_point() else 0


def _kind(func: Any) -> _Kind | None:
    """What `_kinds` says of ``func``. Of several kinds in a schema, or of composite operations, nothing is known."""
    schema = func._schema
    written = [one.name for one in schema.arguments if one.alias_info is not None and one.alias_info.is_write]
    returned = [str(one.type) for one in schema.returns]
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    if composite or func.namespace not in ("aten", "fastlocal"):
        return None
    if schema.is_mutable:  # fused optimizers change several, and resize_ and its like the shape
        alone = written == [schema.arguments[0].name] and len(returned) <= 1
        return "in place" if alone and torch.Tag.inplace_view not in func.tags else None
    if not returned:
        return None
    if func is torch.ops.aten._unsafe_view.default:  # its schema does not say so
        return "view"
    if func.is_view and len(returned) == 1 and returned[0] in ("Tensor", "List[Tensor]"):
        return "view"
    alias = any(one.alias_info is not None for one in (*schema.arguments, *schema.returns))
    alone = all(one == "Tensor" for one in returned) or returned == ["List[Tensor]"]
    return "new" if not alias and alone else None


def _described(value: Any, mode: FakeTensorMode) -> Any:
    """All that the shape of a result hangs on, hashable."""
    if isinstance(value, Tensor):
        if isinstance(value, FakeTensor):
            known = value.fake_mode is mode and value.constant is None
        else:
            known = mode.allow_non_fake_inputs and type(value) in (Tensor, nn.Parameter)
        if not known or value.layout is not torch.strided:
            raise _Unknown
        return value.shape, value.stride(), value.dtype, _device(value)
    if isinstance(value, (tuple, list)):
        return tuple([_described(one, mode) for one in value])
    if isinstance(value, dict):
        return tuple([(name, _described(one, mode)) for name, one in value.items()])
    return value if type(value) is not float and type(value) is not bool else (type(value), value)  # 1 == 1.0 == True


def _device(tensor: Tensor) -> torch.device:
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


def _asked(func: Any, args: Any, kwargs: Any, kind: _Kind) -> _Result | None:
    """What ``func`` makes, as its kernel for tensors on "meta" says, which takes a tenth of the time that torch's fake tensors
    do; None where it hangs on the device, or on more than one."""
    if func in _OWN_WAYS:
        return None
    devices: set[torch.device] = set()
    try:
        args, kwargs = _on_meta(args, devices), _on_meta(kwargs, devices)
        if len(devices) != 1:
            return None
        result = func(*args, **kwargs)
    except (RuntimeError, ValueError, TypeError):  # the mode says it in its own words
        return None
    return () if kind == "in place" else _told(result, args, kind, devices.pop())


def _on_meta(value: Any, devices: set[torch.device]) -> Any:
    """``value`` with tensors of the same shape, strides and dtype on "meta"; adds the devices where they were."""
    if isinstance(value, Tensor):
        devices.add(_device(value))
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, torch.device):
        devices.add(value)
        return torch.device("meta")
    if isinstance(value, (tuple, list)):
        return [_on_meta(one, devices) for one in value]
    return {name: _on_meta(one, devices) for name, one in value.items()} if isinstance(value, dict) else value


def _told(result: Any, args: Any, kind: _Kind, device: torch.device | None = None) -> _Result | None:
    """``result`` for `_results`; None where it is not new, or no view of the first argument, or has a value.

    Args:
        device: where it would be, if it is on "meta".
    """
    tensors = result if isinstance(result, (tuple, list)) else (result,)
    if not all(isinstance(one, Tensor) and getattr(one, "constant", None) is None for one in tensors):
        return None
    places = [device or _device(one) for one in tensors]
    if kind == "view":
        viewed, storage = args[0].storage_offset(), args[0].untyped_storage()
        if any(one.untyped_storage()._cdata != storage._cdata for one in tensors):
            return None
        made = [_made(one, place, one.storage_offset() - viewed) for one, place in zip(tensors, places, strict=True)]
    else:
        made = [_made(one, place) for one, place in zip(tensors, places, strict=True)]
        storages = {one.untyped_storage()._cdata for one in tensors}
        whole = all(one.storage_offset() == 0 and one.untyped_storage().nbytes() == _extent(one) for one in tensors)
        if len(storages) < len(made) or not whole:
            return None
    return made[0] if isinstance(result, Tensor) else made if isinstance(result, list) else tuple(made)


def _made(tensor: Tensor, device: torch.device, offset: int = 0) -> _Made:
    return _Made(tuple(tensor.shape), tensor.stride(), tensor.dtype, device, offset)


def _extent(tensor: Tensor) -> int:
    """Bytes from the first to the last element."""
    if tensor.numel() == 0:
        return 0
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size()
