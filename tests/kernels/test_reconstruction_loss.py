"""`reconstruction_loss`: the reference against float64, the interpreted kernel against both, and its memory."""

from __future__ import annotations

import gc
import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastlocal.kernels import reconstruction_loss, use_kernels

ErrorOf = Callable[[Tensor, Tensor], float]
op = sys.modules["fastlocal.kernels.reconstruction_loss"]  # the attribute of that name is the function

KINDS = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}
# Rounding bands: interpreted bfloat16 truncates where a card rounds, so its band is twice as wide.
BAND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def cut_into_tiles(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    """Of at most so many elements, whatever a card has multiprocessors."""
    device = torch.get_default_device()
    several = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    monkeypatch.setattr(op, "TILE_ELEMENTS", elements)
    monkeypatch.setattr(op, "TILE_ELEMENTS_PER_MULTIPROCESSOR", elements // several)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut even these problems into many tiles."""
    cut_into_tiles(monkeypatch, 1500)


def reconstruct(hidden: Tensor, weight: Tensor, bias: Tensor | None, upsample: int) -> Tensor:
    batch, height, width, _ = hidden.shape
    patches = F.linear(hidden, weight, bias).unflatten(-1, (upsample, upsample, -1))
    return patches.transpose(2, 3).reshape(batch, height * upsample, width * upsample, -1)


def eager(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *,
    upsample: int = 1, kind: str = "mse", normalize_target: bool = False, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """What a user writes: the products in hidden's dtype, the loss in float32 (float64) as autocast has it."""
    weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    out = reconstruct(hidden, weight, bias, upsample)
    out, target = (x if x.dtype == torch.float64 else x.float() for x in (out, target))
    if normalize_target:
        centered = target - target.mean(-1, keepdim=True)
        target = centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    losses = KINDS[kind](out, target, reduction="none").mean((1, 2, 3))
    return losses.mean() if reduction == "mean" else losses


def problem(
    batch: int = 2, height: int = 3, width: int = 5, channels: int = 20, upsample: int = 2, target_channels: int = 7,
    dtype: torch.dtype = torch.float32, seed: int = 0,
) -> list[Tensor]:  # fmt: skip
    """hidden, weight, bias and a target that stays 0.1 away from the reconstruction, where l1's gradient jumps."""
    torch.manual_seed(seed)
    hidden = torch.randn(batch, height, width, channels).to(dtype)
    weight = torch.randn(upsample**2 * target_channels, channels) / math.sqrt(channels)
    bias = torch.randn(len(weight))
    out = reconstruct(*(x.double() for x in (hidden, weight, bias)), upsample)
    distance = torch.randn_like(out)
    return [hidden, weight, bias, (out + distance + 0.1 * distance.sign()).to(dtype)]


def run(
    loss: Callable[..., Tensor],
    inputs: list[Any],
    upstream: Tensor | None = None,
    kernels: Any = "auto",
    **options: Any,
) -> list[Tensor]:
    """The loss and the gradients of hidden, weight and bias."""
    *leaves, target = (None if x is None else x.detach().clone() for x in inputs)
    required = [x.requires_grad_() for x in leaves if x is not None]
    with use_kernels(kernels):
        out = loss(*leaves, target, **options)
        gradients = torch.autograd.grad(
            out, required, torch.ones_like(out) if upstream is None else upstream.to(out.dtype)
        )
    return [out.detach(), *gradients]


def in_float64(inputs: list[Any]) -> list[Any]:
    return [None if x is None else x.double() for x in inputs]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_reference_is_exact_in_float64(kind: str, normalize: bool, relative_error: ErrorOf) -> None:
    inputs = in_float64(problem(batch=3))
    upstream = torch.randn(3, dtype=torch.float64)
    options: dict[str, Any] = {"upsample": 2, "kind": kind, "normalize_target": normalize, "reduction": "sample"}
    for out, expected in zip(
        run(reconstruction_loss, inputs, upstream, **options), run(eager, inputs, upstream, **options), strict=True
    ):
        assert relative_error(out, expected) < 1e-13


@pytest.mark.parametrize("kind", KINDS)
def test_reference_gradients_are_those_of_finite_differences(kind: str) -> None:
    *leaves, target = in_float64(problem(1, 2, 2, 3, 2, 2))
    leaves = [x.requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(
        lambda *x: reconstruction_loss(*x, target, upsample=2, kind=kind, reduction="sample"), leaves
    )


@pytest.mark.parametrize("dtype", BAND, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", [False, True], ids=["", "normalized"])
@pytest.mark.parametrize("shape", [(3, 5, 4, 24, 2, 6), (1, 197, 1, 50, 1, 33), (1, 3, 3, 96, 4, 3)], ids=str)
def test_triton_matches_float64_and_is_as_exact_as_eager(
    shape: tuple[int, ...], normalize: bool, kind: str, dtype: torch.dtype, relative_error: ErrorOf
) -> None:
    inputs = problem(*shape, dtype=dtype)
    if normalize and kind == "l1":  # a normalized target may come close to the reconstruction: keep it away here too
        inputs[3] = inputs[3] + 30 * inputs[3].sign()
        inputs[2] = inputs[2] + 10
    upstream = torch.rand(shape[0]) + 0.5
    options: dict[str, Any] = {"upsample": shape[4], "kind": kind, "normalize_target": normalize, "reduction": "sample"}
    expected = run(eager, in_float64(inputs), upstream, **options)
    results = run(reconstruction_loss, inputs, upstream, "triton", **options), run(eager, inputs, upstream, **options)
    for name, out, eagerly, exact in zip(("loss", "d_hidden", "d_weight", "d_bias"), *results, expected, strict=True):
        error = relative_error(out, exact)
        assert error < BAND[dtype], name
        assert error <= 2 * relative_error(eagerly, exact) + BAND[dtype] / 2, name
        assert out.dtype == (dtype if name == "d_hidden" else torch.float32), name


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 9, 9, 70, 3, 40))),
    has_bias=st.booleans(),
    kind=st.sampled_from(["mse", "smooth_l1"]),
    normalize=st.booleans(),
    reduction=st.sampled_from(["mean", "sample"]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_both_paths_match_float64_at_random_shapes(
    relative_error: ErrorOf, shape: tuple[int, ...], has_bias: bool, dtype: torch.dtype, **options: Any
) -> None:
    inputs: list[Any] = problem(*shape, dtype=dtype, seed=sum(shape))
    if not has_bias:
        inputs[2] = None
    options = {"upsample": shape[4], "normalize_target": options.pop("normalize"), **options}
    expected = run(eager, in_float64(inputs), **options)
    for kernels in ("triton", "reference"):
        for out, exact in zip(run(reconstruction_loss, inputs, None, kernels, **options), expected, strict=True):
            assert relative_error(out, exact) < BAND[dtype], kernels


HIDDEN_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "columns first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "without a class token": lambda x: torch.cat([x[:, :1], x], 1)[:, 1:],
    "unaligned": lambda x: torch.cat([x, x[..., :3]], -1)[..., :-3],
    "one sample for all": lambda x: x[:1].expand_as(x),
}
TARGET_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels first": lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "every second row": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "one sample for all": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize(("hidden_layout", "target_layout"), [*itertools.zip_longest(HIDDEN_LAYOUTS, TARGET_LAYOUTS)])
def test_any_strides(kernels: Any, hidden_layout: str, target_layout: str | None, relative_error: ErrorOf) -> None:
    hidden, weight, bias, target = problem(channels=24)
    hidden, target = HIDDEN_LAYOUTS[hidden_layout](hidden), TARGET_LAYOUTS[target_layout or "channels first"](target)
    weight = weight.t().contiguous().t()
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
    with use_kernels(kernels):
        loss = reconstruction_loss(*leaves, target, upsample=2)
        gradients = torch.autograd.grad(loss, leaves)
    expected = run(eager, in_float64([hidden, weight, bias, target]), upsample=2)
    for out, exact in zip([loss.detach(), *gradients], expected, strict=True):
        assert relative_error(out, exact) < 1e-5


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_target_and_weight_may_have_dtypes_of_their_own(kernels: Any, relative_error: ErrorOf) -> None:
    hidden, weight, bias, target = problem()
    inputs = [hidden, weight.half(), bias.double(), target.bfloat16()]
    results = run(reconstruction_loss, inputs, kernels=kernels, upsample=2)
    assert [x.dtype for x in results] == [torch.float32, torch.float32, torch.float16, torch.float64]
    for out, exact in zip(results, run(eager, in_float64(inputs), upsample=2), strict=True):
        assert relative_error(out, exact) < (1e-3 if out.dtype == torch.float16 else 1e-5)


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_micro_batches_add_up_to_the_batch(kernels: Any, relative_error: ErrorOf) -> None:
    inputs = problem(batch=5)
    whole = run(reconstruction_loss, inputs, kernels=kernels, upsample=2)
    sums: list[Any] = [0, [], 0, 0]
    for part in (slice(0, 2), slice(2, 5)):
        pieces = [inputs[0][part], inputs[1], inputs[2], inputs[3][part]]
        share = torch.full((part.stop - part.start,), 1 / 5)
        losses, d_hidden, d_weight, d_bias = run(
            reconstruction_loss, pieces, share, kernels, upsample=2, reduction="sample"
        )
        sums = [sums[0] + (losses * share).sum(), [*sums[1], d_hidden], sums[2] + d_weight, sums[3] + d_bias]
    sums[1] = torch.cat(sums[1])
    for out, added in zip(whole, sums, strict=True):
        assert relative_error(added, out) < 1e-6


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_two_runs_give_the_same_bits(kernels: Any) -> None:
    inputs = problem(dtype=torch.float16)
    first, second = (run(reconstruction_loss, inputs, kernels=kernels, upsample=2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_float16_gradients_survive_through_the_loss_scale(kernels: Any, relative_error: ErrorOf) -> None:
    """The gradient of a mean over many elements underflows float16 unless the scaler's factor comes before it."""
    inputs = problem(1, 16, 16, 32, 4, 16, dtype=torch.float16)
    scale = torch.tensor(65536.0)
    expected = run(eager, in_float64(inputs), scale, upsample=4)
    for out, exact in zip(run(reconstruction_loss, inputs, scale, kernels, upsample=4)[1:], expected[1:], strict=True):
        assert relative_error(out, exact) < BAND[torch.float16]


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_a_constant_target_normalizes_to_zero(kernels: Any, relative_error: ErrorOf) -> None:
    hidden, weight, bias, target = problem()
    for flat, options in ((torch.full_like(target, 3.0), {"normalize_target": True}), (torch.zeros_like(target), {})):
        results = run(reconstruction_loss, [hidden, weight, bias, flat], kernels=kernels, upsample=2, **options)
        if options:
            normalized = results
    for out, exact in zip(normalized, results, strict=True):
        assert relative_error(out, exact) < 1e-5


def test_every_subset_of_inputs_that_require_grad(relative_error: ErrorOf) -> None:
    inputs = problem()
    expected = run(reconstruction_loss, inputs, upsample=2)[1:]
    for kernels, *subset in itertools.product(("reference", "triton"), *[(False, True)] * 3):
        leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs[:3], subset, strict=True)]
        with use_kernels(kernels):  # type: ignore[arg-type]
            loss = reconstruction_loss(*leaves, inputs[3], upsample=2)
            assert loss.requires_grad == any(subset)
            if any(subset):
                loss.backward()
        for leaf, need, gradient in zip(leaves, subset, expected, strict=True):
            assert (leaf.grad is not None) == need
            assert leaf.grad is None or relative_error(leaf.grad, gradient) < 1e-5


def test_the_graph_can_be_used_twice(relative_error: ErrorOf) -> None:
    hidden, weight, bias, target = problem()
    weight.requires_grad_()
    loss = reconstruction_loss(hidden, weight, bias, target, upsample=2) + reconstruction_loss(
        hidden, weight, bias, target, upsample=2, kind="l1"
    )
    loss.backward(retain_graph=True)
    once = weight.grad.clone()  # type: ignore[union-attr]
    loss.backward()
    assert relative_error(weight.grad, 2 * once) < 1e-6  # type: ignore[arg-type]


def test_once_differentiable() -> None:
    hidden, weight, bias, target = problem()
    hidden.requires_grad_()
    loss = reconstruction_loss(hidden, weight, bias, target, upsample=2)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient.sum().backward()


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["hidden", "target"])
def test_nan_reaches_the_loss_and_every_gradient(where: str, kind: Any, normalize: bool, kernels: Any) -> None:
    """A GradScaler skips a step by its gradients: a NaN loss whose gradients are numbers would train on."""
    hidden, weight, bias, target = problem()
    (hidden if where == "hidden" else target)[0, 0, 0, 0] = math.nan
    leaves = [tensor.detach().requires_grad_() for tensor in (hidden, weight, bias)]
    with use_kernels(kernels):
        loss = reconstruction_loss(*leaves, target, upsample=2, kind=kind, normalize_target=normalize)
        loss.backward()
    assert loss.isnan()
    assert all(leaf.grad is not None and leaf.grad.isnan().any() for leaf in leaves)


@pytest.mark.parametrize("normalize", [False, True])
def test_strides_that_overflow_32_bits(normalize: bool) -> None:
    """Channels first in a large batch: the offset of the last channel exceeds 2**31. Pages never touched cost nothing."""
    hidden, weight, bias, target = problem()
    channels, stride = target.shape[-1], 2**31 // (target.shape[-1] - 1) + 7
    wide = torch.empty(channels * stride, dtype=torch.float16)
    far = wide.as_strided(target.shape, (target[0, ..., 0].numel(), target.shape[2], 1, stride))
    far.copy_(target)
    with use_kernels("triton"):
        out = reconstruction_loss(hidden, weight, bias, far, upsample=2, normalize_target=normalize)
        near = reconstruction_loss(hidden, weight, bias, target.half(), upsample=2, normalize_target=normalize)
    assert torch.equal(out, near)


# --- Memory -----------------------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """The bytes of every storage that an op makes, and the most that was alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, Any] = {}
        self.largest = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = torch.utils._pytree.tree_leaves(args)
        inputs = {x.untyped_storage()._cdata for x in given if isinstance(x, Tensor)}
        inputs |= {x._cdata for x in given if isinstance(x, torch.UntypedStorage)}
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in inputs:
                self.seen[x.untyped_storage()._cdata] = (
                    torch.multiprocessing.reductions.StorageWeakRef(x.untyped_storage()),
                    x.untyped_storage().nbytes(),
                )
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        if self._alive() > self.peak:
            gc.collect()  # the interpreter's garbage is in cycles, and its time is Python's choice
            self.peak = max(self.peak, self._alive())
        return out

    def _alive(self) -> int:
        self.seen = {key: (ref, size) for key, (ref, size) in self.seen.items() if not ref.expired()}
        return sum(size for _, size in self.seen.values())


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", [False, True], ids=["", "normalized"])
@pytest.mark.parametrize("kind", KINDS)
def test_never_holds_a_tensor_as_large_as_the_reconstruction(
    kernels: Any, dtype: torch.dtype, normalize: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_into_tiles(monkeypatch, 2**12)
    inputs = problem(4, 12, 8, 12, 2, 32, dtype=dtype)
    inputs[3] = inputs[3].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    reconstruction = inputs[3].numel() * dtype.itemsize
    options = (2, kind, normalize, kernels)
    # The bodies themselves: what they allocate inside the registered ops, a dispatch mode does not see.
    with use_kernels(kernels), torch.no_grad():
        workspace = op.workspace_bytes(*inputs[:2], inputs[3])
        with Allocations() as forward:
            losses = op._run(*inputs, *options)
        with Allocations() as backward:
            gradients = op._run_backward(torch.ones_like(losses), *inputs, *options, [True] * 3)
    assert forward.largest < reconstruction / 4
    assert backward.largest < reconstruction / 4
    assert forward.peak <= losses.nbytes + workspace
    assert backward.peak <= sum(x.nbytes for x in gradients) + workspace
    assert workspace < reconstruction


def test_workspace_does_not_grow_with_the_batch() -> None:
    sizes = []
    for batch in (64, 128):
        hidden, weight, target = torch.empty(batch, 14, 14, 32), torch.empty(96, 32), torch.empty(batch, 28, 28, 24)
        sizes.append(op.workspace_bytes(hidden, weight, target))
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize("amp", [False, True])
def test_saves_its_inputs_and_nothing_else(amp: bool) -> None:
    hidden, weight, bias, target = problem()
    saved: list[Tensor] = []
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x)
    with hooks, torch.autocast(hidden.device.type, torch.bfloat16, enabled=amp):
        reconstruction_loss(*leaves, target, upsample=2)
    hidden_bytes = hidden.numel() * (2 if amp else 4)
    assert sum(x.nbytes for x in saved) == hidden_bytes + weight.nbytes + bias.nbytes + target.nbytes


def test_autocast_multiplies_in_its_dtype_and_sums_in_float32(relative_error: ErrorOf) -> None:
    inputs = problem()
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        results = run(reconstruction_loss, inputs, upsample=2)
    assert [x.dtype for x in results] == [torch.float32] * 4
    for out, exact in zip(results, run(eager, in_float64(inputs), upsample=2), strict=True):
        assert relative_error(out, exact) < BAND[torch.bfloat16]
    assert (
        relative_error(results[1], run(reconstruction_loss, inputs, upsample=2)[1]) > 1e-4
    )  # it did multiply in bfloat16


# --- Registration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_opcheck(kernels: Any, has_bias: bool) -> None:
    hidden, weight, bias, target = problem()
    some_bias = bias if has_bias else None
    options = (2, "mse", False, kernels)
    with use_kernels(kernels):
        leaves = [x if x is None else x.detach().requires_grad_() for x in (hidden, weight, some_bias)]
        torch.library.opcheck(torch.ops.fastlocal.reconstruction_loss.default, (*leaves, target, *options))
        torch.library.opcheck(
            torch.ops.fastlocal.reconstruction_loss_backward.default,
            (torch.rand(2), hidden, weight, some_bias, target, *options, [True, False, has_bias]),
        )


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(20), nn.Linear(20, 28)

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        return reconstruction_loss(self.norm(hidden), self.linear.weight, self.linear.bias, target, upsample=2)


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("amp", [False, True])
def test_compiles_into_one_graph(kernels: Any, amp: bool, relative_error: ErrorOf) -> None:
    hidden, _, _, target = problem()
    decoder = Decoder()
    results = []
    with use_kernels(kernels):
        for call in (decoder, torch.compile(decoder, fullgraph=True, backend="aot_eager")):
            decoder.zero_grad()
            with torch.autocast(hidden.device.type, torch.bfloat16, enabled=amp):
                loss = call(hidden, target)
            loss.backward()
            results.append([loss.detach(), *(p.grad.clone() for p in decoder.parameters())])
    for eagerly, compiled in zip(*results, strict=True):
        assert relative_error(compiled, eagerly) < (1e-2 if amp else 1e-6)


def test_runs_on_fake_tensors() -> None:
    with FakeTensorMode():
        hidden = torch.empty(64, 7, 7, 768, dtype=torch.bfloat16, requires_grad=True)
        weight, bias = (torch.empty(*shape, requires_grad=True) for shape in ((1536, 768), (1536,)))
        target = torch.empty(64, 384, 14, 14).permute(0, 2, 3, 1)
        loss = reconstruction_loss(hidden, weight, bias, target, upsample=2)
        loss.backward()
        assert (loss.shape, loss.dtype) == (torch.Size([]), torch.float32)
        for leaf in (hidden, weight, bias):
            assert leaf.grad is not None
            assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, leaf.dtype)
        assert op.workspace_bytes(hidden, weight, target) > 0


