"""Timing kernels, driven on the CPU with small shapes and a clock of our own; and the rows every benchmark writes."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlocal.profiling import results
from fastlocal.profiling.cli import bench
from fastlocal.profiling.kernels import floors, timer, timing, workloads
from fastlocal.profiling.kernels.timer import Quantiles, cuda_milliseconds, differ, interleaved
from fastlocal.profiling.kernels.timing import Bench
from fastlocal.profiling.kernels.workloads import COMPILED, FLEX, FUSED, OURS, UNFUSED, Problem, Provider, Workload

CPU = torch.device("cpu")


def _without_compiler(make: Callable[..., Problem], **extra: Provider) -> Callable[..., Problem]:
    """The same problem without the rivals that take minutes to compile on a CPU."""

    def problem(*arguments: Any) -> Problem:
        made = make(*arguments)
        kept = {name: provider for name, provider in made.providers.items() if name not in (COMPILED, FLEX)}
        return replace(made, providers={**kept, **extra})

    return problem


WINDOWS = Workload("window_attention", "small", _without_compiler(workloads._window_attention(14, 2, shift=3)))
ATTENTION = Workload("attention", "small", _without_compiler(workloads._attention(tokens=19, heads=2, head_dim=16)))
ROTARY = Workload("rotary_embedding", "small", _without_compiler(workloads._rotary_embedding(19, 5, True, 2, 16)))
LOSS = Workload("reconstruction_loss", "small", _without_compiler(workloads._reconstruction_loss(4, 16, 2, 8)))


def _bench() -> Bench:
    calls: list[Any] = []

    def timer(variants: Mapping[str, Callable[[], Any]]) -> dict[str, Quantiles]:
        calls.extend(function() for function in variants.values())
        return dict.fromkeys(variants, Quantiles(1.0, 2.0, 3.0))

    def peak_bytes(function: Callable[[], Any]) -> int:
        function()
        return 3 * 2**20

    return Bench(CPU, 3, timer, peak_bytes, copy_bandwidth=1e9, state=lambda: {"clocks.sm": "1980 MHz"})


@pytest.mark.parametrize("workload", [WINDOWS, ATTENTION, ROTARY, LOSS], ids=lambda workload: workload.op)
def test_every_row_is_timed_and_written(workload: Workload, tmp_path: Path) -> None:
    path = tmp_path / "kernels.jsonl"
    rows = timing.time_kernels(_bench(), [workload], path)
    written = results.read_rows(path)
    assert [{name: row[name] for name in rows[0]} for row in written[:1]] == rows[:1]
    assert len(written) == len(rows)
    assert [row["error"] for row in rows] == [None] * len(rows)
    providers = {OURS, UNFUSED} if workload in (ROTARY, LOSS) else {OURS, UNFUSED, FUSED}
    timed = [row for row in rows if row["direction"] != "check"]
    assert {(row["provider"], row["direction"], row["dtype"]) for row in timed} == {
        (provider, direction, dtype)
        for provider in providers
        for direction in ("forward", "backward", "both")
        for dtype in ("bfloat16", "float16")
    }
    problem = workload.problem(3, torch.bfloat16, CPU)
    forward = next(row for row in timed if row["direction"] == "forward")
    assert forward["gb_per_s"] == pytest.approx(problem.forward_bytes / 2e-3 / 1e9)
    assert forward["of_copy_bandwidth"] == pytest.approx(problem.forward_bytes / 2e-3 / 1e9)
    assert forward["peak_mib"] == 3
    assert {row["clocks.sm"] for row in timed} == {"1980 MHz"}
    assert {row["beyond_spread"] for row in timed if row["provider"] == OURS} == {False}  # the same times for all
    assert set(results.origin()) <= set(written[0])


def test_compulsory_bytes() -> None:
    """By hand: 3 images of 14 × 14 with 64 channels, 19 tokens of 2 heads of 16 (14 turned), and 16 channels to 8 at 8 × 8."""
    windows = WINDOWS.problem(3, torch.bfloat16, CPU)
    image, table = 3 * 14 * 14 * 64 * 2, 169 * 2 * 4
    assert (windows.forward_bytes, windows.backward_bytes) == (4 * image + table, 7 * image + 2 * table)
    tokens = 3 * 19 * 32 * 2
    attention = ATTENTION.problem(3, torch.float16, CPU)
    assert (attention.forward_bytes, attention.backward_bytes) == (4 * tokens, 7 * tokens)
    rotary = ROTARY.problem(3, torch.bfloat16, CPU)
    assert rotary.forward_bytes == rotary.backward_bytes == 2 * tokens + 14 * 2 * 16 * 4
    loss = LOSS.problem(3, torch.bfloat16, CPU)
    hidden, target, parameters = 3 * 16 * 16 * 2, 3 * 64 * 8 * 2, (32 * 16 + 32) * 4
    assert loss.forward_bytes == hidden + target + parameters
    assert loss.backward_bytes == 2 * hidden + target + 2 * parameters


def test_floors_by_hand() -> None:
    """Swin-T stage 1 at batch 64: 4,096 windows of 3 heads, 49 tokens filled up to 64, 32 channels."""
    rows = {(row["op"], row["shape"], row["direction"]): row for row in floors.floors()}
    assert len(rows) == 2 * len(workloads.workloads())
    row = rows["window_attention", "Swin-T stage 1", "forward"]
    image, table = 64 * 56 * 56 * 96 * 2, 169 * 3 * 4
    products = 2 * 2 * 4096 * 3 * 64 * 64 * 32
    assert row["MiB"] == pytest.approx((4 * image + table) / 2**20)
    assert row["GFLOP"] == pytest.approx(products / 1e9)
    assert row["RTX 4060, µs"] == f"{(4 * image + table) / 272e9 * 1e6:,.0f} (bytes)"
    # ViT-B: 197 tokens filled up to 256; two products forward, five backward.
    for direction, products in (("forward", 2), ("backward", 5)):
        row = rows["attention", "ViT-B/16", direction]
        assert row["GFLOP"] == pytest.approx(products * 2 * 64 * 12 * 256 * 256 * 64 / 1e9)
        assert row["RTX 3060, µs"] == f"{row['GFLOP'] * 1e9 / 25.5e12 * 1e6:,.0f} (products)"
    assert floors.Work(1, 1, 1e9).microseconds(floors.CARDS[1])[1] == "exponentials"


def test_floors_name_kernels_that_the_compile_report_knows() -> None:
    from fastlocal.profiling.kernels.compile_report import Measurement, _cases

    rows = floors.floors()
    names = {floors.kernel(row["op"], row["shape"], row["direction"]) for row in rows}
    assert names <= set(_cases())
    measured = [
        Measurement(name, "sm_89", "bfloat16", True, 4, 128, 0, 48 * 1024, 99 * 1024, 8, 3, 0.25, None, "")
        for name in names
    ]
    for row in floors.with_resources(rows, measured):
        assert row["RTX 4060, µs"].endswith(" · 128 · 48 · 25%")
        assert "·" not in row["RTX 3060, µs"]


def test_real_shapes() -> None:
    names = [workload.name for workload in workloads.workloads()]
    assert len(names) == len(set(names)) == 12
    last = next(w for w in workloads.workloads() if w.name == "window_attention, Swin-T stage 4")
    with torch._subclasses.FakeTensorMode():
        problem = last.problem(64, torch.bfloat16, CPU)
    assert [list(leaf.shape) for leaf in problem.providers[OURS].leaves] == [[64, 7, 7, 2304], [169, 24]]


def _wrong(problem: Problem) -> Problem:
    ours = problem.providers[OURS]
    return replace(problem, providers={**problem.providers, OURS: replace(ours, run=lambda: ours.run() * 1.1)})


def test_a_wrong_op_is_not_timed(tmp_path: Path) -> None:
    def problem(batch: int, dtype: torch.dtype, device: torch.device) -> Problem:
        made = ATTENTION.problem(batch, dtype, device)
        return made if dtype == torch.float64 else _wrong(made)

    rows = timing.time_kernels(_bench(), [replace(ATTENTION, problem=problem)], tmp_path / "rows.jsonl")
    assert [row["direction"] for row in rows] == ["check", "check"]
    assert all("the output's relative error is 1.0e-01" in row["error"] for row in rows)


def test_a_wrong_gradient_is_found() -> None:
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, d_x: torch.Tensor) -> torch.Tensor:
            return d_x * 1.5

    def problem(batch: int, dtype: torch.dtype, device: torch.device) -> Problem:
        made = WINDOWS.problem(batch, dtype, device)
        ours = made.providers[OURS]
        wrong = replace(ours, run=lambda: Scaled.apply(ours.run()))
        return made if dtype == torch.float64 else replace(made, providers={**made.providers, OURS: wrong})

    assert timing.check(WINDOWS, torch.bfloat16, CPU) is None
    wrong = timing.check(replace(WINDOWS, problem=problem), torch.bfloat16, CPU)
    assert wrong is not None
    assert wrong.startswith("the relative error of gradient 0 is 5.0e-01")


def test_a_rival_that_fails_is_a_row(tmp_path: Path) -> None:
    def fail() -> torch.Tensor:
        raise NotImplementedError("not for this shape\nand more")

    broken = replace(ATTENTION, problem=_without_compiler(ATTENTION.problem, broken=Provider(fail, ())))
    rows = timing.time_kernels(_bench(), [broken], tmp_path / "rows.jsonl")
    failed = [row for row in rows if row["error"] is not None]
    assert [(row["provider"], row["error"]) for row in failed] == [("broken", "not for this shape")] * 2
    assert "broken" not in timing.table(rows)


def test_variants_run_in_turn_so_that_drift_hits_all_alike() -> None:
    """A card that gets slower all the time: one after the other, the second of two equal variants would lose."""
    order: list[str] = []
    now = [1.0]

    def milliseconds(functions: Any) -> list[float]:
        taken = []
        for function in functions:
            function()
            now[0] *= 1.01
            taken.append(now[0] * (2.0 if order[-1] == "slow" else 1.0))
        return taken

    variants = {name: functools.partial(order.append, name) for name in ("one", "other", "slow")}
    times = interleaved(variants, milliseconds)
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert all(sorted(names) == ["one", "other", "slow"] for names in rounds)
    assert {names[0] for names in rounds} == set(variants)  # none always goes first
    assert times["one"].p50 == pytest.approx(times["other"].p50, rel=0.05)
    assert not differ(times["one"], times["other"])


def test_work_that_is_slow_to_launch_is_timed_without_its_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reconstruction loss's backward on an H100: launches of 0.9 ms behind 0.7 ms of other work were its time."""
    host, card = [0.0], [0.0]  # milliseconds

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = card[0] = max(card[0], host[0])

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    def works(milliseconds: float) -> None:
        card[0] = max(card[0], host[0]) + milliseconds

    def slow_to_launch() -> None:
        host[0] += 3.0
        works(0.5)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timer.time, "perf_counter", lambda: host[0] / 1e3)
    clock = cuda_milliseconds(before=lambda: works(1.0))
    assert clock([slow_to_launch]) == [2.5]
    assert [clock([slow_to_launch])[0] for _ in range(4)][-2:] == [0.5, 0.5]


