"""The traffic counter counts right, its extension to real sizes is exact, and the kernels keep to their targets."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlocal.profiling.cli import bench
from fastlocal.profiling.kernels import block_traffic, traffic, traffic_report, workloads
from fastlocal.profiling.kernels.traffic import CountTraffic, CudaAutocastPolicy, Entry, Traffic
from fastlocal.profiling.kernels.workloads import UNFUSED, Workload

CPU = torch.device("cpu")

WINDOWS = Workload("window_attention", "2 x 2 windows", workloads._window_attention(14, 2, shift=3))
ONE_WINDOW = Workload("window_attention", "one window", workloads._window_attention(7, 4, shift=0))
ATTENTION = Workload("attention", "67 tokens", workloads._attention(tokens=67, heads=2, head_dim=64))
ROTARY = Workload("rotary_embedding", "21 tokens", workloads._rotary_embedding(21, 5, half=True))
LOSS = Workload("reconstruction_loss", "to features", workloads._reconstruction_loss(7, 64, 2, 32))
SMALL = (WINDOWS, ONE_WINDOW, ATTENTION, ROTARY, LOSS)


# --- PyTorch ops ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "loaded", "stored"),
    [
        (lambda x: x + x.T, 2 * 400, 400),
        (lambda x: x.view(-1).unsqueeze(0)[:, 2:].T, 0, 0),
        (lambda x: x.T.reshape(-1), 400, 400),
        (lambda x: x[0].expand(7, 10) + 1, 40, 280),
        (lambda x: x.add_(1), 400, 400),
        (lambda x: x.copy_(torch.empty(10)), 40, 400),
        (lambda x: torch.zeros_like(x), 0, 400),
        (lambda x: torch.empty_like(x), 0, 0),
        (lambda x: x.to(torch.bfloat16), 400, 200),
        (lambda x: x.sum(0), 400, 40),
        (lambda x: x @ x, 800, 400),
    ],
    ids=["add", "views", "reshape", "expand", "in place", "copy", "zeros", "empty", "cast", "sum", "product"],
)
@pytest.mark.parametrize("fake", [False, True])
def test_ops(run: Callable[[Tensor], Tensor], loaded: int, stored: int, fake: bool) -> None:
    with FakeTensorMode() if fake else torch.no_grad():
        x = torch.randn(10, 10)
        with CountTraffic() as counter:
            run(x)
    assert counter.total == Traffic(loaded, stored, loaded + stored)


def test_autocast_policy_is_that_of_cuda() -> None:
    """A block's forward on fake CUDA tensors under CUDA's autocast moves what ours counts on the CPU."""

    def count(device: str) -> int:
        with FakeTensorMode(), torch.device(device):
            block, _ = block_traffic.BLOCKS["Swin-T stage 1, shifted"]()
            x = torch.randn(2, 56, 56, 96)
            with torch.autocast("cpu", torch.bfloat16), CudaAutocastPolicy(), CountTraffic() as counter:
                block.train()(x)
        return counter.total.every

    on_cpu = count("cpu")
    # torch.autocast("cuda") refuses to start without a card; the switches under it do not.
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        assert count("cuda") == on_cpu
    finally:
        torch.set_autocast_enabled("cuda", False)


# --- Kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _shift_kernel(x, y, length, BLOCK: tl.constexpr):
    """Every program also reads the first element, without a mask."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(x)
    tl.store(y + i, tl.load(x + i, mask=i < length, other=0.0) - first, mask=i < length)


def test_kernel() -> None:
    """100 of 128 lanes are live; 400 bytes are 13 sectors of 32."""
    x, y = torch.randn(128), torch.empty(128)
    entries: list[Entry] = []
    with traffic._count_kernels(entries):
        _shift_kernel[(8,)](x, y, 100, BLOCK=16)
    (entry,) = entries
    assert entry.source == "triton._shift_kernel"
    assert entry.traffic == Traffic(loaded=400 + 8 * 4, stored=400, distinct=2 * 13 * 32)
    assert entry.outside([x]) == 13 * 32
    assert entry.outside([x, y]) == 0
    assert torch.equal(y[:100], x[:100] - x[0])
    _shift_kernel[(8,)](x, y, 100, BLOCK=16)  # no longer counted
    assert len(entries) == 1


