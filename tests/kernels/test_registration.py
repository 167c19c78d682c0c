"""Every fused op as a citizen of PyTorch: transforms, devices, and one implementation for forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacrev, jvp, vmap

from fastlocal.kernels import (
    attention,
    dispatch,
    reconstruction_loss,
    registration,
    rotary_embedding,
    use_kernels,
    window_attention,
)


class Case(NamedTuple):
    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]  # that get gradients


def _cases() -> dict[str, Case]:
    """On the default device."""
    torch.manual_seed(0)
    target, angles = torch.randn(1, 4, 4, 2), torch.randn(3, 8)
    return {
        "window_attention": Case(
            lambda qkv, table: window_attention(qkv, table, num_heads=1, window_size=2, shift=1),
            (torch.randn(1, 4, 4, 12), torch.randn(9, 1)),
        ),
        "reconstruction_loss": Case(
            lambda hidden, weight: reconstruction_loss(
                hidden, weight, None, target, upsample=2, kind="smooth_l1", reduction="sample"
            ),
            (torch.randn(1, 2, 2, 3), torch.randn(8, 3)),
        ),
        "rotary_embedding": Case(lambda x: rotary_embedding(x, angles, prefix=1), (torch.randn(2, 2, 4, 4),)),
    }


@pytest.fixture(params=_cases())
def case(request: pytest.FixtureRequest) -> Case:
    return _cases()[request.param]


def _eager_gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(function(*leaves).square().sum(), leaves)


# --- torch.func -------------------------------------------------------------------------------------------------------


def test_grad_and_jacrev(case: Case) -> None:
    expected = _eager_gradients(*case)
    arguments = tuple(range(len(case.inputs)))
    found = grad(lambda *inputs: case.function(*inputs).square().sum(), arguments)(*case.inputs)
    torch.testing.assert_close(found, expected)
    out = case.function(*case.inputs)
    jacobians = jacrev(case.function, arguments)(*case.inputs)
    for jacobian, exact in zip(jacobians, expected, strict=True):
        torch.testing.assert_close(torch.tensordot(2 * out, jacobian, out.ndim), exact)


def test_vmap_over_any_input_and_its_gradients(case: Case) -> None:
    for mapped in range(len(case.inputs)):
        stacked = [
            tensor if i != mapped else torch.stack([tensor, 2 * tensor], 1) for i, tensor in enumerate(case.inputs)
        ]
        in_dims = tuple(1 if i == mapped else None for i in range(len(case.inputs)))

        def gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
            return grad(lambda *inputs: case.function(*inputs).square().sum(), tuple(range(len(inputs))))(*inputs)

        out, found = vmap(case.function, in_dims)(*stacked), vmap(gradients, in_dims)(*stacked)
        for i in range(2):
            inputs = tuple(tensor if j != mapped else (i + 1) * tensor for j, tensor in enumerate(case.inputs))
            torch.testing.assert_close(out[i], case.function(*inputs))
            torch.testing.assert_close(tuple(tensor[i] for tensor in found), _eager_gradients(case.function, inputs))


def test_forward_mode_is_refused(case: Case) -> None:
    sentence = r"has no forward-mode derivative .*: use reverse mode"
    with pytest.raises(NotImplementedError, match=sentence):
        jvp(case.function, case.inputs, case.inputs)
    with torch.no_grad(), pytest.raises(NotImplementedError, match=sentence):
        jvp(case.function, case.inputs, case.inputs)
    first, *rest = case.inputs
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=sentence):
        case.function(forward_ad.make_dual(first, first), *rest)
    with pytest.raises(NotImplementedError, match=sentence):
        hessian(lambda x: case.function(x, *case.inputs[1:]).square().sum())(case.inputs[0])


def test_compiled_forward_mode_is_refused(case: Case) -> None:
    """What is compiled is the op itself, and must not answer with a zero."""

    def derivative(*inputs: Tensor) -> Tensor:
        return jvp(case.function, inputs, inputs)[1]

    compiled = torch.compile(derivative, backend="aot_eager")
    with pytest.raises(Exception, match="forward"):
        compiled(*case.inputs)


@pytest.mark.parametrize("name", ["window_attention", "reconstruction_loss"])
def test_second_derivatives_are_refused(name: str) -> None:
    case = _cases()[name]

    def loss(x: Tensor) -> Tensor:
        return case.function(x, *case.inputs[1:]).square().sum()

    with pytest.raises(RuntimeError, match=r"backward cannot be differentiated: .* first derivatives only"):
        grad(lambda x: grad(loss)(x).sum())(case.inputs[0])
    x = case.inputs[0].clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"backward cannot be differentiated: .* first derivatives only"):
        first.sum().backward()


def test_direct_calls_of_the_op_have_gradients_too() -> None:
    """torch.ops.fastlocal is what torch.compile sees."""
    case = _cases()["window_attention"]
    qkv, table = (tensor.clone().requires_grad_() for tensor in case.inputs)
    geometry = (1, 2, 2, 1, 1, 4**-0.5, "auto")
    out = torch.ops.fastlocal.window_attention(qkv, table, None, *geometry)
    found = torch.autograd.grad(out.square().sum(), (qkv, table))
    torch.testing.assert_close(found, _eager_gradients(*case))


# --- Devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", _cases())
def test_meta_tensors(name: str) -> None:
    case = _cases()[name]
    with torch.device("meta"):
        function, inputs = _cases()[name]
    for tensor in inputs:
        tensor.requires_grad_()
    out = function(*inputs)
    assert out.device.type == "meta"
    assert out.shape == case.function(*case.inputs).shape
    out.sum().backward()
    assert [tensor.grad is not None and tensor.grad.shape == tensor.shape for tensor in inputs] == [True] * len(inputs)


@pytest.mark.usefixtures("interpreter")
def test_every_launch_is_on_its_tensors_device(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device. The guard sees the tensors' device around every launch, both directions."""
    from triton.runtime.interpreter import GridExecutor

    guarded: list[torch.device] = []
    launches: list[bool] = []
    device_of, launch = registration.device_of, GridExecutor.__call__

    @contextmanager
    def recorded(tensor: Tensor) -> Iterator[None]:
        guarded.append(tensor.device)
        with device_of(tensor):
            yield
        guarded.pop()

    def recorded_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        launches.append(guarded[-1:] == [case.inputs[0].device])
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(registration, "device_of", recorded)
    monkeypatch.setattr(GridExecutor, "__call__", recorded_launch)
    with use_kernels("triton"):
        _eager_gradients(*case)
    assert len(launches) >= 2
    assert all(launches)


