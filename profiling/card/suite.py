"""The parts of ``bash profiling/gpu_suite.sh``: ``python -m fastlocal.profiling.card.suite PART [--budget SECONDS]``.

Every part writes its rows at once, stops in time and goes on where it stopped (see `fastlocal.profiling.card.campaign`).
With no card each part runs what it can on the CPU, with a tiny model, and says what is missing.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fastlocal.profiling import memory, results
from fastlocal.profiling.card.campaign import Campaign
from fastlocal.profiling.cli import ArgumentParser, UserError, bench

MIB = 2**20
TOLERANCE = 0.05  # the meter, and the planner, against torch's own peak
PLANNED = "600MiB"  # the budget of the plan whose peak is measured
MODEL, BATCH, MICRO_BATCH = "swin_tiny_patch4_window7_224", 64, 8
TINY_MODEL, TINY_BATCH, TINY_MICRO_BATCH = "test_vit", 4, 2
# The targets first: a session cut short has what matters most.
CAPPED_MODELS = [
    *("vit_huge_patch14_224", "swin_tiny_patch4_window7_224", "vit_base_patch16_224", "vit_gigantic_patch14_224"),
    *("swin_base_patch4_window7_224", "vit_large_patch16_224"),
]
CAPS = "2GiB,4GiB,6GiB,8GiB,12GiB,all"


def correctness(output: Path, budget: float | None) -> int:
    """Every fused op against its reference in float64, in each dtype; returns 1 if one is wrong."""
    import torch

    from fastlocal.kernels import use_kernels
    from fastlocal.kernels.dispatch import Choice, why_not_triton
    from fastlocal.profiling.card.throughput import default_device, release
    from fastlocal.profiling.kernels.timing import check
    from fastlocal.profiling.kernels.workloads import workloads

    device = default_device()
    obstacle = why_not_triton(device)
    implementation: Choice = "triton" if obstacle is None and device.type == "cuda" else "reference"
    dtypes, chosen = [torch.float32, torch.bfloat16, torch.float16], workloads()
    if device.type == "cpu":
        dtypes, chosen = dtypes[:2], [workload for workload in chosen if workload.shape == "Swin-T stage 4"]
    if obstacle is not None:
        print(f"Only the PyTorch reference is checked: {obstacle}")
    campaign = Campaign(results.card_folder(output) / "correctness.jsonl", budget)
    jobs = []
    for workload in chosen:
        for dtype in dtypes:
            key = {"bench": "correctness", "op": workload.op, "shape": workload.shape, "dtype": str(dtype)[6:]}
            jobs.append((key | {"implementation": implementation}, (key, workload, dtype)))
    for key, workload, dtype in campaign.todo(jobs):
        release()
        try:
            with use_kernels(implementation):
                wrong = check(workload, dtype, device)
        except Exception as error:  # one op that fails must not hide the others
            wrong = results.sentence(error)
        campaign.add({**key, "implementation": implementation, "error": wrong})
        print(f"{workload.name}, {key['dtype']}, {implementation}: {wrong or 'right'}", flush=True)
    done = [row for key, _ in jobs if (row := campaign.find(key)) is not None]
    print(f"\n{len(done)} of {len(jobs)} checked, {sum(row['error'] is not None for row in done)} wrong.")
    return int(any(row["error"] is not None for row in done))


def kernels(output: Path, budget: float | None) -> int:
    """``bench kernels``, a workload at a time; returns 1 if an op is wrong."""
    import torch

    if not torch.cuda.is_available():
        print("Missing without a card: the timing of every fused op and its rivals.")
        return 0
    from fastlocal.profiling.kernels import timing
    from fastlocal.profiling.kernels.workloads import workloads

    folder = results.card_folder(output)
    campaign = Campaign(folder / "suite.jsonl", budget)
    jobs = [({"bench": "suite", "part": "kernels", "job": w.name}, w) for w in workloads()]
    device = timing.cuda_bench()
    for workload in campaign.todo(jobs):
        begun = time.perf_counter()
        timing.time_kernels(device, [workload], folder / "kernels.jsonl")
        campaign.add(
            {"bench": "suite", "part": "kernels", "job": workload.name, "seconds": time.perf_counter() - begun}
        )
    rows = Campaign(folder / "kernels.jsonl").rows
    results.show(f"\n{timing.table(rows)}")
    return int(any(row["direction"] == "check" and row["error"] is not None for row in rows))


def meter(output: Path, budget: float | None) -> int:
    """The dry run, the meter and the planner, with cuBLAS's workspaces, against torch's own counters; returns 1 if one is
    further off than 5 %.
    """
    import torch

    from fastlocal.memory import Meter, cublas_workspaces
    from fastlocal.profiling.card.throughput import (
        Setup,
        Training,
        available_kernels,
        baseline,
        create_model,
        default_device,
        release,
    )

    device = default_device()
    cuda = device.type == "cuda"
    model, batch, micro = (MODEL, BATCH, MICRO_BATCH) if cuda else (TINY_MODEL, TINY_BATCH, TINY_MICRO_BATCH)
    if not cuda:
        print("Missing without a card: torch's own peak. The dry run is compared with the meter of a real step.")
    with torch.device("meta"):
        skeleton = create_model(model, baseline())
    best = available_kernels(device)[0][0]
    local = Setup("local", micro, True, 4, "feature", "linear", "module", kernels=best)
    if not cuda:  # a dry run counts the fused loss's scratch memory, which the reference does without
        local = replace(local, objective="cross-entropy", decoder="")
    exact = replace(local, family="exact", objective="end-to-end", decoder="")
    whole = replace(local, micro_batch=None, recompute=False, residency="all")
    setups = [baseline(), local, exact]
    if cuda:
        setups += [Setup("rival", micro, True), whole, replace(local, residency="all")]
    jobs: list[tuple[str, Setup | None]] = [(setup.label, setup) for setup in setups]
    if cuda:
        jobs.append((f"what the planner chooses for {PLANNED}", None))
    campaign = Campaign(results.card_folder(output) / "meter.jsonl", budget)
    place = {"bench": "meter", "model": model, "batch_size": batch}

    def compare(setup: Setup | None) -> dict[str, Any]:
        if setup is None:
            setup, predicted = planned(skeleton, local, batch)
        else:
            predicted = memory.meter_step(skeleton, setup, batch, device).peak + cublas_workspaces(device)
        release()
        training = Training(model, setup, batch, device)
        for _ in range(2):
            training.step()
        release()
        with Meter(*training.held(), device=device) as metered:
            training.step()
        workspaces = cublas_workspaces(device)
        row: dict[str, Any] = {"setup": asdict(setup), "predicted_mib": predicted / MIB}
        row["metered_mib"] = (metered.peak + workspaces) / MIB
        row |= _allocated(training) if cuda else {}
        true = row.get("allocated_mib", row["metered_mib"])
        row |= {"predicted_of_true": row["predicted_mib"] / true, "metered_of_true": row["metered_mib"] / true}
        row["within"] = all(abs(row[key] - 1) <= TOLERANCE for key in ("predicted_of_true", "metered_of_true"))
        return row

    for name, given in campaign.todo([({**place, "name": name}, (name, setup)) for name, setup in jobs]):
        try:
            row = {"error": None, **compare(given)}
        except Exception as error:  # one set-up that fails must not hide the others
            row = {"error": results.sentence(error), "within": False}
        campaign.add({**place, "name": name, **row})
        print(f"{name}: {row['error'] or ('within 5 %' if row['within'] else 'further off than 5 %')}", flush=True)
    results.show(f"\n{meter_table(campaign.rows)}")
    return int(not all(row["within"] for row in campaign.rows))


def planned(model: Any, like: Any, batch_size: int) -> tuple[Any, int]:
    """The set-up that the planner chooses for local objectives in `PLANNED`, otherwise as ``like``, and its peak in bytes."""
    import torch

    from fastlocal import planner

    fused = functools.partial(torch.optim.AdamW, fused=True)
    kernels = "auto" if like.kernels == "triton" else "reference"
    plan = planner.plan(
        model, batch_size=batch_size, memory=PLANNED, objective="feature", reserve=0, optimizer=fused, kernels=kernels
    )
    way = {name: value for name, value in plan.arguments().items() if name not in ("objective", "modules")}
    return replace(like, **{**way, "modules": plan.modules, "recompute": plan.recompute == "block"}), plan.peak


def _allocated(training: Any) -> dict[str, float]:
    """torch's own peak of a step with no meter in the way, and what the allocator reserved for it."""
    from fastlocal.profiling.card.throughput import measure_peak

    peak = measure_peak(training)
    allocated, reserved = peak["peak_mib"], peak["reserved_mib"]
    return {"allocated_mib": allocated, "reserved_mib": reserved, "reserved_of_allocated": reserved / allocated}