def test_a_difference_needs_to_exceed_the_spread() -> None:
    assert differ(Quantiles(0.9, 1.0, 1.1), Quantiles(1.2, 1.3, 1.4))
    assert not differ(Quantiles(0.9, 1.0, 1.3), Quantiles(1.2, 1.3, 1.4))


def test_no_factor_within_the_spread() -> None:
    place = {"op": "attention", "shape": "ViT", "dtype": "bfloat16", "direction": "both", "error": None}
    ours = {**place, "provider": OURS, "p50_ms": 2.0, "gb_per_s": 9.0, "of_copy_bandwidth": 0.9, "peak_mib": 1.0}
    rival = {**place, "provider": FUSED, "p50_ms": 2.1}
    assert "within the spread" in timing.table([{**ours, "beyond_spread": False}, rival])
    assert "1.05" in timing.table([{**ours, "beyond_spread": True}, rival])


def test_table_compares_with_the_best_rival(tmp_path: Path) -> None:
    place = {"op": "attention", "shape": "ViT", "dtype": "bfloat16", "direction": "both", "error": None}
    ours = {**place, "provider": OURS, "p50_ms": 2.0, "gb_per_s": 900.0, "of_copy_bandwidth": 0.9, "peak_mib": 10.0}
    times = {UNFUSED: 9.0, FUSED: 3.0}
    rivals: list[Mapping[str, Any]] = [{**place, "provider": name, "p50_ms": times[name]} for name in times]
    lines = timing.table([ours, *rivals]).splitlines()
    header, values = ([cell.strip() for cell in lines[i].strip("|").split("|")] for i in (0, 2))
    assert dict(zip(header, values, strict=True))["× best rival"] == "1.5"
    pytest.importorskip("matplotlib")
    timing.plot([ours, *rivals], tmp_path / "plot")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# --- The command line and the rows ------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is what a machine without a card says")