def test_the_guard_switches_to_a_cards_index_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]
    switches: list[int] = []

    def exchange(index: int) -> int:
        switches.append(index)
        previous, current[0] = current[0], index
        return previous

    monkeypatch.setattr(torch._C, "_accelerator_exchangeDevice", exchange)
    monkeypatch.setattr(torch._C, "_accelerator_maybeExchangeDevice", exchange)

    class OnSecondCard:
        device = torch.device("cuda", 1)

    with registration.device_of(OnSecondCard()):  # type: ignore[arg-type]
        assert current == [1]
    assert switches == [1, 0]
    with registration.device_of(torch.empty(1, device="cpu")), registration.device_of(torch.empty(1, device="meta")):
        assert switches == [1, 0]


# --- One implementation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", ["triton", "reference"])
def test_backward_runs_what_its_forward_ran(case: Case, chosen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also outside ``use_kernels``, and after another choice."""
    ran: list[str] = []
    implementation = dispatch.implementation

    def recorded(*args: Any) -> str:
        ran.append(implementation(*args))
        return ran[-1]

    monkeypatch.setattr(dispatch, "implementation", recorded)
    leaves = [tensor.clone().requires_grad_() for tensor in case.inputs]
    with use_kernels(chosen):
        out = case.function(*leaves)
    with use_kernels("reference" if chosen == "triton" else "triton"):
        out.sum().backward()
    assert ran == [chosen] * 2


# --- One binary -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("interpreter")
def test_one_binary_for_every_image_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes seconds: training at many sizes must not do it for each."""
    from triton.runtime.interpreter import InterpretedFunction

    binaries: set[tuple[Any, ...]] = set()
    run = InterpretedFunction.run

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        binaries.add(_specialization(self, args, kwargs))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", recorded)
    counts = []
    for height, width in ((4, 4), (4, 8), (16, 4), (12, 20)):
        qkv, table = torch.randn(1, height, width, 48), torch.randn(49, 1)
        hidden, weight, target = torch.randn(1, height, width, 16), torch.randn(8, 16), torch.randn(1, height, width, 8)
        with use_kernels("triton"):
            _eager_gradients(lambda *x: window_attention(*x, num_heads=1, window_size=4, shift=2), (qkv, table))
            _eager_gradients(lambda *x, target=target: reconstruction_loss(*x, None, target), (hidden, weight))
            tokens, angles = torch.randn(1, 1, height * width, 16), torch.randn(height * width - 1, 32)
            _eager_gradients(lambda x, angles=angles: rotary_embedding(x, angles, prefix=1), (tokens,))
        counts.append(len(binaries))
    assert counts[0] == counts[-1] == 7, sorted(binaries)  # forward, backward, sum; loss, gradient; forward, gradient


@pytest.mark.usefixtures("interpreter")
def test_every_launch_says_what_its_kernel_is_compiled_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the compile report does; Triton's own choices are another kernel, and change with its version."""
    from triton.runtime.interpreter import InterpretedFunction

    launched: dict[str, set[str]] = {}

    def recorded(self: Any, *args: Any, **kwargs: Any) -> None:
        launched[self.fn.__name__] = kwargs.keys() & {"num_warps", "num_stages", "enable_fp_fusion"}

    monkeypatch.setattr(InterpretedFunction, "run", recorded)
    with use_kernels("triton"):
        for width, window in ((48, 4), (48, 16), (96, 24)):
            qkv, table = torch.randn(1, window, window, width), torch.randn((2 * window - 1) ** 2, 1)
            _eager_gradients(
                lambda *x, window=window: window_attention(*x, num_heads=1, window_size=window, shift=0), (qkv, table)
            )
        for queries, bias in ((8, None), (8, torch.randn(2, 8, 8)), (300, None), (300, torch.randn(2, 300, 300))):
            q, k, v = torch.randn(3, 1, 2, queries, 64)
            _eager_gradients(lambda *x, bias=bias: attention(*x, bias=bias), (q, k, v))
            if bias is not None:
                _eager_gradients(lambda x, q=q, k=k, v=v: attention(q, k, v, bias=x), (bias,))
        hidden, weight, target = torch.randn(1, 4, 4, 16), torch.randn(8, 16), torch.randn(1, 4, 4, 8)
        _eager_gradients(lambda *x: reconstruction_loss(*x, None, target, normalize_target=True), (hidden, weight))
        _eager_gradients(lambda x: rotary_embedding(x, torch.randn(8, 32)), (torch.randn(1, 1, 8, 16),))
    assert {name for name, said in launched.items() if len(said) < 3} == set()
    cases = [
        case
        for name in ("attention", "reconstruction_loss", "rotary_embedding", "window_attention")
        for case in import_module(f"fastlocal.kernels.{name}_triton").compile_cases()
    ]
    assert set(launched) == {case.kernel.fn.__name__ for case in cases}


def _specialization(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What Triton compiles a binary for: constants, types, and of integers whether they are 1 or multiples of 16."""
    plain = function.kwargs.get("do_not_specialize") or ()
    given = dict(zip(function.arg_names, args, strict=False)) | kwargs
    return (
        function.fn.__name__,
        *((name, _kind(value, name in plain)) for name, value in given.items() if name != "grid"),
    )


def _kind(value: Any, plain: bool) -> Any:
    if isinstance(value, Tensor):
        return value.dtype
    if isinstance(value, bool) or not isinstance(value, int):
        return type(value) if isinstance(value, float) else value
    return int if plain else (value == 1, value % 16 == 0)