def meter_table(rows: list[dict[str, Any]]) -> str:
    """Predicted, metered, allocated and reserved peaks."""
    columns = {"name": "set-up", "predicted_mib": "dry run MiB", "metered_mib": "meter MiB"}
    if any("allocated_mib" in row for row in rows):
        columns |= {"allocated_mib": "allocated MiB", "reserved_mib": "reserved MiB"}
        columns |= {"reserved_of_allocated": "reserved / allocated"}
    columns |= {"predicted_of_true": "dry run / true", "metered_of_true": "meter / true", "within": "within 5 %"}
    columns |= {"error": "remark"} if any(row.get("error") for row in rows) else {}
    return results.markdown_table(rows, columns) if rows else "Nothing was measured."


def throughput(output: Path, budget: float | None) -> int:
    """``bench throughput`` of Swin-T at batch 64; without a card of a tiny model."""
    import torch

    options = ["throughput", "--output", str(output), *_within(budget)]
    if torch.cuda.is_available():
        code = bench([*options, "--model", MODEL, "--batch-size", str(BATCH), "--micro-batch", str(MICRO_BATCH)])
        return code or _trace(output)
    print(
        "Missing without a card: Triton kernels, torch.compile, reserved memory, and every figure that means something."
    )
    tiny = ["--model", TINY_MODEL, "--batch-size", str(TINY_BATCH), "--micro-batch", str(TINY_MICRO_BATCH)]
    few = ["--only", "checkpointing + accumulation", "residency module", "--modules", "2", "--rounds", "2"]
    return bench([*options, *tiny, *few])


