"""`window_attention`: reference and interpreted kernels against timm's own pieces put together in float64."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.models.swin_transformer import (
    SwinTransformerBlock,
    get_relative_position_index,
    window_partition,
    window_reverse,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastlocal.kernels import dispatch, use_kernels, window_attention
from fastlocal.kernels.window_attention import MAXIMUM_HEAD_DIM, MAXIMUM_HEAD_DIM_FLOAT32

ErrorOf = Callable[[Tensor, Tensor], float]
LIMIT = {torch.float32: 1e-5, torch.float16: 2e-3}
BAND = {torch.float32: 1e-6, torch.float16: 2e-4}  # of rounding, on top of twice eager's error
WIDEST_FLOAT32 = MAXIMUM_HEAD_DIM if dispatch.interpreting() else MAXIMUM_HEAD_DIM_FLOAT32  # head of the kernels


class Geometry(NamedTuple):
    batch: int
    grid: tuple[int, int]
    heads: int
    head_dim: int
    window: tuple[int, int]
    shift: tuple[int, int]

    @property
    def options(self) -> dict[str, Any]:
        return {"num_heads": self.heads, "window_size": self.window, "shift": self.shift}

    def tensors(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """qkv, a float32 bias table, and an upstream gradient."""
        torch.manual_seed(seed)
        entries = (2 * self.window[0] - 1) * (2 * self.window[1] - 1)
        qkv = torch.randn(self.batch, *self.grid, 3 * self.heads * self.head_dim, dtype=dtype)
        d_out = torch.randn(self.batch, *self.grid, self.heads * self.head_dim, dtype=dtype)
        return qkv, torch.randn(entries, self.heads), d_out


WINDOW_4 = Geometry(1, (8, 12), 2, 16, (4, 4), (2, 2))
SWIN = Geometry(2, (7, 14), 3, 32, (7, 7), (3, 3))
GEOMETRIES = [
    WINDOW_4,
    SWIN,
    Geometry(1, (14, 7), 1, 32, (7, 7), (0, 0)),
    Geometry(2, (12, 6), 1, 32, (6, 6), (3, 3)),
    Geometry(1, (8, 16), 2, 24, (8, 8), (4, 4)),
    Geometry(1, (7, 7), 1, 64, (7, 7), (3, 3)),  # rows tiled for the head dimension
    Geometry(1, (12, 12), 1, 32, (12, 12), (6, 6)),  # rows tiled for the window
    Geometry(1, (16, 16), 1, 16, (16, 16), (8, 8)),
    Geometry(3, (6, 10), 2, 8, (3, 5), (1, 2)),
    Geometry(1, (4, 9), 2, 20, (2, 9), (0, 4)),
    Geometry(1, (3, 2), 1, 128, (1, 1), (0, 0)),
    Geometry(1, (17, 18), 1, 8, (17, 18), (8, 9)),  # 306 tokens: five tiles a side
]
names = [f"{g.window[0]}x{g.window[1]}-shift{g.shift[0]},{g.shift[1]}-dim{g.head_dim}" for g in GEOMETRIES]


def timm_window_attention(
    qkv: Tensor,
    bias_table: Tensor,
    *,
    num_heads: int,
    window_size: tuple[int, int],
    shift: tuple[int, int],
    scale: float | None = None,
) -> Tensor:
    """Roll, partition, attend with materialized bias and mask, reverse, roll back: each step timm's."""
    batch, height, width, channels = qkv.shape
    tokens = window_size[0] * window_size[1]
    windows = window_partition(qkv.roll((-shift[0], -shift[1]), (1, 2)), window_size)
    windows = windows.view(-1, tokens, 3, num_heads, channels // (3 * num_heads))
    q, k, v = windows.permute(2, 0, 3, 1, 4).unbind(0)
    scores = q * (q.shape[-1] ** -0.5 if scale is None else scale) @ k.mT
    scores = scores + bias_table[get_relative_position_index(*window_size)].permute(2, 0, 1)
    geometry = SimpleNamespace(
        shift_size=shift, window_size=window_size, input_resolution=(height, width), window_area=tokens
    )
    mask = SwinTransformerBlock.get_attn_mask(geometry, device=qkv.device, dtype=qkv.dtype)  # type: ignore[arg-type]
    if mask is not None:
        scores = scores.unflatten(0, (batch, -1)) + mask[None, :, None]
        scores = scores.flatten(0, 1)
    out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, *window_size, channels // 3)
    return window_reverse(out, window_size, height, width).roll(shift, (1, 2))


def run(
    op: Callable[..., Tensor], qkv: Tensor, table: Tensor, d_out: Tensor, *, kernels: Any = "auto", **options: Any
) -> list[Tensor]:
    """The output, and the gradients of qkv and table."""
    qkv, table = qkv.detach().clone().requires_grad_(), table.detach().clone().requires_grad_()
    with use_kernels(kernels):
        out = op(qkv, table, **options)
        out.backward(d_out)
    assert qkv.grad is not None
    assert table.grad is not None
    return [out.detach(), qkv.grad, table.grad]


def in_float64(qkv: Tensor, table: Tensor, d_out: Tensor, **options: Any) -> list[Tensor]:
    return run(timm_window_attention, qkv.double(), table.double(), d_out.double(), **options)


# --- Exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=names)
def test_reference_is_timm(geometry: Geometry, relative_error: ErrorOf) -> None:
    tensors = [tensor.double() for tensor in geometry.tensors()]
    expected = in_float64(*tensors, **geometry.options)
    for ours, theirs in zip(run(window_attention, *tensors, **geometry.options), expected, strict=True):
        if geometry.window != (1, 1) or theirs.norm() > 0:
            assert relative_error(ours, theirs) < 1e-13


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=names)
def test_kernels_against_float64_and_eager(geometry: Geometry, dtype: torch.dtype, relative_error: ErrorOf) -> None:
    """Within the limit, and within twice the error that eager PyTorch makes in the same dtype."""
    qkv, table, d_out = geometry.tensors(dtype)
    if dtype == torch.float32 and geometry.head_dim > WIDEST_FLOAT32:
        with use_kernels("triton"), pytest.raises(RuntimeError, match="at most 32 channels per float32 head"):
            window_attention(qkv, table, **geometry.options)
        return
    expected = in_float64(qkv, table, d_out, **geometry.options)
    eager = run(timm_window_attention, qkv, table.to(dtype), d_out, **geometry.options)
    ours = run(window_attention, qkv, table, d_out, kernels="triton", **geometry.options)
    for name, exact, theirs, mine in zip(("out", "d_qkv", "d_table"), expected, eager, ours, strict=True):
        if name == "d_table" and geometry.window == (1, 1):  # one key, so probability 1 whatever its bias
            assert mine.abs().max() < 1e-5
            continue
        error = relative_error(mine, exact)
        assert error < LIMIT[dtype], name
        assert error <= 2 * relative_error(theirs, exact) + BAND[dtype], name


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_kernels_on_random_geometries(data: st.DataObject, relative_error: ErrorOf) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    window = draw(1, 9), draw(2, 9)
    geometry = Geometry(
        batch=draw(1, 2),
        grid=(window[0] * draw(1, 2), window[1] * draw(1, 2)),
        heads=draw(1, 2),
        head_dim=draw(1, min(40, WIDEST_FLOAT32)),
        window=window,
        shift=(draw(0, window[0] - 1), draw(0, window[1] - 1)),
    )
    tensors = geometry.tensors(seed=draw(0, 99))
    expected = in_float64(*tensors, **geometry.options)
    for mine, exact in zip(
        run(window_attention, *tensors, kernels="triton", **geometry.options), expected, strict=True
    ):
        assert relative_error(mine, exact) < 1e-5


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_regression_scale_reaches_output_and_gradients(kernels: str, relative_error: ErrorOf) -> None:
    """A public kernel leaves the scale out of d_q and d_k, and is tested with scale 1 only."""
    tensors = WINDOW_4.tensors()
    expected = in_float64(*tensors, scale=0.7, **WINDOW_4.options)
    ours = run(window_attention, *tensors, kernels=kernels, scale=0.7, **WINDOW_4.options)
    unscaled = in_float64(*tensors, scale=1.0, **WINDOW_4.options)
    for mine, exact, wrong in zip(ours, expected, unscaled, strict=True):
        assert relative_error(mine, exact) < 1e-5
        assert relative_error(wrong, exact) > 0.1


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_regression_shift_mask(kernels: str, relative_error: ErrorOf) -> None:
    """A public kernel never passes the mask on. Without it, tokens from opposite edges see each other."""
    qkv, table, _ = WINDOW_4.tensors()
    with use_kernels(kernels):
        out = window_attention(qkv, table, **WINDOW_4.options)
    far = qkv.clone()
    far[:, -1] += 1.0  # the last row shares windows with row 0 after the shift, and nothing else
    with use_kernels(kernels):
        moved = window_attention(far, table, **WINDOW_4.options)
    assert torch.equal(moved[:, 0], out[:, 0])
    assert relative_error(moved[:, -2], out[:, -2]) > 0.1


