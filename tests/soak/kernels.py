"""Random comparisons of the fused ops with float64: shapes, strides, dtypes, masks, extreme rows, subsets of gradients.

Each trial writes its op out in float64 and asks the reference or the interpreted Triton kernels for the same in float32,
float16 or bfloat16. An error is ‖ours − exact‖ / ‖exact‖ of the output and of every gradient asked for.
"""

from __future__ import annotations

import itertools
import math
import os
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, by the first kernel

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlocal.kernels import attention, reconstruction_loss, rotary_embedding, use_kernels, window_attention

# Interpreted bfloat16 truncates where a card rounds.
LIMITS = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
EXTREMES = (-math.inf, -1e4, -1e9, torch.finfo(torch.float32).min)


class Problem(NamedTuple):
    """``ours`` and ``exact`` take the same inputs, the second in float64; ``inputs`` may get gradients."""

    op: str
    ours: Callable[..., Tensor]
    exact: Callable[..., Tensor]
    inputs: list[Tensor]


class Comparison(NamedTuple):
    op: str
    dtype: str
    error: float
    wrong: str  # what is beyond its limit, with the seed that makes it again; empty if nothing is


def compare(seed: int) -> Comparison:
    choose = random.Random(seed)
    torch.manual_seed(seed)
    dtype = choose.choice(list(LIMITS))
    makers = [_attention, _window_attention, _reconstruction_loss, _rotary_embedding]
    problem = choose.choice(makers)(choose, dtype)
    kernels: Any = choose.choice(["triton", "triton", "reference"])
    ours = [tensor.detach().requires_grad_(choose.random() < 0.7) for tensor in problem.inputs]
    exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in ours]
    expected = problem.exact(*exact)
    d_out = torch.randn_like(expected).to(dtype if expected.ndim > 1 else torch.float32)
    with use_kernels(kernels):
        out = problem.ours(*ours)
        if out.requires_grad:
            out.backward(d_out)
            expected.backward(d_out.double())
    pairs = [(out, expected)]
    pairs += [(mine.grad, theirs.grad) for mine, theirs in zip(ours, exact, strict=True) if mine.requires_grad]
    error = max(_error(mine, theirs, d_out) for mine, theirs in pairs if mine is not None and theirs is not None)
    wrong = "" if error <= LIMITS[dtype] else f"seed {seed}: {problem.op}, {kernels}, error {error:.1e}"
    return Comparison(problem.op, str(dtype).removeprefix("torch."), error, wrong)


def _error(mine: Tensor, exact: Tensor, d_out: Tensor) -> float:
    """Relative to ``exact``, or where that is next to nothing to the upstream gradient: a hundredth of it, and a tenth for a
    few numbers that are each a sum of rounded terms that nearly cancel, as the gradient of a logit scale is."""
    least = (1e-2 if exact.numel() > 4 else 1e-1) * d_out.double().norm()
    return ((mine.double() - exact).norm() / torch.maximum(exact.norm(), least)).item()


def comparisons(seed: int) -> Iterator[Comparison]:
    return map(compare, itertools.count(seed))


def _strided(choose: random.Random, *shape: int) -> Tensor:
    """Normal values, laid out as they are or with the first two dimensions swapped in memory, the last next to each other."""
    if choose.random() < 0.5:
        return torch.randn(shape)
    return torch.randn(shape[1], shape[0], *shape[2:]).transpose(0, 1)


