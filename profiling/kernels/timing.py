"""Time every fused op and its rivals on this card, after checking that each computes the right thing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from fastlocal.kernels import dispatch, use_kernels
from fastlocal.profiling import plots, results
from fastlocal.profiling.kernels.timer import Quantiles, cuda_milliseconds, differ, interleaved
from fastlocal.profiling.kernels.workloads import COMPILED, FLEX, OURS, UNFUSED, Problem, Provider, Workload

BATCH = 64
CHECKED_BATCH = 2
LOSS_SCALE = 2.0**16  # that of torch.amp.GradScaler: the gradients of a mean over an image are too small for float16
Direction = Literal["forward", "backward", "both"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward", "both")
DTYPES = (torch.bfloat16, torch.float16)
# Compiling takes most of the time, and float16 and bfloat16 run alike: what needs the compiler is timed in bfloat16
# only.
SLOW_TO_BUILD = (FLEX, COMPILED)

Timer = Callable[[Mapping[str, Callable[[], Any]]], dict[str, Quantiles]]


@dataclass(frozen=True)
class Bench:
    """Where and how to time: ``timer`` takes all variants at once; ``peak_bytes`` runs a function and returns the most
    memory it held at one time; ``state`` is what the card says of its clocks and power."""

    device: torch.device
    batch: int
    timer: Timer
    peak_bytes: Callable[[Callable[[], Any]], int]
    copy_bandwidth: float  # bytes per second, read + written
    state: Callable[[], dict[str, str]] = dict


def cuda_bench() -> Bench:
    """This process's CUDA card, its copy bandwidth measured on the spot."""
    device = torch.device("cuda", torch.cuda.current_device())
    source = torch.empty(2**29, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    copy = cuda_milliseconds(before=lambda: None)
    _, milliseconds, _ = interleaved({"copy": lambda: target.copy_(source)}, copy)["copy"]
    # 2 GiB: many times any card's L2 cache, and longer than a launch takes.
    clock = cuda_milliseconds(before=lambda: target.copy_(source))

    def timer(variants: Mapping[str, Callable[[], Any]]) -> dict[str, Quantiles]:
        return interleaved(variants, clock)

    bandwidth = 2 * source.nbytes / (milliseconds * 1e-3)
    return Bench(device, BATCH, timer, _cuda_peak_bytes, bandwidth, results.card_state)


def _cuda_peak_bytes(function: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def time_kernels(bench: Bench, chosen: Sequence[Workload], path: Path) -> list[dict[str, Any]]:
    """Check and time ``chosen``; every row is appended to ``path`` as soon as it is known.

    Nothing is timed for a workload and dtype whose fused op is wrong: the row says so instead, in its ``error``.
    """
    # A backward is timed on one graph, again and again; memory that torch.compile reuses would be gone the second time.
    functorch_config.donated_buffer = False
    rows = []
    for dtype in DTYPES:
        for workload in chosen:
            for row in _workload_rows(bench, workload, dtype):
                results.append_row(path, row)
                rows.append(row)
                print(_progress(row), flush=True)
    return rows


def _workload_rows(bench: Bench, workload: Workload, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Rows of one workload, as they become known; all providers of one direction are timed in turn."""
    place: dict[str, Any] = {
        "bench": "kernels",
        "op": workload.op,
        "shape": workload.shape,
        "dtype": str(dtype).removeprefix("torch."),
    }
    torch._dynamo.reset()  # each workload's rivals are compiled for its shapes alone
    wrong = check(workload, dtype, bench.device)
    implementation = dispatch.implementation(bench.device)
    yield {**place, "provider": OURS, "implementation": implementation, "direction": "check", "error": wrong}
    if wrong is not None:
        return
    torch.manual_seed(0)
    problem = workload.problem(bench.batch, dtype, bench.device)
    providers = {
        name: provider
        for name, provider in problem.providers.items()
        if name not in SLOW_TO_BUILD or dtype == DTYPES[0]
    }
    for direction in DIRECTIONS:
        place |= {"direction": direction, "batch": bench.batch}
        functions: dict[str, Callable[[], Any]] = {}
        peaks: dict[str, int] = {}
        for name, provider in list(providers.items()):
            try:
                functions[name] = _function(provider, direction)
                peaks[name] = bench.peak_bytes(functions[name])
            except Exception as error:  # that a provider cannot run this shape or version is a result too
                functions.pop(name, None)
                del providers[name]
                yield {**place, "provider": name, "error": results.sentence(error)}
        times = bench.timer(functions)
        fastest_rival = min((times[name] for name in times if name != OURS), key=lambda t: t.p50, default=None)
        for name, (p20, p50, p80) in times.items():
            bandwidth = _compulsory_bytes(problem, direction) / (p50 * 1e-3)
            row: dict[str, Any] = {**place, "provider": name, "error": None, **bench.state()}
            row |= {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "gb_per_s": bandwidth / 1e9}
            row |= {"of_copy_bandwidth": bandwidth / bench.copy_bandwidth, "peak_mib": peaks[name] / 2**20}
            if name == OURS and fastest_rival is not None:
                row["beyond_spread"] = differ(times[name], fastest_rival)
            yield row


def _function(provider: Provider, direction: Direction) -> Callable[[], Any]:
    """What is timed: the forward, the backward of one graph again and again, or both."""
    if direction == "forward":
        return provider.run
    out = provider.run()
    d_out = torch.randn_like(out)
    if direction == "backward":
        return lambda: torch.autograd.grad(out, provider.leaves, d_out, retain_graph=True)
    return lambda: torch.autograd.grad(provider.run(), provider.leaves, d_out)


def _compulsory_bytes(problem: Problem, direction: Direction) -> int:
    sizes = {"forward": problem.forward_bytes, "backward": problem.backward_bytes}
    return sum(sizes.values()) if direction == "both" else sizes[direction]


# --- Correctness ------------------------------------------------------------------------------------------------------


def check(workload: Workload, dtype: torch.dtype, device: torch.device) -> str | None:
    """What is wrong with the fused op at this shape, or None.

    Compared in relative error with its own reference in float64. The output's may be at most twice that of the unfused
    ops in the same dtype plus one rounding; a gradient's, four roundings. The unfused ops are rivals from elsewhere, so
    their output also vouches for the reference.
    """
    exact, problem = (_seeded(workload, kind, device) for kind in (torch.float64, dtype))
    with use_kernels("reference"):
        exact_out = exact.providers[OURS].run()
    d_out = torch.randn_like(exact_out).to(dtype)
    ours, unfused = problem.providers[OURS], problem.providers[UNFUSED]
    out = ours.run()
    rounding = torch.finfo(dtype).eps
    unfused_error = relative_error(unfused.run(), exact_out)
    if not unfused_error <= 8 * rounding:
        return f"the unfused ops and the float64 reference disagree by {unfused_error:.1e}"
    error = relative_error(out, exact_out)
    if not error <= 2 * unfused_error + rounding:
        return f"the output's relative error is {error:.1e}, the unfused ops' {unfused_error:.1e}"
    scale = LOSS_SCALE if out.ndim == 0 else 1.0
    gradients = torch.autograd.grad(out, ours.leaves, d_out.to(out.dtype) * scale)
    exact_gradients = torch.autograd.grad(exact_out, exact.providers[OURS].leaves, d_out.to(exact_out.dtype) * scale)
    for position, (gradient, exact_gradient) in enumerate(zip(gradients, exact_gradients, strict=True)):
        error = relative_error(gradient, exact_gradient)
        if not error <= 4 * rounding:
            return f"the relative error of gradient {position} is {error:.1e}"
    return None


def _seeded(workload: Workload, dtype: torch.dtype, device: torch.device) -> Problem:
    torch.manual_seed(0)
    return workload.problem(CHECKED_BATCH, dtype, device)


def relative_error(out: Tensor, reference: Tensor) -> float:
    """``||out - reference|| / ||reference||`` in float64."""
    return ((out.double() - reference.double()).norm() / reference.double().norm()).item()


# --- Tables and plots -------------------------------------------------------------------------------------------------


def _progress(row: dict[str, Any]) -> str:
    place = f"{row['op']}, {row['shape']}, {row['dtype']}, {row['provider']}, {row['direction']}"
    if row["error"] is not None:
        return f"{place}: {row['error']}"
    return f"{place}: {'right' if row['direction'] == 'check' else format(row['p50_ms'], '.3f') + ' ms'}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Median milliseconds by provider, and what the fused op reaches of the card's copy bandwidth."""
    lines: dict[tuple[str, ...], dict[str, Any]] = {}
    ties: set[tuple[str, ...]] = set()
    for row in rows:
        key = tuple(row[name] for name in ("op", "shape", "dtype", "direction"))
        if row["direction"] == "check" or row["error"] is not None:
            continue
        line = lines.setdefault(key, dict(zip(("op", "shape", "dtype", "direction"), key, strict=True)))
        line[f"{row['provider']} ms"] = row["p50_ms"]
        if row["provider"] == OURS:
            line |= {"GB/s": row["gb_per_s"], "of copy": row["of_copy_bandwidth"], "peak MiB": row["peak_mib"]}
            if not row.get("beyond_spread", True):
                ties.add(key)
    if not lines:
        return "Nothing was timed."
    for key, line in lines.items():
        rivals = [value for name, value in line.items() if name.endswith(" ms") and name != f"{OURS} ms"]
        if rivals and f"{OURS} ms" in line:
            line["× best rival"] = "within the spread" if key in ties else min(rivals) / line[f"{OURS} ms"]
    columns = dict.fromkeys(name for line in lines.values() for name in line)
    legend = (
        "Medians of launches in turn, random inputs, the L2 cache filled with other data before each. No factor where "
        "the medians differ by less than either spread (p20 to p80). GB/s: compulsory bytes (inputs once, outputs "
        "once) over time; of copy: that over the card's measured device-to-device copy."
    )
    return f"{results.markdown_table(list(lines.values()), {name: name for name in columns})}\n\n{legend}"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Forward and backward together in bfloat16: a group of bars per workload, one bar per provider, in milliseconds."""
    if (pyplot := plots.pyplot()) is None:
        return
    chosen = [row for row in rows if row["direction"] == "both" and row["error"] is None and row["dtype"] == "bfloat16"]
    groups = list(dict.fromkeys(f"{row['op']}\n{row['shape']}" for row in chosen))
    providers = list(dict.fromkeys(row["provider"] for row in chosen))
    figure, axes = pyplot.subplots(figsize=(1.2 * len(groups) + 3, 4), layout="constrained")
    for i, provider in enumerate(providers):
        times = {f"{row['op']}\n{row['shape']}": row["p50_ms"] for row in chosen if row["provider"] == provider}
        places = [groups.index(group) + i / (len(providers) + 1) for group in times]
        axes.bar(places, list(times.values()), 1 / (len(providers) + 1), align="edge", label=provider)
    axes.set_xticks([position + 0.4 for position in range(len(groups))], groups, fontsize=7)
    axes.set_yscale("log")
    axes.set_ylabel("forward + backward, ms (median)")
    axes.set_title(f"{results.origin()['card']}, batch {BATCH}, bfloat16, {plots.commit(chosen)}")
    axes.legend()
    plots.save(figure, path)