def test_without_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(["kernels"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "--compile-report and --traffic need none" in error


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["kernels", "--nonsense"], ["kernels", "--architectures"]])
def test_bad_arguments_are_one_sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--traffic", "--architectures", "sm_80"], "--architectures would do nothing without --compile-report"),
        (["--floors", "--only", "attention"], "--only would do nothing with --floors, which takes seconds"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(["kernels", *arguments]) == 2
    assert capsys.readouterr().err == f"fastlocal bench: {sentence}; leave it out.\n"


def test_help_imports_neither_torch_nor_timm() -> None:
    code = (
        "import sys\nfrom fastlocal.profiling.cli import bench\n"
        "assert bench(['--help']) == 0\nassert bench(['kernels', '--help']) == 0\n"
        "assert not {'torch', 'timm', 'triton'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "--compile-report" in result.stdout


def test_rows_name_their_origin(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    assert results.read_rows(path) == []
    results.append_row(path, {"value": 1.5})
    results.append_row(path, {"value": None})
    assert [row["value"] for row in results.read_rows(path)] == [1.5, None]
    first = results.read_rows(path)[0]
    assert first["torch"] == torch.__version__
    assert {"card", "driver", "triton", "commit", "date"} <= set(first)


def test_card_folder_is_a_plain_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "origin", lambda: {"card": "NVIDIA GeForce RTX 4070 Ti SUPER"})
    assert results.card_folder(tmp_path) == tmp_path / "nvidia-geforce-rtx-4070-ti-super"
    assert results.card_folder(tmp_path).is_dir()


def test_markdown_table() -> None:
    rows = [{"name": "a", "value": 12345.6, "fits": True}, {"name": "bcd", "value": 0.1234, "fits": False}]
    assert results.markdown_table(rows).splitlines() == [
        "| name |  value | fits |",
        "|------|-------:|------|",
        "| a    | 12,346 | yes  |",
        "| bcd  |  0.123 | no   |",
    ]
    assert results.markdown_table(rows, {"value": "v", "missing": "m"}).splitlines()[0] == "|      v | m |"