def _attention(choose: random.Random, dtype: torch.dtype) -> Problem:
    batch, groups, shared_by = choose.randint(1, 2), choose.randint(1, 2), choose.randint(1, 2)
    heads, head_dim = groups * shared_by, choose.choice([1, 8, 15, 16, 33, 64, 72])
    longest = choose.choice([20, 20, 40, 40, 150])
    queries = choose.randint(1, longest)
    keys = queries if choose.random() < 0.7 else choose.randint(1, longest)
    q = _strided(choose, batch, heads, queries, head_dim)
    k, v = (_strided(choose, batch, groups, keys, head_dim) for _ in range(2))
    kind = choose.choice(["none", "bias", "bool", "some keys", "whole rows"])
    shape = [choose.choice([1, size]) for size in (batch, heads)] + [queries, keys]
    bias = torch.randn(shape)
    mask = torch.rand(shape) < 0.7
    if kind == "some keys":
        bias[..., torch.rand(keys) < 0.3] = choose.choice(EXTREMES)
    if kind == "whole rows":  # beside a huge bias no precision holds a score: let these be equal
        rows = torch.rand(queries) < 0.5
        bias[..., rows, :] = choose.choice(EXTREMES)
        q[..., rows, :] = 0

    def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return attention(q, k, v, bias=None if kind == "none" else mask if kind == "bool" else bias)

    def exact(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        k, v = (tensor.repeat_interleave(shared_by, 1) for tensor in (k, v))
        scores = q @ k.mT * head_dim**-0.5
        if kind == "bool":
            scores = scores.masked_fill(~mask, -math.inf)
        elif kind != "none":
            scores = scores + bias
        return _softmax(scores) @ v

    return Problem("attention", ours, exact, [*(tensor.to(dtype) for tensor in (q, k, v)), bias])


def _softmax(scores: Tensor) -> Tensor:
    """Zeros where every score is −inf."""
    hidden = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(hidden, 0).softmax(-1).masked_fill(hidden, 0)


def _window_attention(choose: random.Random, dtype: torch.dtype) -> Problem:
    widest = choose.choice([4, 4, 7, 7, 10])
    window = choose.randint(1, widest), choose.randint(1, widest)
    shift = choose.randrange(window[0]), choose.randrange(window[1])
    batch, heads, head_dim = choose.randint(1, 2), choose.randint(1, 2), choose.choice([1, 8, 20, 32, 48])
    grid = window[0] * choose.randint(1, 2), window[1] * choose.randint(1, 2)
    qkv = _strided(choose, batch, *grid, 3 * heads * head_dim)
    table = torch.randn((2 * window[0] - 1) * (2 * window[1] - 1), heads)
    if choose.random() < 0.3:
        table[choose.randrange(len(table))] = choose.choice(EXTREMES)
    options: dict[str, Any] = {"num_heads": heads, "window_size": window, "shift": shift}
    cosine = head_dim > 1 and choose.random() < 0.4  # of one channel it is ±1, and its gradient 0
    logit_scale = 0.1 + 10 * torch.rand(heads)

    def ours(qkv: Tensor, table: Tensor, logit_scale: Tensor) -> Tensor:
        return window_attention(qkv, table, **options, logit_scale=logit_scale if cosine else None)

    def exact(qkv: Tensor, table: Tensor, logit_scale: Tensor) -> Tensor:
        """Token by token: where each lies, which window it is in, and on which side of the seams."""
        row, column = (torch.arange(side).roll(-by) for side, by in zip(grid, shift, strict=True))
        row, column = (part.flatten() for part in torch.meshgrid(row, column, indexing="ij"))
        place = torch.arange(grid[0])[:, None].expand(grid), torch.arange(grid[1])[None, :].expand(grid)
        down, across = place[0].flatten(), place[1].flatten()
        of_window = down // window[0] * (grid[1] // window[1]) + across // window[1]
        side = 2 * (down >= grid[0] - shift[0]) + (across >= grid[1] - shift[1]).int()
        q, k, v = qkv[:, row, column].unflatten(2, (3, heads, head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        if cosine:
            q, k = F.normalize(q, dim=-1) * logit_scale[:, None, None], F.normalize(k, dim=-1)
        else:
            q = q * head_dim**-0.5
        apart = [place % size for place, size in zip((down, across), window, strict=True)]
        entry = (apart[0][:, None] - apart[0] + window[0] - 1) * (2 * window[1] - 1)
        entry = entry + apart[1][:, None] - apart[1] + window[1] - 1
        same = of_window[:, None] == of_window
        scores = q @ k.mT + table[entry.clamp(0, len(table) - 1)].permute(2, 0, 1)
        scores = scores - 100.0 * (side[:, None] != side)
        mixed = _softmax(scores.masked_fill(~same, -math.inf)) @ v
        back = torch.empty_like(row)
        back[row * grid[1] + column] = torch.arange(len(row))
        return mixed[:, :, back].permute(0, 2, 1, 3).reshape(batch, *grid, heads * head_dim)

    return Problem("window_attention", ours, exact, [qkv.to(dtype), table, logit_scale])


def _reconstruction_loss(choose: random.Random, dtype: torch.dtype) -> Problem:
    batch, height, width = choose.randint(1, 3), choose.randint(1, 7), choose.randint(1, 7)
    channels, upsample, target_channels = choose.randint(1, 70), choose.randint(1, 4), choose.randint(2, 20)
    outputs = upsample**2 * target_channels
    # In half precision a residual's sign near 0 is a matter of rounding.
    kind: Any = choose.choice(["mse", "smooth_l1", "l1"] if dtype == torch.float32 else ["mse", "smooth_l1"])
    normalize, has_bias = choose.random() < 0.3, choose.random() < 0.7
    hidden = _strided(choose, batch, height, width, channels)
    weight, bias = torch.randn(outputs, channels) * channels**-0.5, torch.randn(outputs)
    target = torch.randn(batch, target_channels, height * upsample, width * upsample).permute(0, 2, 3, 1)
    target = (target if choose.random() < 0.5 else target.contiguous()).to(dtype)

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reconstruction_loss(
            hidden, weight, bias if has_bias else None, target,
            upsample=upsample, kind=kind, normalize_target=normalize, reduction="sample",
        )  # fmt: skip

    def exact(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        made = F.linear(hidden, weight.to(dtype).double(), bias if has_bias else None)
        made = made.unflatten(3, (upsample, upsample, target_channels)).permute(0, 1, 3, 2, 4, 5)
        wanted = target.double()
        if normalize:
            wanted = F.layer_norm(wanted, wanted.shape[-1:], eps=1e-6)
        losses = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}
        return losses[kind](made.reshape(wanted.shape), wanted, reduction="none").mean((1, 2, 3))

    return Problem("reconstruction_loss", ours, exact, [hidden.to(dtype), weight, bias])


def _rotary_embedding(choose: random.Random, dtype: torch.dtype) -> Problem:
    batch, heads, tokens = choose.randint(1, 3), choose.randint(1, 3), choose.randint(1, 150)
    pairs, prefix, half = choose.randint(1, 40), choose.choice([0, choose.randint(0, tokens)]), choose.random() < 0.5
    x = _strided(choose, batch, heads, tokens, 2 * pairs)
    table = torch.randn(tokens - prefix, 4 * pairs)  # no angles: each channel has a sine and a cosine of its own
    first = torch.arange(pairs) if half else 2 * torch.arange(pairs)
    second = first + (pairs if half else 1)

    def ours(x: Tensor) -> Tensor:
        return rotary_embedding(x, table, prefix=prefix, half=half)

    def exact(x: Tensor) -> Tensor:
        """Pair by pair."""
        sines, cosines = table.double().chunk(2, 1)
        out, (a, b) = x.clone(), (x[:, :, prefix:, first], x[:, :, prefix:, second])
        out[:, :, prefix:, first] = a * cosines[:, first] - b * sines[:, first]
        out[:, :, prefix:, second] = b * cosines[:, second] + a * sines[:, second]
        return out

    return Problem("rotary_embedding", ours, exact, [x.to(dtype)])
