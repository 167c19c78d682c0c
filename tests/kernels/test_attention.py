"""`attention`: the reference against float64 written out, and the interpreted kernels against both."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastlocal.kernels import attention, use_kernels

ErrorOf = Callable[[Tensor, Tensor], float]

# Rounding bands of one op: a few units in the last place of what the tensor cores read. Interpreted bfloat16 truncates
# where a card rounds, so its band is twice as wide.
BAND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def problem(
    batch: int = 2, heads: int = 2, length: int = 17, head_dim: int = 16,
    dtype: torch.dtype = torch.float32, bias: bool = True, seed: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """timm's packed qkv [B, N, 3, heads, D], a bias, and an upstream gradient."""
    torch.manual_seed(seed)
    qkv = torch.randn(batch, length, 3, heads, head_dim, dtype=dtype)
    return (
        qkv,
        torch.randn(heads, length, length) if bias else None,
        torch.randn(batch, heads, length, head_dim).to(dtype),
    )


def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    scores = (q * scale) @ k.mT
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    return scores.softmax(-1) @ v


def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return attention(q, k, v, bias=bias, scale=scale)


def run(
    op: Callable[..., Tensor],
    qkv: Tensor,
    bias: Tensor | None,
    d_out: Tensor,
    *,
    scale: float = 0.31,
    kernels: Any = "auto",
) -> list[Tensor]:
    """The output and the gradients of q, k, v and bias."""
    q, k, v = (x.detach().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4).unbind(0))
    bias = None if bias is None else bias.detach().requires_grad_()
    with use_kernels(kernels):
        out = op(q, k, v, bias, scale)
        return [out.detach(), *torch.autograd.grad(out, [q, k, v] + ([] if bias is None else [bias]), d_out)]


def in_float64(*tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 17, 16), (2, 3, 5, 40)])
def test_reference_is_exact_in_float64(shape: tuple[int, ...], bias: bool, relative_error: ErrorOf) -> None:
    inputs = in_float64(*problem(*shape, bias=bias))
    for out, expected in zip(run(ours, *inputs), run(eager, *inputs), strict=True):
        assert relative_error(out, expected) < 1e-13