def test_mask_is_additive_as_in_timm(relative_error: ErrorOf) -> None:
    """−100, not −inf: with scores far enough apart masked tokens get through, in timm and here."""
    qkv, table, d_out = WINDOW_4.tensors()
    qkv *= 10
    expected = in_float64(qkv, table, d_out, **WINDOW_4.options)
    ours = run(window_attention, qkv, table, d_out, kernels="triton", **WINDOW_4.options)
    for mine, exact in zip(ours, expected, strict=True):
        assert relative_error(mine, exact) < 1e-4  # float32 scores of hundreds
    far = qkv.clone()
    far[:, -1] += 1.0
    moved = in_float64(far, table, d_out, **WINDOW_4.options)[0]
    assert relative_error(moved[:, 0], expected[0][:, 0]) > 1e-3


def test_table_gradient_is_bit_identical_between_runs() -> None:
    geometry = Geometry(4, (8, 8), 1, 16, (4, 4), (2, 2))  # 16 windows, cut into several slices
    first = run(window_attention, *geometry.tensors(), kernels="triton", **geometry.options)
    second = run(window_attention, *geometry.tensors(), kernels="triton", **geometry.options)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_slices_of_windows_add_up(monkeypatch: pytest.MonkeyPatch, relative_error: ErrorOf) -> None:
    """One program for all windows, and one for each, give the same bias gradient but for the order of the sum."""
    import importlib

    module = importlib.import_module("fastlocal.kernels.window_attention_triton")
    tensors = WINDOW_4.tensors()
    found = []
    for slices in (1, 6):
        monkeypatch.setattr(module, "_slices", lambda device, windows, *_, slices=slices: slices)
        found.append(run(window_attention, *tensors, kernels="triton", **WINDOW_4.options)[2])
    assert relative_error(found[0], found[1]) < 1e-6


