"""`attention`: the reference against float64 written out, and the interpreted kernels against both."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastlocal.kernels import attention, dispatch, use_kernels

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
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
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
def test_saves_its_inputs_the_output_and_two_numbers_per_query(bias: bool) -> None:
    qkv, bias_tensor, _ = problem(dtype=torch.bfloat16, bias=bias)
    q, k, v = (x.detach().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4).unbind(0))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x), use_kernels("triton"):
        attention(q, k, v, bias=bias_tensor)
    element, queries = q.itemsize, 2 * 2 * 17
    assert sum(x.nbytes for x in saved) == 4 * queries * 16 * element + queries * 8 + (2 * 17 * 17 * 4 if bias else 0)


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
    with torch.autocast(qkv.device.type, torch.bfloat16):
        out, d_q, _, _, d_bias = run(ours, qkv, bias, d_out.bfloat16())
    assert (out.dtype, d_q.dtype, d_bias.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert 1e-5 < relative_error(out, run(eager, *in_float64(qkv, bias, d_out))[0]) < BAND[torch.bfloat16]


@pytest.mark.parametrize("shape", ["shared", "per sample", "keys"])
def test_sdpa_where_triton_cannot_run(monkeypatch: pytest.MonkeyPatch, shape: str, relative_error: ErrorOf) -> None:
    monkeypatch.setitem(attention.__globals__, "_forward", None)
    monkeypatch.setattr(dispatch, "why_not_triton", lambda device: "this device is an old one.")
    qkv, bias, d_out = problem()
    bias = {"shared": bias, "per sample": torch.randn(2, 2, 17, 17), "keys": torch.randn(2, 1, 1, 17)}[shape]
    for out, exact in zip(run(ours, qkv, bias, d_out), run(eager, *in_float64(qkv, bias, d_out)), strict=True):
        assert relative_error(out, exact) < 1e-5


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_opcheck(kernels: str) -> None:
    qkv, bias, d_out = problem(length=5)
    q, k, v = (x.detach().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4).unbind(0))
    assert bias is not None
    with use_kernels(kernels):  # type: ignore[arg-type]
        op, plain = torch.ops.fastlocal.attention.default, [x.detach() for x in (q, k, v)]
        torch.library.opcheck(op, (q, k, v, bias.requires_grad_()[None], 0.3, kernels))
        backward_inputs = (d_out, *plain, None, *op(*plain, None, 0.3, kernels), 0.3, kernels, False)
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
    with use_kernels("reference"):
        (gradient,) = torch.autograd.grad(attention(q, q, q).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"first derivatives only|does not require grad"):
        gradient.sum().backward()


def test_flops_are_counted_as_those_of_sdpa() -> None:
    counts = []
    for op in (attention, F.scaled_dot_product_attention):
        q, k, v = (torch.randn(2, 3, 20, 16, device="meta", requires_grad=True) for _ in range(3))
        if op is attention:
            q, k, v = (torch.randn(2, 3, 20, 16, requires_grad=True) for _ in range(3))
        with FlopCounterMode(display=False) as counter, use_kernels("reference"):
            out = op(q, k, v)
            forward = counter.get_total_flops()
            out.sum().backward()
        counts.append((forward, counter.get_total_flops() - forward))
    assert counts[0][0] == 2 * 2 * (2 * 3) * 20 * 20 * 16
    assert counts[0][1] == 5 * counts[0][0] // 2
    assert counts[1][0] == counts[0][0]


# --- Masks, shared heads, cross-attention -----------------------------------------------------------------------------

# heads, groups, N, M, D, shape of the bias
DOORS = {
    "per sample": (2, 2, 40, 40, 16, (3, 2, 40, 40)),
    "per sample, all heads": (2, 2, 40, 40, 16, (3, 1, 40, 40)),
    "one for all": (2, 2, 40, 40, 16, (40, 40)),
    "per sample, long": (1, 1, 140, 140, 16, (2, 1, 140, 140)),
    "keys": (2, 2, 40, 40, 16, (3, 1, 1, 40)),
    "queries": (1, 1, 40, 40, 16, (1, 40, 1)),
    "cross-attention": (2, 2, 5, 90, 16, (2, 5, 90)),
    "cross-attention, more queries": (2, 2, 140, 7, 16, None),
    "shared keys": (4, 2, 20, 20, 16, None),
    "shared keys, bias": (4, 1, 140, 20, 16, (4, 140, 20)),
    "narrow heads": (2, 2, 20, 20, 8, None),
    "wide heads": (1, 1, 20, 20, 200, (20, 20)),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kernels", ["reference", "triton", "auto"])
def test_biases_lengths_and_groups(door: str, kernels: str, relative_error: ErrorOf) -> None:
    heads, groups, queries, keys, head_dim, bias_shape = DOORS[door]
    torch.manual_seed(0)
    batch = bias_shape[0] if bias_shape is not None and len(bias_shape) == 4 else 2
    shapes = [(batch, heads, queries, head_dim), *[(batch, groups, keys, head_dim)] * 2]
    leaves = [torch.randn(shape, requires_grad=True) for shape in (*shapes, bias_shape) if shape is not None]
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    with use_kernels(kernels):  # type: ignore[arg-type]
        out = attention(*leaves[:3], bias=leaves[3] if len(leaves) == 4 else None, scale=0.3)
        d_out = torch.randn_like(out)
        found = [out, *torch.autograd.grad(out, leaves, d_out)]
    exact = eager(*doubles[:3], doubles[3] if len(leaves) == 4 else None, 0.3)
    expected = [exact, *torch.autograd.grad(exact, doubles, d_out.double())]
    for ours_, reference in zip(found, expected, strict=True):
        assert relative_error(ours_, reference) < 1e-5 or reference.norm() < 1e-12


@pytest.mark.parametrize("kernels", ["reference", "triton", "auto"])
def test_a_bool_bias_hides_keys(kernels: str) -> None:
    qkv, _, d_out = problem(length=40)
    sees = torch.rand(2, 1, 40, 40) < 0.5
    sees[0, 0, 3] = False  # a query that sees nothing
    additive = torch.zeros(2, 1, 40, 40).masked_fill(~sees, -math.inf)
    found = run(lambda q, k, v, _, scale: attention(q, k, v, bias=sees, scale=scale), qkv, None, d_out, kernels=kernels)
    expected = run(
        lambda q, k, v, _, scale: attention(q, k, v, bias=additive, scale=scale), qkv, None, d_out, kernels=kernels
    )
    for first, second in zip(found, expected, strict=True):
        assert torch.allclose(first, second, rtol=1e-6, atol=1e-7)
    assert (found[0][0, :, 3] == 0).all()


# --- Extreme rows -----------------------------------------------------------------------------------------------------


def softmax_of_rounded_scores(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """SDPA in float64 of scores that were rounded to float32, as those of SDPA in float32 are: a bias of -1e9 absorbs
    differences below 64. The rounding is straight-through for gradients."""
    scores = q @ k.mT * scale
    if bias is not None:
        scores = scores + bias
    scores = scores + (scores.detach().float().double() - scores.detach()).nan_to_num(0)  # -inf - -inf
    hidden = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(hidden, 0).softmax(-1).masked_fill(hidden, 0) @ v


@pytest.mark.parametrize("dtype", BAND, ids=str)
@pytest.mark.parametrize("keys", ["one", "some", "all"])
@pytest.mark.parametrize("value", [-math.inf, -1e4, -1e9, torch.finfo(torch.float32).min], ids=str)
@pytest.mark.parametrize("kernels", ["reference", "triton", "auto"])
def test_rows_of_masked_keys(
    kernels: str, value: float, keys: str, dtype: torch.dtype, relative_error: ErrorOf
) -> None:
    qkv, bias, d_out = problem(batch=1, length=36, dtype=dtype)
    assert bias is not None
    bias[0, :5, {"one": slice(3, 4), "some": slice(0, 33), "all": slice(None)}[keys]] = value
    results = run(ours, qkv, bias, d_out, kernels=kernels)
    expected = run(softmax_of_rounded_scores, *in_float64(qkv, bias, d_out))
    for name, out, exact in zip(("out", "d_q", "d_k", "d_v", "d_bias"), results, expected, strict=True):
        if kernels == "auto" and dtype != torch.float32 and keys == "all" and value != -math.inf:
            continue  # there the bias is rounded to SDPA's dtype, and with it what a row has in common
        assert out.isfinite().all(), name
        assert relative_error(out, exact) < 2 * BAND[dtype], name


@pytest.mark.parametrize("length", [20, 300])
@pytest.mark.parametrize(
    "element", [2.0**5, 2.0**9, 2.0**13]
)  # scores of 2**14, 4e6 and 1e9, exact in any order of sums
@pytest.mark.parametrize("bias", [False, True])
def test_huge_and_equal_scores(bias: bool, element: float, length: int, relative_error: ErrorOf) -> None:
    """Every score is the same huge number: the mean of v, whose gradient is the mean of d_out."""
    q = torch.full((1, 1, length, 16), element).requires_grad_()
    k, v = q.detach().clone().requires_grad_(), torch.randn(1, 1, length, 16, requires_grad=True)
    shared = torch.zeros(1, length, length) if bias else None
    d_out = torch.randn(1, 1, length, 16)
    with use_kernels("triton"):
        out = attention(q, k, v, bias=shared, scale=1.0)
        d_q, d_k, d_v = torch.autograd.grad(out, (q, k, v), d_out)
    assert relative_error(out, v.detach().mean(2, keepdim=True).expand_as(v)) < 1e-5
    assert relative_error(d_v, d_out.mean(2, keepdim=True).expand_as(v)) < 1e-5
    assert d_q.isfinite().all()
    assert d_k.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_huge_scores_give_probabilities(dtype: torch.dtype) -> None:
    """No probability exceeds 1 in the backward either: with d_out >= 0, no element of d_v exceeds the sum of d_out."""
    torch.manual_seed(0)
    q, k, v = ((1e4 * torch.randn(1, 1, 40, 16)).to(dtype).requires_grad_() for _ in range(3))
    d_out = torch.rand(1, 1, 40, 16).to(dtype)
    with use_kernels("triton"):
        (d_v,) = torch.autograd.grad(attention(q, k, v), v, d_out)
    assert d_v.isfinite().all()
    assert (d_v.double() <= 1.01 * d_out.double().sum(2, keepdim=True)).all()


def test_nan_is_not_hidden() -> None:
    qkv, _, d_out = problem(batch=1, length=20, bias=False)
    qkv[0, 3, 0] = math.nan
    out, d_q, *_ = run(ours, qkv, None, d_out, kernels="triton")
    assert out[0, :, 3].isnan().all()
    assert d_q[0, :, 3].isnan().all()


# --- Doors of PyTorch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_reverse_transforms(kernels: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 3, 16) for _ in range(3))
    bias = torch.randn(1, 3, 3)

    def ours_(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return attention(q, k, v, bias=bias, scale=0.3)

    def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return eager(q, k, v, bias, 0.3)

    arguments, every = (q, k, v, bias), (0, 1, 2, 3)
    transforms: list[Callable[[Any], Any]] = [
        lambda f: torch.func.grad(lambda *x: f(*x).square().sum(), every)(*arguments),
        lambda f: torch.func.jacrev(f, every)(*arguments),
        lambda f: torch.func.vjp(f, *arguments)[1](torch.ones_like(q)),
        lambda f: torch.func.vmap(f, (0, None, None, None))(torch.stack([q, 2 * q]), k, v, bias),
        lambda f: torch.func.vmap(torch.func.grad(lambda *x: f(*x).square().sum(), every), (0, None, None, 0))(
            torch.stack([q, 2 * q]), k, v, torch.stack([bias, 2 * bias])
        ),
    ]
    with use_kernels(kernels):  # type: ignore[arg-type]
        for transform in transforms:
            torch.testing.assert_close(transform(ours_), transform(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_forward_mode_is_refused(kernels: str) -> None:
    q = torch.randn(1, 1, 3, 16)
    with use_kernels(kernels), pytest.raises(NotImplementedError, match="attention has no forward-mode derivative"):  # type: ignore[arg-type]
        torch.func.jvp(lambda x: attention(x, x, x), (q,), (q,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_meta(dtype: torch.dtype) -> None:
    q = torch.randn(2, 3, 5, 16, device="meta", dtype=dtype, requires_grad=True)
    bias = torch.randn(3, 5, 5, device="meta", requires_grad=True)
    out = attention(q, q, q, bias=bias)
    out.sum().backward()
    assert (out.device.type, out.shape, q.grad.shape, bias.grad.shape) == ("meta", q.shape, q.shape, bias.shape)  # type: ignore[union-attr]


def test_backward_runs_what_its_forward_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside `use_kernels` too, and the other way round."""
    from fastlocal.kernels import attention_triton

    qkv, bias, d_out = problem(length=5)
    launched = []
    original = attention_triton.backward
    monkeypatch.setattr(attention_triton, "backward", lambda *args: launched.append(1) or original(*args))
    q, k, v = (x.detach().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4).unbind(0))
    with use_kernels("triton"):
        out = ours(q, k, v, bias, 0.3)
    out.backward(d_out)
    assert len(launched) == 1
    with use_kernels("reference"):
        out = ours(q, k, v, bias, 0.3)
    with use_kernels("triton"):
        out.backward(d_out)
    assert len(launched) == 1