def test_reference_gradients_are_those_of_finite_differences() -> None:
    q, k, v = (torch.randn(1, 2, 3, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: attention(*x[:3], bias=x[3]), (q, k, v, bias))


@pytest.mark.parametrize("dtype", BAND, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", [(2, 2, 17, 24), (1, 1, 197, 64), (1, 2, 65, 128), (2, 1, 33, 80)], ids=str)
def test_triton_matches_float64_and_is_as_exact_as_eager(
    shape: tuple[int, ...], bias: bool, dtype: torch.dtype, relative_error: ErrorOf
) -> None:
    inputs = problem(*shape, dtype=dtype, bias=bias)
    expected = run(eager, *in_float64(*inputs))
    results = run(ours, *inputs, kernels="triton"), run(eager, *inputs), expected
    for name, out, eagerly, exact in zip(("out", "d_q", "d_k", "d_v", "d_bias"), *results, strict=False):
        error = relative_error(out, exact)
        assert error < BAND[dtype], name
        assert error <= 2 * relative_error(eagerly, exact) + BAND[dtype] / 4, name
        assert out.dtype == (torch.float32 if name == "d_bias" else dtype), name


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(2, 70), st.integers(16, 128)),
    bias=st.booleans(),
    scale=st.floats(0.05, 0.3),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_triton_matches_float64_at_random_shapes(
    relative_error: ErrorOf, shape: tuple[int, ...], bias: bool, scale: float, dtype: torch.dtype
) -> None:
    inputs = problem(*shape, dtype=dtype, bias=bias, seed=sum(shape))
    expected = run(eager, *in_float64(*inputs), scale=scale)
    results = run(ours, *inputs, kernels="triton", scale=scale), run(eager, *inputs, scale=scale), expected
    for out, eagerly, exact in zip(*results, strict=True):
        assert relative_error(out, exact) <= 2 * relative_error(eagerly, exact) + BAND[dtype] / 4


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_one_token_attends_to_itself(kernels: str, relative_error: ErrorOf) -> None:
    qkv, bias, d_out = problem(length=1)
    out, d_q, d_k, d_v, d_bias = run(ours, qkv, bias, d_out, kernels=kernels)
    assert relative_error(out, qkv[:, :, 2].transpose(1, 2)) < 1e-6
    assert relative_error(d_v, d_out) < 1e-6
    assert max(gradient.abs().max() for gradient in (d_q, d_k, d_bias)) < 1e-6


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "one head for all": lambda x: x[:, :1].expand_as(x),
    "unaligned rows": lambda x: torch.cat([x, x[..., :3]], -1)[..., : x.shape[-1]],
    "sliced tokens": lambda x: torch.cat([x[:, :, :1], x], 2)[:, :, 1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_with_a_unit_last_one(layout: str, relative_error: ErrorOf) -> None:
    qkv, bias, _ = problem(heads=3, head_dim=24)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    q, k, v = LAYOUTS[layout](q), k, LAYOUTS[layout](v)
    transposed = bias.mT.contiguous().mT  # type: ignore[union-attr]
    leaves = [x.detach().requires_grad_() for x in (q, k, v, transposed)]
    with use_kernels("triton"):
        out = ours(*leaves, scale=0.3)
        gradients = torch.autograd.grad(out.sum(), leaves)  # an expanded upstream gradient: every stride is 0
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    expected = eager(*doubles, scale=0.3)
    assert relative_error(out, expected) < 1e-5
    for gradient, exact in zip(gradients, torch.autograd.grad(expected.sum(), doubles), strict=True):
        if exact.norm() > 1e-8:
            assert relative_error(gradient, exact) < 1e-5


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_a_bias_of_minus_infinity_hides_keys(kernels: str, relative_error: ErrorOf) -> None:
    qkv, bias, d_out = problem(length=70)
    assert bias is not None
    bias[:, :, :66] = -math.inf  # every key of the first block
    bias[1, 3] = -math.inf  # every key of one query
    results = run(ours, qkv, bias, d_out, kernels=kernels)
    assert all(result.isfinite().all() for result in results)
    out, d_q, *_, d_bias = results
    assert (out[:, 1, 3] == 0).all()
    assert (d_q[:, 1, 3] == 0).all()
    assert (d_bias[bias == -math.inf] == 0).all()
    safe = bias.clone()
    safe[1, 3] = 0
    expected = run(eager, *in_float64(qkv, safe, d_out))
    assert relative_error(out[:, 0], expected[0][:, 0]) < 1e-5
    assert relative_error(d_q[:, 0], expected[1][:, 0]) < 1e-5


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_two_runs_give_the_same_bits(kernels: str) -> None:
    inputs = problem(length=40)
    for first, second in zip(run(ours, *inputs, kernels=kernels), run(ours, *inputs, kernels=kernels), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_output_joins_its_heads_without_a_copy(kernels: str) -> None:
    qkv, bias, _ = problem()
    with use_kernels(kernels):
        out = ours(*qkv.permute(2, 0, 3, 1, 4).unbind(0), bias, 1.0)
    joined = out.transpose(1, 2).reshape(2, 17, 32)
    assert joined.data_ptr() == out.data_ptr()


@pytest.mark.parametrize("bias", [False, True])
def test_saves_its_inputs_the_output_and_one_number_per_query(bias: bool) -> None:
    qkv, bias_tensor, _ = problem(dtype=torch.bfloat16, bias=bias)
    q, k, v = (x.detach().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4).unbind(0))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        attention(q, k, v, bias=bias_tensor)
    element, queries = q.itemsize, 2 * 2 * 17
    assert sum(x.nbytes for x in saved) == 4 * queries * 16 * element + queries * 4 + (2 * 17 * 17 * 4 if bias else 0)


def test_every_subset_of_inputs_that_require_grad(relative_error: ErrorOf) -> None:
    qkv, bias, d_out = problem(length=4)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    expected = run(ours, qkv, bias, d_out)[1:]
    for kernels, *subset in itertools.product(("reference", "triton"), *[(False, True)] * 4):
        leaves = [x.detach().requires_grad_(need) for x, need in zip((q, k, v, bias), subset, strict=True)]  # type: ignore[union-attr]
        with use_kernels(kernels):  # type: ignore[arg-type]
            out = ours(*leaves, scale=0.31)
            assert out.requires_grad == any(subset)
            if any(subset):
                out.backward(d_out)
        for leaf, need, gradient in zip(leaves, subset, expected, strict=True):
            assert (leaf.grad is not None) == need
            assert leaf.grad is None or relative_error(leaf.grad, gradient) < 1e-5


def test_autocast_casts_q_k_v_and_leaves_the_bias_gradient_in_float32(relative_error: ErrorOf) -> None:
    qkv, bias, d_out = problem()
    with torch.autocast("cpu", torch.bfloat16):
        out, d_q, _, _, d_bias = run(ours, qkv, bias, d_out.bfloat16())
    assert (out.dtype, d_q.dtype, d_bias.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert 1e-5 < relative_error(out, run(eager, *in_float64(qkv, bias, d_out))[0]) < BAND[torch.bfloat16]


def test_cards_without_tensor_cores_take_sdpa(monkeypatch: pytest.MonkeyPatch, relative_error: ErrorOf) -> None:
    monkeypatch.setitem(attention.__globals__, "_sdpa_instead", lambda device: True)
    monkeypatch.setitem(attention.__globals__, "_forward", None)
    inputs = problem()
    for out, exact in zip(run(ours, *inputs), run(eager, *in_float64(*inputs)), strict=True):
        assert relative_error(out, exact) < 1e-5


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_opcheck(kernels: str) -> None:
    qkv, bias, d_out = problem(length=5)
    q, k, v = (x.detach().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4).unbind(0))
    assert bias is not None
    with use_kernels(kernels):  # type: ignore[arg-type]
        torch.library.opcheck(torch.ops.fastlocal.attention.default, (q, k, v, bias.requires_grad_(), 0.3))
        out, lse = torch.ops.fastlocal.attention(q.detach(), k.detach(), v.detach(), None, 0.3)
        backward_inputs = (d_out, q.detach(), k.detach(), v.detach(), None, 0.3, out, lse, False)
        torch.library.opcheck(torch.ops.fastlocal.attention_backward.default, backward_inputs)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.bias = nn.Linear(32, 96), nn.Parameter(torch.randn(1, 2, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
        return attention(q, k, v, bias=self.bias).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_compiles_into_one_graph(kernels: str, relative_error: ErrorOf) -> None:
    torch.manual_seed(0)
    module, x = SelfAttention(), torch.randn(2, 5, 32)
    results = []
    with use_kernels(kernels):  # type: ignore[arg-type]
        for call in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
            module.zero_grad()
            out = call(x)
            out.square().sum().backward()
            results.append([out.detach(), *(p.grad.clone() for p in module.parameters())])
    for eagerly, compiled in zip(*results, strict=True):
        assert relative_error(compiled, eagerly) < 1e-6


def test_once_differentiable() -> None:
    q = torch.randn(1, 1, 3, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(attention(q, q, q).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no autograd formula|does not require grad"):
        gradient.sum().backward()


def test_flops_are_counted_as_those_of_sdpa() -> None:
    counts = []
    for op in (attention, F.scaled_dot_product_attention):
        q, k, v = (torch.randn(2, 3, 20, 16, device="meta", requires_grad=True) for _ in range(3))
        if op is attention:
            q, k, v = (torch.randn(2, 3, 20, 16, requires_grad=True) for _ in range(3))
        with FlopCounterMode(display=False) as counter:
            out = op(q, k, v)
            forward = counter.get_total_flops()
            out.sum().backward()
        counts.append((forward, counter.get_total_flops() - forward))
    assert counts[0][0] == 2 * 2 * (2 * 3) * 20 * 20 * 16
    assert counts[0][1] == 5 * counts[0][0] // 2
    assert counts[1][0] == counts[0][0]


Q = torch.randn(2, 3, 5, 16)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"q": Q[0]}, r"q must be \[B, heads, N, D\] with no empty dimension, got \[3, 5, 16\]\."),
        ({"q": Q[:0]}, "q must be .* no empty dimension"),
        ({"q": Q[..., :8]}, "q must have a head dimension D from 16 to 128, got 8"),
        ({"q": Q.int()}, "q must be float16, bfloat16, float32 or float64, got torch.int32"),
        ({"k": Q[:, :2]}, r"k must have q's shape \[2, 3, 5, 16\], got \[2, 2, 5, 16\]"),
        ({"v": Q.half()}, "v must have q's dtype torch.float32, got torch.float16"),
        ({"v": Q.mT.contiguous().mT}, "v must have unit stride in its last dimension, got strides"),
        ({"k": Q.to("meta")}, "k must be on q's device, cpu, got meta"),
        ({"bias": torch.randn(3, 5, 4)}, r"bias must be \[heads, N, N\] = \[3, 5, 5\] or .*, got \[3, 5, 4\]"),
        ({"bias": torch.randn(2, 3, 5, 5)}, "bias must be"),
        ({"bias": torch.ones(3, 5, 5, dtype=torch.bool)}, "bias must be float16, .* got torch.bool"),
        ({"bias": torch.randn(3, 5, 5, device="meta")}, "bias must be on q's device"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Tensor], sentence: str) -> None:
    arguments = {"q": Q, "k": Q, "v": Q, "bias": None} | change
    with pytest.raises(ValueError, match=sentence) as error:
        attention(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_every_compile_case_names_what_its_kernel_takes() -> None:
    from fastlocal.kernels.attention_triton import compile_cases

    cases = compile_cases()
    assert len({case.name for case in cases}) == len(cases) == 3 * 4 * 7 + 2 * (3 + 3 + 1)
    for case in cases:
        assert set(case.signature) | set(case.constexprs) == set(case.kernel.arg_names), case.name
        assert not set(case.signature) & set(case.constexprs), case.name