# --- Cosines ----------------------------------------------------------------------------------------------------------

COSINE_9 = Geometry(1, (9, 9), 1, 8, (9, 9), (4, 4))  # two tiles


def normalized_window_attention(qkv: Tensor, table: Tensor, logit_scale: Tensor, **options: Any) -> Tensor:
    """Swin-V2's attention by timm's own: unit queries, scaled, and unit keys."""
    q, k, v = qkv.unflatten(3, (3, options["num_heads"], -1)).unbind(3)
    q, k = (torch.nn.functional.normalize(tokens, dim=-1) for tokens in (q, k))
    unit = torch.stack([q * logit_scale[:, None], k, v], 3).flatten(3)
    return timm_window_attention(unit, table, scale=1.0, **options)


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3))[1:])
@pytest.mark.parametrize("geometry", [WINDOW_4, COSINE_9], ids=["rows", "tiles"])
@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_cosine_attention(kernels: Any, geometry: Geometry, needed: tuple[bool, ...], relative_error: ErrorOf) -> None:
    qkv, table, d_out = geometry.tensors()
    inputs = [qkv, table, 1 + 9 * torch.rand(geometry.heads)]
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    expected = normalized_window_attention(*exact, **geometry.options)
    expected.backward(d_out.double())
    for tensor, need in zip(inputs, needed, strict=True):
        tensor.requires_grad_(need)
    with use_kernels(kernels):
        out = window_attention(*inputs[:2], logit_scale=inputs[2], **geometry.options)
        out.backward(d_out)
    assert relative_error(out, expected) < 1e-5
    for tensor, need, reference in zip(inputs, needed, exact, strict=True):
        assert (tensor.grad is not None) == need
        if tensor.grad is not None and reference.grad is not None:
            assert relative_error(tensor.grad, reference.grad) < 1e-5


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_cosines_of_zeros(kernels: Any) -> None:
    """Padding's keys are zeros in Swin-V2, whose k has no bias: its scores are 0, no gradient is NaN."""
    qkv, table, d_out = WINDOW_4.tensors()
    qkv[:, -2:] = 0
    qkv.requires_grad_()
    with use_kernels(kernels):
        out = window_attention(qkv, table, logit_scale=torch.full((2,), 10.0), **WINDOW_4.options)
        out.backward(d_out)
    assert out.isfinite().all()
    assert qkv.grad is not None
    assert qkv.grad.isfinite().all()