def _trace(output: Path) -> int:
    """Whether the copies of residency="module" hide behind kernels, once per commit."""
    name = "local, feature, K=4, Triton kernels, parts of 8, recompute, residency module"
    if Campaign(results.card_folder(output) / "traces.jsonl").find({"bench": "trace", "name": name}) is not None:
        return 0
    return bench(["throughput", "--trace", "--only", name, "--output", str(output)])


def caps(output: Path, budget: float | None) -> int:
    """What trains on smaller cards; without a card what a tiny model needs, by dry run."""
    import torch

    options = ["throughput", "--output", str(output), *_within(budget)]
    if torch.cuda.is_available():
        return bench([*options, "--cap", CAPS, "--model", *CAPPED_MODELS])
    print("Missing without a card: what trains under a limited allocator, and how fast.")
    return bench([*options, "--cap", "4MiB", "--model", TINY_MODEL, "--batch-size", str(TINY_BATCH)])


def scaling(output: Path, budget: float | None) -> int:
    """``bench scaling`` of two and of four cards; without a card of two processes, at the smallest settings."""
    import torch

    cards = torch.cuda.device_count()
    if cards == 1:
        print("Missing with one card: what several gain, and what they send.")
        return 0
    folder = results.card_folder(output)
    campaign = Campaign(folder / "suite.jsonl", budget)
    small: list[str] = []
    if not cards:
        print("Missing without two cards: nccl, and every figure that means something.")
        small = ["--batch-size", "8", "--rounds", "1", "--steps", "2"]
    jobs = [
        ({"bench": "suite", "part": "scaling", "job": f"{count} processes"}, count)
        for count in (2, 4)
        if count <= max(cards, 2)
    ]
    code = 0
    for count in campaign.todo(jobs):
        begun = time.perf_counter()
        failed = bench(["scaling", "--processes", str(count), "--output", str(folder), *small])
        code = code or failed
        if not failed:
            job = {"bench": "suite", "part": "scaling", "job": f"{count} processes"}
            campaign.add({**job, "seconds": time.perf_counter() - begun})
    return code