@pytest.mark.parametrize("workload", SMALL, ids=lambda workload: workload.name)
def test_extension_is_exact(workload: Workload) -> None:
    """From batch 1 and 2 whole, and 2 in two pieces: what 4 images in 2 pieces move, to the byte."""
    base, larger, cut, counted = (
        traffic_report.count_ours(workload, *size) for size in ((1, 1), (2, 1), (2, 2), (4, 2))
    )
    for direction in ("forward", "backward"):
        parts = (counts[direction].traffic for counts in (base, larger, cut))
        extended = traffic_report.extend(*parts, batch=4, pieces=2)
        truth = counted[direction].traffic
        assert (extended.loaded, extended.stored) == (truth.loaded, truth.stored)
        assert extended.distinct == pytest.approx(truth.distinct, rel=5e-3)  # a tensor need not end with a sector


def test_both_half_precisions_move_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for dtype in (torch.bfloat16, torch.float16):
        monkeypatch.setattr(traffic_report, "DTYPE", dtype)
        counts.append(traffic_report.count_ours(WINDOWS, 1, 1))
    for direction in ("forward", "backward"):
        first, second = (count[direction].traffic for count in counts)
        assert (first.loaded, first.stored) == (second.loaded, second.stored)


def test_targets() -> None:
    """Window attention at stage 3 of Swin-T, at its real size, forward and backward."""
    workload = Workload("window_attention", "Swin-T stage 3", workloads._window_attention(14, 12, shift=3))
    for comparison in traffic_report._compare(workload):
        assert comparison.within_target, comparison
        assert comparison.ours.every > comparison.ours.distinct
        assert comparison.unfused > 5 * comparison.ours.distinct


def test_unfused_windows_by_hand() -> None:
    """timm's forward at one window without a shift, op by op on paper, in bytes."""
    with FakeTensorMode():
        problem = ONE_WINDOW.problem(2, torch.bfloat16, CPU)
        forward = traffic_report.count(problem, UNFUSED)["forward"].traffic
    tensor = 2 * 49 * 4 * 32 * 2  # q, k, v or the output, in bfloat16
    scores = 2 * 4 * 49 * 49  # elements
    bias = 4 * 49 * 49  # elements
    assert forward.every == sum(
        (
            2 * tensor,  # "padding", by nothing
            2 * tensor,  # scale · q
            4 * tensor,  # q and kᵀ contiguous
            2 * tensor + 2 * scores,  # their product
            (169 * 4 * 4 + 49 * 49 * 8) + 4 * bias,  # the bias gathered from table and index
            8 * bias,  # and made contiguous
            2 * scores + 4 * bias + 4 * scores,  # added, in float32 from here
            8 * scores,  # softmax
            6 * scores,  # rounded to bfloat16
            2 * tensor,  # v contiguous
            2 * scores + 2 * tensor,  # the product with v
            2 * tensor,  # heads side by side
        )
    )


def test_a_rotary_embedding_moves_what_the_readme_says() -> None:
    """The kernel no more than it must, counted on 21 tokens; timm's eager ops at ViT-B's size, on fake tensors."""
    once = ROTARY.problem(1, torch.bfloat16, CPU).forward_bytes
    found = traffic_report.count_ours(ROTARY, 1, 1)
    assert [found[direction].traffic.distinct for direction in ("forward", "backward")] == [once, once]
    (workload,) = (w for w in workloads.workloads() if w.name == "rotary_embedding, DINOv3-B/16")
    with FakeTensorMode():
        problem = workload.problem(64, torch.bfloat16, CPU)
        timms = sum(count.traffic.distinct for count in traffic_report.count(problem, UNFUSED).values()) / 2**20
    ours = (problem.forward_bytes + problem.backward_bytes) / 2**20
    readme = " ".join((Path(__file__).parents[2] / "README.md").read_text().split())
    assert f"{ours:.0f} MiB there and back for a batch of 64 in ViT-B's size, where timm's move {timms:.0f}" in readme