# --- Extreme rows -----------------------------------------------------------------------------------------------------

EXTREMES = {
    "-inf": -math.inf,
    "-1e4": -1e4,
    "-1e9": -1e9,
    "finfo.min": torch.finfo(torch.float32).min,
    "5e8": 5e8,
}
SMALL = Geometry(1, (4, 8), 1, 16, (4, 4), (0, 0))
TILED = Geometry(1, (12, 12), 1, 16, (12, 12), (0, 0))


def sdpa_window_attention(
    qkv: Tensor, bias_table: Tensor, *, num_heads: int, window_size: tuple[int, int], shift: tuple[int, int]
) -> Tensor:
    """PyTorch's own attention on the windows of an unshifted grid."""
    _, height, width, channels = qkv.shape
    windows = window_partition(qkv, window_size).view(
        -1, math.prod(window_size), 3, num_heads, channels // 3 // num_heads
    )
    q, k, v = windows.permute(2, 0, 3, 1, 4).unbind(0)
    bias = bias_table[get_relative_position_index(*window_size)].permute(2, 0, 1)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias.expand(q.shape[0], -1, -1, -1))
    return window_reverse(out.transpose(1, 2).reshape(-1, *window_size, channels // 3), window_size, height, width)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("entries", ["one", "some", "all"])
@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_extreme_biases(kernels: Any, extreme: str, entries: str, dtype: torch.dtype, relative_error: ErrorOf) -> None:
    """Equal huge scores weigh the same, whatever their size; against SDPA in float64."""
    geometry = TILED if entries == "all" and dtype == torch.float16 else SMALL
    qkv, table, d_out = geometry.tensors(dtype)
    if entries != "one":
        qkv[..., : 2 * qkv.shape[3] // 3] = 0  # scores that are equal in every precision but for the bias
    table[{"one": slice(3, 4), "some": slice(None, None, 2), "all": slice(None)}[entries]] = EXTREMES[extreme]
    expected = run(sdpa_window_attention, qkv.double(), table.double(), d_out.double(), **geometry.options)
    ours = run(window_attention, qkv, table, d_out, kernels=kernels, **geometry.options)
    for name, mine, exact in zip(("out", "d_qkv", "d_table"), ours, expected, strict=True):
        assert mine.isfinite().all(), name
        if exact.norm() < 1e-12:
            assert mine.abs().max() < 1e-3, name
        else:
            assert relative_error(mine, exact) < 4 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("geometry", [SMALL, TILED], ids=["rows", "tiles"])
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 2.0**13), (torch.float32, 2.0**13), (torch.float32, 2.0**30)]
)
@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_huge_scores(kernels: Any, dtype: torch.dtype, size: float, geometry: Geometry) -> None:
    """Many equal largest scores, exact in float32: probabilities stay at most 1, so |d_v| ≤ sum |d_out|."""
    qkv, table, d_out = geometry.tensors(dtype)
    qkv[..., : 2 * geometry.head_dim] = size * qkv[..., : 2 * geometry.head_dim].sign()
    out, d_qkv, d_table = run(window_attention, qkv, table, d_out, kernels=kernels, **geometry.options)
    values = qkv[..., 2 * geometry.head_dim :]
    assert all(tensor.isfinite().all() for tensor in (out, d_table))
    assert out.abs().max() <= values.abs().max()
    windows = window_partition(d_out.double(), geometry.window).flatten(1, 2)
    limit = windows.abs().sum(1).max() * (1 + 4 * torch.finfo(dtype).eps)
    d_v = window_partition(d_qkv[..., 2 * geometry.head_dim :].double(), geometry.window).flatten(1, 2)
    assert d_v.abs().max() <= limit
    # Each query's probabilities add up to 1: so do its shares of every gradient.
    torch.testing.assert_close(d_v.sum(1), windows.sum(1), atol=64 * torch.finfo(dtype).eps * limit.item(), rtol=0)


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("geometry", [SMALL, TILED], ids=["rows", "tiles"])
def test_nan_is_not_hidden(kernels: Any, geometry: Geometry) -> None:
    qkv, table, d_out = geometry.tensors()
    qkv[0, 0, 0, geometry.head_dim] = math.nan  # one key
    results = run(window_attention, qkv, table, d_out, kernels=kernels, **geometry.options)
    window = (slice(0, 1), slice(0, geometry.window[0]), slice(0, geometry.window[1]))
    assert results[0][window].isnan().all()
    assert results[1][window].isnan().all(-1).all()
    assert results[2].isnan().any()