def train(output: Path, budget: float | None) -> int:
    """Short real trainings: digits, local and exact, through ``fastlocal train``'s own loop."""
    missing = [name for name in ("timm", "yaml", "safetensors", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"Missing: training needs {', '.join(missing)}, which this machine does not have.")
        return 0
    import torch

    from fastlocal.profiling.card.throughput import available_kernels, default_device
    from fastlocal.train import loop
    from fastlocal.train.config import TrainConfig

    cuda = torch.cuda.is_available()
    size = {"epochs": 15, "amp": True} if cuda else {"epochs": 3, "train_limit": 512, "val_limit": 128}
    implementations = sorted({name for name, _ in available_kernels(default_device())}, reverse=True)
    campaign = Campaign(results.card_folder(output) / "train.jsonl", budget)
    jobs = []
    for implementation in implementations:
        for objective in ("feature", "end-to-end"):
            given = {"data": "digits", "modules": 4, "objective": objective, "kernels": implementation, **size}
            jobs.append(({"bench": "train", **given}, given))
    for given in campaign.todo(jobs):
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            try:
                summary = loop.run(TrainConfig.of(**given, output=folder))
                row: dict[str, Any] = {"accuracy": list(summary.accuracy), "best_accuracy": summary.best_accuracy}
            except Exception as error:  # one kernel that fails must not hide what the others reach
                row = {"best_accuracy": None, "error": results.sentence(error)}
                print(f"{given}: {row['error']}", file=sys.stderr)
        campaign.add({"bench": "train", **given, "error": None, **row, "seconds": time.perf_counter() - begun})
    done = [found for key, _ in jobs if (found := campaign.find(key)) is not None]
    results.show(f"\n{train_table(done)}")
    return int(not all(row["error"] is None and row["best_accuracy"] > 0.2 for row in done))  # a tenth is chance


def train_table(rows: list[dict[str, Any]]) -> str:
    """Accuracy and time of the short trainings."""
    keys = ["data", "objective", "modules", "kernels", "epochs", "best_accuracy", "seconds"]
    keys += ["error"] if any(row.get("error") for row in rows) else []
    return (
        results.markdown_table(rows, {key: key.replace("_", " ") for key in keys}) if rows else "Nothing was trained."
    )


def _within(budget: float | None) -> list[str]:
    return [] if budget is None else ["--budget", str(budget)]


PARTS: dict[str, Callable[[Path, float | None], int]] = {
    "correctness": correctness,
    "kernels": kernels,
    "memory": meter,
    "throughput": throughput,
    "caps": caps,
    "scaling": scaling,
    "train": train,
}


def main(argv: list[str]) -> int:
    """Run one part; returns 0 if all is well, 1 if something is wrong, 2 for bad input."""
    parser = ArgumentParser(prog="gpu_suite", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="stop in time; the next call goes on")
    parser.add_argument("--output", type=Path, default=results.RESULTS, help="folder of the results (%(default)s)")
    arguments = parser.parse_args(argv)
    try:
        return PARTS[arguments.part](arguments.output, arguments.budget)
    except UserError as error:
        print(f"gpu_suite: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