def test_flops_are_one_product_forward_and_three_backward() -> None:
    hidden, weight, bias, target = problem()
    with FlopCounterMode(display=False) as counter:
        loss = reconstruction_loss(hidden.requires_grad_(), weight.requires_grad_(), bias, target, upsample=2)
        forward = counter.get_total_flops()
        loss.backward()
    assert forward == 2 * (2 * 3 * 5) * 20 * 28
    assert counter.get_total_flops() == 4 * forward


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kind": "l2"}, "kind must be one of mse, l1, smooth_l1, got 'l2'"),
        ({"reduction": "sum"}, "reduction must be one of mean, sample, got 'sum'"),
        ({"upsample": 0}, "upsample must be a positive integer, got 0"),
        ({"upsample": 2.0}, r"upsample must be a positive integer, got 2\.0"),
        ({"hidden": torch.ones(2, 3, 5, 20).long()}, "hidden must be float16, .* got torch.int64"),
        ({"target": torch.ones(2, 6, 10, 7).byte()}, "target must be float16, .* got torch.uint8"),
        ({"weight": torch.ones(28, 20, device="meta")}, "weight must be on hidden's device, cpu, got meta"),
        (
            {"hidden": torch.ones(2, 15, 20)},
            r"hidden must be \[B, h, w, Ck\] with no empty dimension, got \[2, 15, 20\]",
        ),
        ({"hidden": torch.ones(2, 0, 5, 20)}, "hidden must be .* no empty dimension"),
        ({"hidden": torch.ones(2, 3, 20, 5).mT}, "hidden must have unit stride in its last dimension"),
        ({"target": torch.ones(2, 3, 5, 7)}, r"target must be \[2, 6, 10, Ct\] for hidden .* got \[2, 3, 5, 7\]"),
        ({"weight": torch.ones(28, 19)}, r"weight must be \[upsample² · Ct, Ck\] = \[28, 20\] .* got \[28, 19\]"),
        ({"bias": torch.ones(7)}, r"bias must be \[upsample² · Ct\] = \[28\] or None, got \[7\]"),
        ({"target": torch.ones(2, 6, 10, 7, requires_grad=True)}, "target must not require grad"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], sentence: str) -> None:
    names = ("hidden", "weight", "bias", "target")
    arguments = dict(zip(names, (tensor.cpu() for tensor in problem()), strict=True)) | {"upsample": 2} | change
    with pytest.raises(ValueError, match=sentence) as error:
        reconstruction_loss(**arguments)
    assert "\n" not in str(error.value)


def test_every_compile_case_names_what_its_kernel_takes() -> None:
    from fastlocal.kernels.reconstruction_loss_triton import compile_cases

    cases = compile_cases()
    assert len({case.name for case in cases}) == len(cases) == 3 * (2 * 9 + 1)
    for case in cases:
        assert set(case.signature) | set(case.constexprs) == set(case.kernel.arg_names), case.name
        assert not set(case.signature) & set(case.constexprs), case.name
