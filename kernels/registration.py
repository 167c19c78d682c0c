"""How a fused op becomes PyTorch's: schema, implementation, fake, batching rule and gradient.

torch.compile, dispatch modes and torch.ops see an op of torch.library. Eager code reaches it through an
autograd.Function, for two reasons: torch.func can transform it, which it cannot do to an op with a registered gradient,
and a call costs half the processor time of a `torch.library.custom_op`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

Function = Callable[..., Any]
_library = torch.library.Library("fastlocal", "FRAGMENT")


def register(
    schema: str,
    run: Function,
    fake: Function,
    *,
    setup_context: Function | None = None,
    backward: Function | None = None,
) -> Function:
    """Register ``fastlocal::{schema}``; returns the function to call it by.

    Args:
        schema: as torch.library's, its first argument a tensor.
        run: computes the results. The first argument's device is the current one then, whatever the caller's was:
            Triton launches on the current device.
        fake: makes empty results, for tensors without data.
        setup_context, backward: as in torch.library.register_autograd. Without them a gradient is refused.
    """
    name = schema.partition("(")[0]
    is_gradient = backward is None
    keep = setup_context or _keep_nothing
    differentiate = backward or functools.partial(_refuse_gradient, name)

    def on_its_device(*args: Any) -> Any:
        with device_of(args[0]):
            return run(*args)

    _library.define(schema)
    _library.impl(name, on_its_device, "CompositeExplicitAutograd")
    op = getattr(torch.ops.fastlocal, name).default
    torch.library.register_fake(op, fake, lib=_library)
    torch.library.register_vmap(op, functools.partial(_one_by_one, op), lib=_library)
    torch.library.register_autograd(op, differentiate, setup_context=keep, lib=_library)

    def below_autograd(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():  # the gradient is a Function's below, not the op's
            return op(*args)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = below_autograd(*args)
            keep(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return differentiate(ctx, *gradients)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> NoReturn:
            _refuse_forward_mode(name)

    class Transformable(Differentiable):  # for torch.func; binding its arguments costs 30 us a call
        generate_vmap_rule = True
        forward = staticmethod(below_autograd)  # type: ignore[assignment]  # without ctx: `setup_context` has it
        setup_context = staticmethod(keep)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            if _in_forward_mode():  # the op takes no notice of tangents, which is a derivative of zero
                _refuse_forward_mode(name)
            return op(*args)
        if torch._C._are_functorch_transforms_active():
            return Transformable.apply(*args)
        return below_autograd(*args) if is_gradient and not torch.is_grad_enabled() else Differentiable.apply(*args)

    return call


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the device of ``tensor`` the current one of its kind, be it CUDA, ROCm or XPU; nothing to do on a CPU."""
    return (
        nullcontext() if tensor.device.type in ("cpu", "meta") else torch.accelerator.device_index(tensor.device.index)
    )


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off on ``device``; costs nothing where it is off."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast casts to on ``device``; None where it is off or unknown, as on "meta"."""
    if _has_autocast(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


@torch.compiler.assume_constant_result  # torch 2.11 cannot trace the question, and would cut the graph here
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def _one_by_one(op: Function, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """torch.vmap of ``op``: a loop over the mapped dimension. Right for every argument, and as fast as calling it so."""
    calls = [
        op(*(arg.select(dim, i) if isinstance(dim, int) else arg for arg, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    return tuple(map(torch.stack, zip(*calls, strict=True))), (0,) * len(calls[0])


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


@torch.compiler.assume_constant_result
def _in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def _refuse_forward_mode(name: str) -> NoReturn:
    raise NotImplementedError(
        f"{name} has no forward-mode derivative (torch.func.jvp, jacfwd, hessian): use reverse mode, as torch.func.grad, "
        "vjp and jacrev do."
    )


def _refuse_gradient(name: str, *args: Any) -> NoReturn:
    raise RuntimeError(f"{name} cannot be differentiated: fastlocal's ops have first derivatives only.")