# --- As a citizen of PyTorch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_any_strides(kernels: Any, relative_error: ErrorOf) -> None:
    qkv, table, d_out = WINDOW_4.tensors()
    expected = in_float64(qkv, table, d_out.new_ones(d_out.shape), **WINDOW_4.options)
    strided_qkv = qkv.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0).requires_grad_()
    strided_table = torch.stack([table, table], 2)[:, :, 0].detach().requires_grad_()
    assert not strided_qkv.is_contiguous()
    assert not strided_table.is_contiguous()
    with use_kernels(kernels):
        out = window_attention(strided_qkv, strided_table, **WINDOW_4.options)
        out.sum().backward()  # an expanded gradient: all strides 0
    for mine, exact in zip((out, strided_qkv.grad, strided_table.grad), expected, strict=True):
        assert mine is not None
        assert relative_error(mine, exact) < 1e-5


@pytest.mark.parametrize(("needs_qkv", "needs_table"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_every_subset_of_gradients(kernels: Any, needs_qkv: bool, needs_table: bool, relative_error: ErrorOf) -> None:
    qkv, table, d_out = WINDOW_4.tensors()
    expected = in_float64(qkv, table, d_out, **WINDOW_4.options)
    qkv.requires_grad_(needs_qkv)
    table.requires_grad_(needs_table)
    with use_kernels(kernels):
        out = window_attention(qkv, table, **WINDOW_4.options)
        assert out.requires_grad == (needs_qkv or needs_table)
        if out.requires_grad:
            out.backward(d_out)
    assert relative_error(out, expected[0]) < 1e-5
    for tensor, needed, exact in ((qkv, needs_qkv, expected[1]), (table, needs_table, expected[2])):
        assert (tensor.grad is not None) == needed
        if tensor.grad is not None:
            assert relative_error(tensor.grad, exact) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_of_results(dtype: torch.dtype) -> None:
    qkv, table, d_out = WINDOW_4.tensors(dtype)
    for table_dtype in (torch.float32, dtype):
        out, d_qkv, d_table = run(window_attention, qkv, table.to(table_dtype), d_out, **WINDOW_4.options)
        assert (out.dtype, d_qkv.dtype, d_table.dtype) == (dtype, dtype, table_dtype)
        assert out.is_contiguous()


def test_half_precision_table(relative_error: ErrorOf) -> None:
    qkv, table, d_out = WINDOW_4.tensors(torch.float16)
    table = table.half()
    expected = in_float64(qkv, table, d_out, **WINDOW_4.options)
    ours = run(window_attention, qkv, table, d_out, kernels="triton", **WINDOW_4.options)
    assert ours[2].dtype == torch.float16
    for mine, exact in zip(ours, expected, strict=True):
        assert relative_error(mine, exact) < 2e-3


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_saves_its_inputs_and_nothing_else(kernels: Any) -> None:
    qkv, table, _ = WINDOW_4.tensors()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), use_kernels(kernels):
        window_attention(qkv.requires_grad_(), table.requires_grad_(), **WINDOW_4.options)
    assert sum(tensor.nbytes for tensor in saved) == qkv.nbytes + table.nbytes
    assert {tensor.data_ptr() for tensor in saved} == {qkv.data_ptr(), table.data_ptr()}


def test_used_twice_gradients_add(relative_error: ErrorOf) -> None:
    qkv, table, d_out = WINDOW_4.tensors()
    once = run(window_attention, qkv, table, d_out, **WINDOW_4.options)

    def twice(qkv: Tensor, table: Tensor, **options: Any) -> Tensor:
        return window_attention(qkv, table, **options) + 2 * window_attention(qkv, table, **options)

    for mine, single in zip(run(twice, qkv, table, d_out, **WINDOW_4.options), once, strict=True):
        assert relative_error(mine, 3 * single) < 1e-6


def test_is_differentiable_once() -> None:
    qkv, table, _ = WINDOW_4.tensors()
    qkv.requires_grad_()
    (gradient,) = torch.autograd.grad(
        window_attention(qkv, table, **WINDOW_4.options).square().sum(), qkv, create_graph=True
    )
    with pytest.raises(RuntimeError, match="window_attention_backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_opcheck(kernels: Any) -> None:
    geometry = Geometry(1, (2, 4), 1, 8, (2, 2), (1, 1))
    qkv, table, d_out = geometry.tensors()
    forward = torch.ops.fastlocal.window_attention.default
    backward = torch.ops.fastlocal.window_attention_backward.default
    arguments = (1, 2, 2, 1, 1, 0.5, kernels)
    with use_kernels(kernels):
        for logit_scale in (None, torch.ones(1)):
            leaves = [t.clone().requires_grad_() if t is not None else None for t in (qkv, table, logit_scale)]
            torch.library.opcheck(forward, (*leaves, *arguments))
            for needs_table in (True, False):
                torch.library.opcheck(
                    backward,
                    (d_out, qkv, table, logit_scale, *arguments, needs_table),
                    test_utils=("test_schema", "test_faketensor"),
                )


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_compiles_as_one_graph(kernels: Any, relative_error: ErrorOf) -> None:
    qkv, table, d_out = WINDOW_4.tensors()
    expected = in_float64(qkv, table, d_out, **WINDOW_4.options)
    compiled = torch.compile(window_attention, fullgraph=True, backend="aot_eager")
    for mine, exact in zip(
        run(compiled, qkv, table, d_out, kernels=kernels, **WINDOW_4.options), expected, strict=True
    ):
        assert relative_error(mine, exact) < 1e-5


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_qkv_and_not_the_table(compiled: bool, relative_error: ErrorOf) -> None:
    qkv, table, d_out = WINDOW_4.tensors()
    op = torch.compile(window_attention, fullgraph=True, backend="aot_eager") if compiled else window_attention
    qkv.requires_grad_()
    table.requires_grad_()
    with torch.autocast(qkv.device.type, torch.bfloat16):
        out = op(qkv, table, **WINDOW_4.options)
    out.backward(d_out.bfloat16())
    assert out.dtype == torch.bfloat16
    assert qkv.grad is not None
    assert table.grad is not None
    assert (qkv.grad.dtype, table.grad.dtype) == (torch.float32, torch.float32)
    expected = in_float64(qkv, table, d_out, **WINDOW_4.options)
    assert relative_error(table.grad, expected[2]) < 1e-2


def test_autocast_leaves_float64_alone() -> None:
    qkv, table, _ = WINDOW_4.tensors(torch.float64)
    with torch.autocast(qkv.device.type, torch.bfloat16):
        inside = window_attention(qkv, table.double(), **WINDOW_4.options)
    assert torch.equal(inside, window_attention(qkv, table.double(), **WINDOW_4.options))


def test_flops_are_counted_as_for_sdpa() -> None:
    qkv, table, _ = SWIN.tensors()
    with FlopCounterMode(display=False) as counter:
        window_attention(qkv.requires_grad_(), table, **SWIN.options).sum().backward()
    windows = SWIN.batch * math.prod(SWIN.grid) // 49
    assert counter.get_total_flops() == 7 * 2 * windows * SWIN.heads * 49 * 49 * SWIN.head_dim


# --- Errors: one sentence that names the argument ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"qkv": torch.zeros(8, 12, 96)}, r"qkv must be \[B, H, W, 3C\] with no empty dimension, got \[8, 12, 96\]"),
        ({"qkv": torch.zeros(0, 8, 12, 96)}, r"qkv must be .* got \[0, 8, 12, 96\]"),
        ({"qkv": torch.zeros(1, 8, 12, 96, dtype=torch.int32)}, r"qkv must be float16.*got torch\.int32"),
        ({"num_heads": 5}, r"num_heads must divide qkv's last dimension 3C = 96 .*, got 5"),
        ({"num_heads": 0}, r"num_heads must divide .*, got 0"),
        ({"qkv": torch.zeros(1, 8, 12, 3 * 129), "num_heads": 1}, r"at most 128 channels per head, got 1"),
        (
            {"window_size": 5},
            r"qkv's grid must be a multiple of window_size = 5 × 5, got 8 × 12; pad the tokens before",
        ),
        ({"window_size": 0}, r"window_size must be at least 1 × 1, got 0 × 0"),
        ({"logit_scale": torch.ones(2, 1, 1)}, r"logit_scale must be \[num_heads\] = \[2\], got \[2, 1, 1\]"),
        ({"logit_scale": torch.ones(2, dtype=torch.long)}, r"logit_scale must be float16.*got torch\.int64"),
        ({"logit_scale": torch.ones(2), "scale": 1.0}, r"scale must not be given beside logit_scale, .*, got 1\.0"),
        ({"window_size": (4, 4, 4)}, r"window_size must be an integer or a pair of them, got \(4, 4, 4\)"),
        ({"window_size": (4.0, 4.0)}, r"window_size must be an integer or a pair of them, got \(4\.0, 4\.0\)"),
        (
            {"scale": torch.ones((), requires_grad=True)},
            r"scale must be a number, which gets no gradient, got a tensor",
        ),
        ({"shift": 4}, r"shift must be from 0 to less than window_size = \(4, 4\), got \(4, 4\)"),
        ({"shift": (0, -1)}, r"shift must be from 0 .* got \(0, -1\)"),
        ({"bias_table": torch.zeros(48, 2)}, r"bias_table must be .* = \[49, 2\], got \[48, 2\]"),
        ({"bias_table": torch.zeros(49, 2, dtype=torch.long)}, r"bias_table must be float16.*got torch\.int64"),
        ({"bias_table": torch.zeros(49, 2, device="meta")}, r"bias_table must be on qkv's device, cpu, got meta"),
        (
            {"qkv": torch.empty(1, 2**13, 2**13, 96, device="meta")},
            r"qkv must have fewer than 2\*\*31 elements per image, got 8192 × 8192 × 96",
        ),
    ],
)
def test_errors(change: dict[str, Any], sentence: str) -> None:
    qkv, table, _ = WINDOW_4.tensors()
    arguments = {"qkv": qkv.cpu(), "bias_table": table.cpu(), **WINDOW_4.options, **change}
    with pytest.raises(ValueError, match=sentence) as error:
        window_attention(arguments.pop("qkv"), arguments.pop("bias_table"), **arguments)
    assert "\n" not in str(error.value)