# --- Blocks -----------------------------------------------------------------------------------------------------------


def test_sources_of_a_block() -> None:
    count = block_traffic.count_eager("ViT-B/16", block_traffic.EAGER)
    tokens = 64 * 197
    hidden = 4 * tokens * 768 * 2  # the MLP's hidden layer in bfloat16
    assert count.forward["mlp.act"] == 2 * hidden
    assert count.backward["mlp.act"] == 3 * hidden
    assert {"norm1", "attn", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"} <= set(count.backward)
    # The norm's backward, and its sum with the residual's gradient: three float32 tensors each.
    assert count.backward["norm1"] == pytest.approx(6 * tokens * 768 * 4, rel=0.01)
    assert "weight gradients" not in count.backward


def test_sources_of_equal_traffic_are_told_by_name() -> None:
    """Else the committed table would differ from one process to the next."""
    names = [f"norm{i}" for i in range(9)]
    counts = [
        block_traffic.BlockTraffic("a block", variant, dict.fromkeys(names, 2**20), {})
        for variant in block_traffic.VARIANTS
    ]
    lines = block_traffic.tables(counts).splitlines()
    assert [line.split()[1] for line in lines if line.startswith("| norm")] == names


def test_torch_compile_is_asked_what_it_would_move() -> None:
    class Pointwise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(torch.cos(x) + 1) * 2

    kernels: dict[bool, dict[str, int]] = {False: defaultdict(int), True: defaultdict(int)}
    compiled: Any = torch.compile(Pointwise(), backend=block_traffic._planning_backend(kernels), dynamic=False)
    x = torch.empty(1000, requires_grad=True)
    compiled(x).backward(torch.empty(1000))
    torch._dynamo.reset()
    assert list(kernels[False].values()) == [2 * 4000]  # one kernel, x in and the result out
    assert sum(kernels[True].values()) == 3 * 4000  # x and the gradient in, the gradient out


# --- The command ------------------------------------------------------------------------------------------------------


def test_part_of_the_report_replaces_that_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = 0

    def report(only: str) -> list[traffic_report.Comparison]:
        shapes = [shape for shape in ("small", "large") if only in shape]
        return [
            traffic_report.Comparison("attention", shape, "forward", 2**20, Traffic(1, 1, 2**20 + moved), 5 * 2**20)
            for shape in shapes
        ]

    blocks = [block_traffic.BlockTraffic("block", name, {"norm": 2**20}, {}) for name in block_traffic.VARIANTS]
    monkeypatch.setattr(traffic_report, "traffic_report", report)
    monkeypatch.setattr(block_traffic, "block_traffic", lambda: blocks)
    assert bench(["kernels", "--traffic", "--output", str(tmp_path)]) == 0
    moved = 2**20
    assert bench(["kernels", "--traffic", "--output", str(tmp_path), "--only", "large"]) == 0
    content = json.loads((tmp_path / "traffic/report.json").read_text())
    assert [(row["shape"], row["ours / compulsory"], row["within target"]) for row in content["ops"]] == [
        ("small", 1.0, True),
        ("large", 2.0, False),
    ]
    assert [block["variant"] for block in content["blocks"]] == list(block_traffic.VARIANTS)
    assert "large, forward: 2.00 × compulsory, over the target" in capsys.readouterr().out
    assert "compiled + fused ops" in (tmp_path / "traffic/README.md").read_text()


def test_the_report_says_as_it_goes_what_it_has_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []

    def compare(workload: Workload) -> list[traffic_report.Comparison]:
        said.append(capsys.readouterr().err)
        count = Traffic(1, 1, 2**20)
        return [traffic_report.Comparison(workload.op, workload.shape, "forward", 2**20, count, 5 * 2**20)]

    monkeypatch.setattr(traffic_report, "_compare", compare)
    assert len(traffic_report.traffic_report("Swin-T stage 4")) == 2
    assert said == [
        "1/2 window_attention, Swin-T stage 4",
        ": forward 1.00 × compulsory\n2/2 reconstruction_loss, Swin-T stage 4",
    ]
