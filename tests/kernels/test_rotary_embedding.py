"""rotary_embedding against timm's rotation in float64: both pairings, every dtype and direction, any strides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor

from fastlocal.kernels import rotary_embedding, use_kernels

# Rounding bands for numbers up to 10; interpreted bfloat16 truncates where a card rounds.
BAND = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 6e-3, torch.bfloat16: 8e-2}


def timms(x: Tensor, table: Tensor, prefix: int, half: bool) -> Tensor:
    return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], table, half=half)], 2)


def problem(tokens: int, head_dim: int, prefix: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A key as timm's qkv projection lays it, and angles that are no angles: sines and cosines of any size."""
    torch.manual_seed(tokens + head_dim)
    qkv = torch.randn(2, tokens, 3, 3, head_dim, dtype=torch.float64).to(dtype)
    table = torch.randn(tokens - prefix, 2 * head_dim, dtype=torch.float64)
    return qkv.permute(2, 0, 3, 1, 4)[1], table if dtype == torch.float64 else table.float()


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("dtype", BAND, ids=str)
@pytest.mark.parametrize("half", [False, True], ids=["neighbours", "halves"])
@pytest.mark.parametrize(("tokens", "head_dim", "prefix"), [(1, 2, 0), (70, 64, 5), (33, 24, 1), (5, 80, 0), (4, 8, 4)])
def test_against_timm_in_float64(
    tokens: int, head_dim: int, prefix: int, half: bool, dtype: torch.dtype, kernels: Any
) -> None:
    x, table = problem(tokens, head_dim, prefix, dtype)
    exact = x.double().requires_grad_()
    expected = timms(exact, table.double(), prefix, half)
    upstream = torch.randn(expected.shape, dtype=torch.float64).to(dtype)
    (expected_gradient,) = torch.autograd.grad(expected, exact, upstream.double())
    x.requires_grad_()
    with use_kernels(kernels):
        out = rotary_embedding(x, table, prefix=prefix, half=half)
        (gradient,) = torch.autograd.grad(out, x, upstream)
    assert out.dtype == gradient.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=BAND[dtype])
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0, atol=BAND[dtype])
    assert torch.equal(out[:, :, :prefix], x[:, :, :prefix])


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_an_expanded_upstream_gradient(kernels: Any) -> None:
    x, table = problem(6, 8, 0)
    x.requires_grad_()
    with use_kernels(kernels):
        (found,) = torch.autograd.grad(rotary_embedding(x, table).sum(), x)
    torch.testing.assert_close(found, torch.autograd.grad(timms(x, table, 0, False).sum(), x)[0])


def test_a_low_precision_table() -> None:
    x, table = problem(6, 8, 1, torch.bfloat16)
    exact = timms(x.double(), table.bfloat16().double(), 1, True)
    torch.testing.assert_close(
        rotary_embedding(x, table.bfloat16(), prefix=1, half=True).double(), exact, rtol=1e-2, atol=1e-2
    )


X = torch.ones(2, 3, 5, 8)
TABLE = torch.ones(4, 16)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((X[0], TABLE, 1), r"x must be \[B, heads, N, D\].*got \[3, 5, 8\]"),
        ((X[..., :7], TABLE, 1), r"an even D, got \[2, 3, 5, 7\]"),
        (
            (X.mT.contiguous().mT, TABLE, 1),
            r"x must have unit stride in its last dimension, got strides \(120, 40, 1, 5\)",
        ),
        ((X, TABLE, 0), r"table must be \[N - prefix, 2 · D\] = \[5, 16\], got \[4, 16\]"),
        ((X, TABLE, 6), r"prefix must be from 0 to N = 5, got 6"),
        ((X, TABLE, -1), r"prefix must be from 0 to N = 5, got -1"),
        ((X.int(), TABLE, 1), r"x must be float16, bfloat16, float32 or float64, got torch.int32"),
        ((X, TABLE.bool(), 1), r"table must be float16.*got torch.bool"),
        ((X, TABLE.to("meta"), 1), r"table must be on x's device, cpu, got meta"),
        ((X, TABLE.clone().requires_grad_(), 1), r"table must not require grad"),
    ],
)
def test_refusals(arguments: tuple[Tensor, Tensor, int], sentence: str) -> None:
    x, table, prefix = arguments
    with pytest.raises(ValueError, match=sentence):
        rotary_embedding(x, table, prefix=prefix)


def test_compile_cases_cover_the_kernels_arguments() -> None:
    from fastlocal.kernels.rotary_embedding_triton import compile_cases

    cases = compile_cases()
    assert len({case.name for case in cases}) == len(cases) == 24
    for case in cases:
        assert set(case.signature) | set(case.constexprs) == set(case.kernel.arg_names)