def test_rows_further_apart_than_32_bits_count(tmp_path: Path) -> None:
    """A sequence-first layout of many samples and wide heads: 40 rows of 2**26 elements, on a CPU in a sparse file."""
    qkv, _, d_out = problem(batch=1, heads=1, length=40, dtype=torch.float16, bias=False)
    size = 39 * 2**26 + 16
    if qkv.device.type == "cpu":
        apart = torch.from_file(str(tmp_path / "rows"), shared=True, size=size, dtype=torch.float16)
    else:
        apart = torch.empty(size, dtype=torch.float16)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    far = apart.as_strided(q.shape, (1, 1, 2**26, 1)).copy_(q)
    results = []
    for tensor in (q, far):
        leaves = [x.detach().requires_grad_() for x in (tensor, k, v)]
        with use_kernels("triton"):
            out = attention(*leaves)
            results.append([out, *torch.autograd.grad(out, leaves, d_out)])
    assert all(map(torch.equal, *results))


Q = torch.randn(2, 3, 5, 16)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"q": Q[0]}, r"q must be \[B, heads, N, D\] with no empty dimension, got \[3, 5, 16\]\."),
        ({"q": Q[:0]}, "q must be .* no empty dimension"),
        ({"q": torch.randn(1, 1, 2, 257)}, "q must have a head dimension D of at most 256, got 257"),
        ({"q": Q.int()}, "q must be float16, bfloat16, float32 or float64, got torch.int32"),
        ({"k": Q[:, :2]}, r"k must be \[B, groups, M, D\] .*, q being \[2, 3, 5, 16\], got \[2, 2, 5, 16\]"),
        ({"k": Q[:1]}, r"k must be \[B, groups, M, D\]"),
        ({"v": Q[:, :, :4]}, r"v must have k's shape \[2, 3, 5, 16\], got \[2, 3, 4, 16\]"),
        ({"v": Q.half()}, "v must have q's dtype torch.float32, got torch.float16"),
        ({"v": Q.mT.contiguous().mT}, "v must have unit stride in its last dimension, got strides"),
        ({"k": Q.to("meta")}, "k must be on q's device, cpu, got meta"),
        (
            {"bias": torch.randn(3, 5, 4)},
            r"bias must broadcast to \[B, heads, N, M\] = \[2, 3, 5, 5\], got \[3, 5, 4\]",
        ),
        ({"bias": torch.randn(1, 2, 3, 5, 5)}, "bias must broadcast"),
        ({"bias": torch.ones(3, 5, 5, dtype=torch.int)}, "bias must be bool, float16, .* got torch.int32"),
        ({"scale": torch.ones(())}, "scale must be a number, which gets no gradient, got a tensor"),
        ({"bias": torch.randn(3, 5, 5, device="meta")}, "bias must be on q's device"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Tensor], sentence: str) -> None:
    arguments = {"q": Q, "k": Q, "v": Q} | change
    with pytest.raises(ValueError, match=sentence) as error:
        attention(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_every_compile_case_names_what_its_kernel_takes() -> None:
    from fastlocal.kernels.attention_triton import compile_cases

    cases = compile_cases()
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert set(case.signature) | set(case.constexprs) == set(case.kernel.arg_names), case.name
        assert not set(case.signature) & set(case.constexprs), case.name