def test_triton_asked_for_and_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, table, _ = WINDOW_4.tensors()
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "0")
    with (
        use_kernels("triton"),
        pytest.raises(RuntimeError, match=r"kernels='triton' was asked for, but .* not on 'cpu'"),
    ):
        window_attention(qkv.cpu(), table.cpu(), **WINDOW_4.options)


def test_wide_float32_heads_are_refused_by_the_kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card: "triton" says no, "auto" takes the reference."""
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    monkeypatch.setattr(dispatch, "why_not_triton", lambda device: None)
    qkv, table, _ = Geometry(1, (4, 4), 1, 64, (4, 4), (0, 0)).tensors()
    with use_kernels("triton"), pytest.raises(RuntimeError, match="at most 32 channels per float32 head, not 64"):
        window_attention(qkv, table, num_heads=1, window_size=4, shift=0)
    window_attention(qkv, table, num_heads=1, window_size=4, shift=0)


# --- What ships -------------------------------------------------------------------------------------------------------


def test_compile_cases_cover_the_kernels_arguments() -> None:
    from fastlocal.kernels.window_attention_triton import compile_cases

    cases = compile_cases()
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert set(case.signature) | set(case.constexprs) == set(case.kernel.arg_names), case.name
    windows = {case.constexprs["WINDOW"][0] for case in cases}
    head_dims = {case.constexprs["HEAD_DIM"] for case in cases if case.has_dot}
    assert windows >= {4, 6, 7, 8, 12, 16, 24}
    assert any(case.constexprs.get("COSINE") for case in cases)
    assert head_dims >= {16, 32, 64, 128}
