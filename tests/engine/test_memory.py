"""The meter against paper and pencil, against torch's MemTracker, and a dry run against a real one."""

from __future__ import annotations

import gc
import importlib
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastlocal
from fastlocal import memory
from fastlocal.kernels import reconstruction_loss
from fastlocal.kernels.reconstruction_loss import workspace_bytes
from fastlocal.memory import KINDS, Meter

reconstruction_loss_module = importlib.import_module("fastlocal.kernels.reconstruction_loss")

MIB = 2**20


def test_a_matmul_chain_counts_as_on_paper() -> None:
    a, b = torch.randn(64, 32), torch.randn(32, 128)  # 8 KiB, 16 KiB
    c = torch.randn(128, 16)  # 8 KiB, not given: counts from its first use
    with Meter(a, b) as meter:
        d = a @ b  # 32 KiB
        e = d @ c  # 4 KiB, while d and c live: the peak
        del d
        f = e.relu()  # 4 KiB
    del f
    assert [sum(state.values()) // 1024 for _, state in meter.timeline()] == [24, 56, 64, 68, 36, 40]
    assert meter.peak == 68 * 1024
    assert meter.live == 40 * 1024
    assert meter.peak_by_kind == {**dict.fromkeys(KINDS, 0), "inputs": 32 * 1024, "temporary": 36 * 1024}


def test_views_and_in_place_operations_are_free() -> None:
    x = torch.randn(32, 32)
    with Meter(x) as meter:
        view = x.view(-1)[4:].reshape(3, -1).transpose(0, 1)
        view.mul_(2)
        x.add_(1).clamp_(0, 1)
    assert meter.peak == meter.live == x.nbytes


def test_a_temporary_inside_an_expression_is_freed() -> None:
    x = torch.randn(256)
    with Meter(x) as meter:
        for _ in range(10):
            y = (x * 2 + 1).sum()  # at most: x * 2 and its + 1
    assert meter.peak == 3 * x.nbytes + y.nbytes  # the last round's y is still there in the next
    assert meter.live == x.nbytes + y.nbytes


def test_the_graph_is_what_autograd_saved() -> None:
    x, w = torch.randn(64, 32), nn.Parameter(torch.randn(32, 32))
    unit = 64 * 32 * 4
    with Meter(w, x) as meter:
        loss = (x @ w).exp().tanh().sum()  # saved: exp's and tanh's results; the product is let go
        forward = meter.live
        loss.backward()
    assert forward == w.nbytes + x.nbytes + 2 * unit + 4
    graph = max(state["graph"] for _, state in meter.timeline())
    assert graph == 2 * unit + loss.nbytes + 4  # and backward's incoming gradient, which is made like the loss
    assert meter.live_by_kind["gradients"] == w.nbytes
    assert meter.live == x.nbytes + 2 * w.nbytes + loss.nbytes


def test_what_only_the_forward_needs_is_temporary() -> None:
    w = nn.Parameter(torch.randn(128))
    with Meter(w) as meter:
        loss = ((w + 1) + 2).sum()  # additions and sums save nothing
        loss.backward()
    assert max(state["graph"] for _, state in meter.timeline()) == 8
    assert max(state["temporary"] for _, state in meter.timeline()) >= 2 * w.nbytes


def test_parameters_gradients_and_adam_states() -> None:
    model = nn.Sequential(nn.Linear(30, 50), nn.BatchNorm1d(50), nn.Linear(50, 7))
    optimizer = torch.optim.AdamW(model.parameters())
    parameters = sum(p.nbytes for p in model.parameters())
    with Meter(model) as meter:
        model(torch.randn(5, 30)).sum().backward()
        optimizer.step()
        during = meter.live_by_kind
        optimizer.zero_grad()
    assert during["gradients"] == parameters
    assert meter.live_by_kind["gradients"] == 0
    assert meter.live_by_kind["optimizer"] == 2 * parameters + 4 * len(list(model.parameters()))
    assert meter.live_by_kind["parameters"] == parameters + sum(b.nbytes for b in model.buffers())
    with Meter(model, optimizer) as again:  # what exists before counts from the start
        pass
    assert again.peak == meter.live


def test_accumulated_gradients_stay_gradients() -> None:
    w = nn.Parameter(torch.randn(100))
    with Meter(w) as meter:
        for _ in range(3):
            (w * w).sum().backward()
    assert meter.live_by_kind["gradients"] == w.nbytes
    assert meter.live == 2 * w.nbytes


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, width: int = 64, depth: int = 3, recompute: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 10)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x.mean(1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(16, 49, 64), torch.arange(16) % 10


@pytest.mark.parametrize("recompute", [False, True])
def test_agrees_with_mem_tracker_to_the_byte(recompute: bool) -> None:
    model = Net(recompute=recompute)
    optimizer = torch.optim.AdamW(model.parameters())
    data = batch()
    train(model, optimizer, *data)
    tracker = MemTracker()
    tracker.track_external(model, optimizer, *data)
    with tracker:
        train(model, optimizer, *data)
    with Meter(model, optimizer, *data) as meter:
        train(model, optimizer, *data)
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    assert meter.peak == peak["Total"]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_dry_run_measures_what_a_real_run_does(recompute: bool) -> None:
    model, data = Net(recompute=recompute), batch()
    with memory.dry_run("cpu"):
        fake = memory.fake_copy(model)
        optimizer = torch.optim.AdamW(fake.parameters())
        images, labels = torch.empty(16, 49, 64), torch.empty(16, dtype=torch.long)
        with Meter(fake, images, labels) as dry:
            train(fake, optimizer, images, labels)
    optimizer = torch.optim.AdamW(model.parameters())
    with Meter(model, *data) as real:
        train(model, optimizer, *data)
    assert dry.peak == real.peak
    assert dry.peak_by_kind == real.peak_by_kind
    assert dry.live_by_kind == real.live_by_kind


def test_recomputation_keeps_one_block_in_the_graph() -> None:
    def graph(recompute: bool, depth: int) -> int:
        model = Net(recompute=recompute, depth=depth)
        with Meter(model) as meter:
            train(model, torch.optim.SGD(model.parameters(), 0.1), *batch())
        return max(state["graph"] for _, state in meter.timeline())

    boundary = 16 * 49 * 64 * 4
    assert graph(True, 5) - graph(True, 3) <= 2 * boundary + 4096
    assert graph(False, 5) - graph(False, 3) > 2 * 8 * boundary / 2  # per block at least 8 boundaries in bfloat16


def test_kinds_add_up_and_thinning_keeps_the_peak() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    with Meter(model) as meter:
        train(model, optimizer, *batch())
    whole = meter.timeline()
    assert [index for index, _ in whole] == list(range(len(whole)))
    assert max(sum(state.values()) for _, state in whole) == meter.peak == sum(meter.peak_by_kind.values())
    thin = meter.timeline(points=20)
    assert len(thin) <= 20
    assert set(map(str, thin)) <= set(map(str, whole))
    assert max(sum(state.values()) for _, state in thin) == meter.peak


@pytest.mark.parametrize("dry", [False, True])
def test_follows_a_parameter_whose_data_is_swapped(dry: bool) -> None:
    def swap() -> Meter:
        parameter = nn.Parameter(torch.ones(1000))
        host = memory.on_host(parameter.data.clone())
        with Meter(parameter, host) as meter:
            parameter.data = host  # the device copy goes
            assert meter.live == 0
            assert meter.peak_by_device == {"cpu": 4000, "host": 4000}
            parameter.data = host.clone()  # and comes back
            (parameter * 2).sum().backward()
            assert meter.live_by_kind["parameters"] == 4000
            parameter.data = parameter.data.new_empty(0)
            assert meter.live_by_kind["parameters"] == 0
        return meter

    if dry:
        with memory.dry_run():
            meter = swap()
    else:
        meter = swap()
    assert meter.live_by_kind["gradients"] == 4000


def test_resizing_a_storage_is_seen() -> None:
    x = torch.randn(1000)
    with Meter(x) as meter:
        x.untyped_storage().resize_(0)
        assert meter.live == 0
        x.untyped_storage().resize_(8000)
        grown = torch.empty(10)
        grown.resize_(500)
    assert meter.live == 10_000


def test_marks_hold_from_the_first_moment_and_across_meters() -> None:
    with Meter() as meter:
        kept = memory.tag(torch.empty(100), "boundary")
        away = memory.on_host(torch.empty(50))
    assert meter.peak == 400
    assert meter.peak_by_kind["boundary"] == 400
    assert meter.peak_by_device == {"cpu": 400, "host": 200}
    with Meter() as later:
        (kept.view(10, 10)[0] + 1).sum()
        away.add_(1)
    assert later.peak_by_kind["boundary"] == 400
    assert later.peak_by_device["host"] == 200
    gc.collect()
    before = len(memory._tags), len(memory._on_host)
    del kept, away
    assert (len(memory._tags), len(memory._on_host)) == (before[0] - 1, before[1] - 1)


def test_a_tag_wins_over_what_the_meter_finds() -> None:
    w = nn.Parameter(torch.randn(10))
    memory.tag(w, "inputs")
    with Meter(w) as meter:
        (w * 2).sum()
    assert meter.peak_by_kind["inputs"] == w.nbytes
    with pytest.raises(ValueError, match="kind must be one of parameters, gradients"):
        memory.tag(w, "weights")  # type: ignore[arg-type]


def test_the_parts_of_a_wrapper_tensor_count() -> None:
    pair = TwoTensor(torch.randn(100), torch.randn(100))
    with Meter(pair) as meter:
        twice = pair * 2
        assert meter.live == 1600
        del twice
        assert meter.live == 800


def test_a_part_of_a_wrapper_that_is_no_tensor_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the device mesh of a DTensor."""
    pair = TwoTensor(torch.randn(100), torch.randn(100))
    pair.mesh = object()
    monkeypatch.setattr(TwoTensor, "__tensor_flatten__", lambda self: (["a", "b", "mesh"], None))
    with Meter(pair) as meter:
        assert meter.live == 800


def test_traffic_is_what_is_copied_between_host_and_device() -> None:
    there, host = torch.ones(1000), memory.on_host(torch.ones(1000))
    with Meter(there, host) as meter:
        host.copy_(there)
        assert meter.traffic == 4000
        here = host.clone()
        assert meter.traffic == 8000
        there.copy_(here)
        here.to(torch.bfloat16)
        assert meter.traffic == 8000


def test_a_fused_op_counts_the_scratch_memory_it_documents() -> None:
    """In a dry run, which stands for a card; on real CPU tensors the reference runs, without it."""

    def measure() -> tuple[Meter, int]:
        hidden = torch.ones(4, 14, 14, 96, dtype=torch.bfloat16).requires_grad_()
        weight, target = nn.Parameter(torch.ones(4 * 48, 96)), torch.ones(4, 28, 28, 48, dtype=torch.bfloat16)
        with Meter(hidden, weight, target) as meter:
            reconstruction_loss(hidden, weight, None, target, upsample=2).backward()
        return meter, workspace_bytes(hidden, weight, target)

    with memory.dry_run():
        meter, scratch = measure()
    assert scratch > 10**6
    assert meter.peak_by_kind["temporary"] >= scratch
    assert max(sum(state.values()) for _, state in meter.timeline()) == meter.peak
    real, _ = measure()
    assert real.peak <= meter.peak - scratch


def test_what_the_fused_op_documents_covers_what_its_reference_takes() -> None:
    """Its bodies, run in view of the meter."""
    forward, backward = reconstruction_loss_module._run, reconstruction_loss_module._run_backward
    for shape, outputs, upsample in (((4, 14, 14, 96), 192, 2), ((2, 196, 1, 384), 768, 1), ((8, 56, 56, 96), 768, 4)):
        hidden = torch.randn(shape, dtype=torch.bfloat16)
        weight, bias = torch.randn(outputs, shape[-1]), torch.randn(outputs)
        channels = outputs // upsample**2
        target = torch.randn(shape[0], shape[1] * upsample, shape[2] * upsample, channels).bfloat16()
        given = (hidden, weight, bias, target)
        documented = workspace_bytes(hidden, weight, target)
        for kind in ("mse", "l1", "smooth_l1"):
            for normalize in (False, True):
                with torch.no_grad(), Meter(*given) as meter:
                    loss = forward(*given, upsample, kind, normalize, "reference")
                used = [meter.peak - meter.live]
                with torch.no_grad(), Meter(*given, loss) as meter:
                    results = backward(loss, *given, upsample, kind, normalize, "reference", [True] * 3)
                used.append(meter.peak - meter.live)
                assert max(used) <= documented, (shape, kind, normalize, used)
                assert results[0].shape == hidden.shape
        assert documented <= 2 * max(used) + 2**20, (shape, used, documented)


@pytest.mark.parametrize(
    ("card", "most"),
    [
        (SimpleNamespace(max_threads_per_multi_processor=2048, multi_processor_count=132), 132 * 2**20),
        (SimpleNamespace(max_threads_per_multi_processor=1536, multi_processor_count=24), 18 * 2**20),
    ],
    ids=["H100", "RTX 4060"],
)
def test_sums_over_rows_count_what_their_kernel_takes(card: Any, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an H100 allocated in a step: 73.5 MiB in the sum of [25088, 384], 18.375 MiB in the mean of [8, 56, 56, 96]."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    with memory.dry_run():
        wide = torch.empty(25088, 384, dtype=torch.bfloat16)
        image = torch.empty(8, 56, 56, 96)
        for x, sum_over_rows in ((wide, lambda: wide.sum(0)), (image, lambda: image.mean((1, 2)))):
            with Meter(x, card=torch.device("cuda", 0)) as meter:
                total = sum_over_rows()
            assert meter.peak == x.nbytes + total.nbytes + min(8 * x.numel(), most)
        for nothing in (lambda: wide.sum(1), lambda: wide.sum(), lambda: wide[:8].sum(0)):
            with Meter(wide, card=torch.device("cuda", 0)) as meter:
                nothing()
            assert meter.peak < wide.nbytes + 2**17
        with Meter(wide) as meter:  # no card to ask
            wide.sum(0)
        assert meter.peak < wide.nbytes + 2**17


def test_fake_copy_shares_ties_and_leaves_the_model_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    with memory.dry_run():
        assert memory.is_dry_run()
        fake = memory.fake_copy(model)
        assert fake[1].weight is fake[0].weight
        assert not fake[2].weight.requires_grad
        fake(torch.empty(2, 3)).sum().backward()
        assert fake[0].weight.grad is not None
    assert not memory.is_dry_run()
    assert model[0].weight.grad is None
    assert type(model[0].weight.data) is Tensor
    with pytest.raises(RuntimeError, match="tensors without data"):
        memory.fake_copy(model)


def test_a_dry_run_takes_an_optimizer_and_a_grad_scaler() -> None:
    with memory.dry_run():
        model = nn.Linear(100, 100)
        optimizer = torch.optim.AdamW(model.parameters())
        scaler = torch.amp.GradScaler("cpu")
        with Meter(model) as meter:
            for _ in range(2):
                loss = model(torch.empty(4, 100)).sum()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        assert float(loss.detach()) == 0.0
        assert not bool(torch.isfinite(loss))
        nn.init.trunc_normal_(model.weight)  # reads whether all values are in range
        with pytest.raises(DynamicOutputShapeException):
            torch.nonzero(loss)
    assert meter.live_by_kind["optimizer"] == 2 * 4 * 10_100 + 2 * 4


@pytest.mark.parametrize(("recompute", "expected"), [(False, 4645), (True, 1678)])
def test_swin_tiny_at_batch_64(recompute: bool, expected: int) -> None:
    """What is known of this step, without the 36.75 MiB of images: 4645 MiB by the meter on an H100 too."""
    with torch.device("meta"):
        model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10)
    with memory.dry_run():
        model = memory.fake_copy(model)
        model.set_grad_checkpointing(recompute)
        optimizer = torch.optim.AdamW(model.parameters())
        train(model, optimizer, torch.empty(1, 3, 224, 224), torch.empty(1, dtype=torch.long))
        images = torch.empty(64, 3, 224, 224)
        with Meter(model, optimizer, images) as meter:
            train(model, optimizer, images, torch.empty(64, dtype=torch.long))
    assert (meter.peak - images.nbytes) / MIB == pytest.approx(expected, rel=0.002)


@pytest.mark.parametrize(("device", "dtype"), [("cuda", torch.float32), ("cpu", torch.bfloat16)])
def test_a_dry_run_of_a_card_keeps_what_its_autocast_computes_in_float32(device: str, dtype: torch.dtype) -> None:
    """The probabilities of an attention that is not fused, in the forward and where a backward recomputes it."""
    attention = timm.layers.Attention(32, num_heads=2)
    attention.fused_attn = False
    probabilities: list[torch.dtype] = []
    attention.attn_drop.register_forward_pre_hook(lambda _, given: probabilities.append(given[0].dtype))
    saved: list[tuple[torch.Size, torch.dtype]] = []
    note = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append((t.shape, t.dtype)) or t, lambda t: t)
    with memory.dry_run(device):
        layer, x = memory.fake_copy(attention), torch.empty(2, 16, 32, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            with note:
                layer(x)
            output = checkpoint(layer, x, use_reentrant=False)
        output.sum().backward()
    assert probabilities == [dtype] * 3
    assert (torch.Size((2, 2, 16, 16)), dtype) in saved
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.ones(2, dtype=torch.bfloat16).softmax(0).dtype == torch.bfloat16  # real ones are left alone


def test_cublas_has_a_workspace_in_each_of_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for present, capability, each in (
        (False, None, 32),
        (True, (8, 6), 8.125),
        (True, (9, 0), 32),
        (True, (12, 0), 32),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda present=present: present)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert memory.cublas_workspaces("cuda:0") == 2 * each * MIB
    assert memory.cublas_workspaces("cpu") == 0
    for text, kibibytes in ((":16:8", 128), (":4096:2:16:8", 8320), (":0:0", 0)):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", text)
        assert memory.cublas_workspaces(torch.device("cuda")) == 2 * kibibytes * 1024


class _Log(TorchDispatchMode):
    """The operations that ran, with the dtypes of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not torch.ops.prim.device.default:
            self.ops.append((func, [getattr(one, "dtype", None) for one in (*args, result)]))
        return result


@pytest.mark.parametrize(
    "run",
    [
        lambda x: x.softmax(-1),
        lambda x: x.softmax(-1, dtype=torch.float64),
        lambda x: F.log_softmax(x, -1),
        lambda x: x.sum(),
        lambda x: x.sum(0, dtype=torch.bfloat16),
        lambda x: x.long().sum(),
        lambda x: x.double().exp(),
        lambda x: x.cumsum(0),
        lambda x: x.norm(),
        lambda x: F.normalize(x),
        lambda x: F.cosine_similarity(x, x),
        lambda x: F.layer_norm(x, [8], x[0], x[0]),
        lambda x: F.group_norm(x, 2),
        lambda x: x.exp() * x**2 + x.rsqrt().log1p(),
        lambda x: F.softplus(x).logsumexp(0),
        lambda x: F.interpolate(x[None, None], scale_factor=2, mode="bicubic"),
        lambda x: F.interpolate(x[None, None], scale_factor=2, mode="nearest"),
        lambda x: F.mse_loss(x, x) + F.smooth_l1_loss(x, x),
        lambda x: F.gelu(x @ x.T).mean().sigmoid(),
        lambda x: F.multi_head_attention_forward(
            *(x, x, x, 8, 2, x.new_zeros(24, 8), None, None, None, False, 0.0, x.new_zeros(8, 8), None)
        )[0],
    ],
)
def test_a_dry_run_of_a_card_follows_the_autocast_of_cuda(run: Callable[[Tensor], Tensor]) -> None:
    """Operations and dtypes are those on fake CUDA tensors under CUDA's own rules."""
    seen = {}
    torch.set_autocast_enabled("cuda", True)  # torch.autocast("cuda") refuses to start without a card
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        for device in ("cuda", "cpu"):
            with FakeTensorMode() if device == "cuda" else memory.dry_run(), torch.autocast("cpu", torch.bfloat16):
                x = torch.empty(4, 8, dtype=torch.bfloat16, device=device)
                with _Log() as log:
                    run(x)
            seen[device] = log.ops
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert seen["cpu"] == seen["cuda"]


def _allocated_at_most(run: Callable[[], object]) -> int:
    """What torch's CPU allocator held at most while ``run`` ran, beyond what it held before: bytes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held)


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "feature"},
        {"objective": "end-to-end", "residency": "module", "weights": "low", "amp_dtype": torch.bfloat16},
    ],
    ids=["feature", "low weights"],
)
def test_a_step_is_counted_as_the_allocator_does(options: dict[str, Any]) -> None:
    # A Swin without SDPA, whose CPU kernel has scratch memory of its own.
    shape: dict[str, Any] = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 32, "depths": (2, 2, 2)}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, num_heads=(1, 2, 4), **shape)
    trainer = fastlocal.LocalTrainer(model, modules=3, **options)
    images, labels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 10, (4,))
    for _ in range(2):
        trainer.step(images, labels)
    gc.collect()
    heads = [module.heads for module in trainer.modules]
    with memory.Meter(trainer.model, *heads, *trainer.optimizers, images, labels) as meter:
        trainer.step(images, labels)
    before = sum(meter.timeline(device="cpu")[0][1].values())
    ours, truth = meter.peak - before, _allocated_at_most(lambda: trainer.step(images, labels))
    assert ours == pytest.approx(truth, rel=0.01)


def _operations(mode: Any, places: int) -> list[tuple[Any, ...]]:
    """What operations of every kind give on tensors at ``places`` of a common storage, seen twice."""
    seen: list[tuple[Any, ...]] = []
    with mode:
        flat = torch.empty(4096)
        for place in (0, places):
            x = flat[place : place + 48].view(2, 4, 6)
            weight = flat[place + 100 : place + 106]
            known = torch.tensor(3.0)
            made: list[Any] = [
                *(x + 1, x * x.transpose(0, 1).transpose(0, 1), x.view(8, 6), x[:, 1:3], x[..., ::2], x[1, 5:9], x[-1]),
                *(x.transpose(1, 2), *x.unbind(1), *x.split([1, 3], 1), x.as_strided((3, 2), (2, 1), 7), x.detach()),
                *(x.to(torch.bfloat16), x.to(torch.float32), torch.cat([x, x], 1), x.new_zeros(3), x.expand(2, 4, 6)),
                *torch.native_layer_norm(x, [6], weight, weight, 1e-5),
                *(x.add_(1), x.mul_(weight), x.flatten().unsqueeze_(0), x.copy_(x)),
                *(x.sum((0, 2)), x.amax(-1), x.softmax(-1), x.mean(), x.norm(), known * 2, known + x, x == 1.0, x == 1),
                *torch.topk(x, 2),
            ]
            torch._foreach_add_([x, weight], 1.0)
            base = x.untyped_storage()._cdata
            for tensor in made:
                shares = tensor.untyped_storage()._cdata == base
                offset = tensor.storage_offset() - (x.storage_offset() if shares else 0)
                size = tensor.untyped_storage().nbytes()
                seen.append((tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, shares, offset, size))
            seen.append((float(known * 2), float(known.add_(1))))
            with pytest.raises(RuntimeError):
                x.view(7)
    return seen


def test_what_a_dry_run_remembers_is_what_torch_would_say() -> None:
    """Shapes, strides, sizes and who shares memory with whom, where one operation comes again with tensors elsewhere."""
    for places in (1000, 2048):  # the second time all of it is known
        assert _operations(memory.dry_run(), places) == _operations(FakeTensorMode(), places)
