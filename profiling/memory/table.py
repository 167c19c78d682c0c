"""``fastlocal bench memory``: bytes on the device and on the host, bytes over the bus and FLOPs of a training step.

Every number comes from dry runs of a step, ours and the rivals'; no GPU is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from fastlocal.profiling.cli import ArgumentParser, UserError
from fastlocal.profiling.memory.plots import plot_bus, plot_pareto, plot_timelines
from fastlocal.profiling.memory.setups import METHODS, MIB, Family, Setup, ours, rivals
from fastlocal.profiling.memory.step import Result, measure, possible, skeleton
from fastlocal.profiling.results import append_row, markdown_table, show


def rows(results: Sequence[Result], weights: int) -> list[dict[str, Any]]:
    """Results as rows of a table; compute and memory relative to the first, plain end-to-end training.

    Args:
        weights: bytes of the model's weights in fp32, the unit of the bus column.
    """
    plain = results[0]
    return [
        {
            "set-up": result.setup.name,
            "exact": result.setup.exact,
            "modules": result.setup.modules if result.setup.family != "rival" else None,
            "decoder": result.setup.decoder,
            "parts of": result.setup.micro_batch,
            "recompute": result.setup.recompute,
            "residency": result.setup.residency if result.setup.family != "rival" else "",
            "boundaries": result.setup.boundaries if result.setup.family != "rival" else "",
            "weights": result.setup.weights if result.setup.family != "rival" else "",
            "prefetch": result.setup.prefetch
            if result.setup.family != "rival" and result.setup.residency != "all"
            else "",
            "device MiB": round(result.peak / MIB, 1),
            "vs E2E": round(result.peak / plain.peak, 3),
            "host MiB": round(result.host / MIB, 1),
            "bus / W": round(result.traffic / weights, 1),
            "FLOPs": round(result.flops / plain.flops, 3),
            "lines": result.setup.lines,
        }
        for result in results
    ]


def main(argv: list[str]) -> int:
    parser = ArgumentParser(prog="fastlocal bench memory", description=__doc__)
    parser.add_argument("--model", default="swin_tiny_patch4_window7_224", help="any timm model (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--image-size", type=int, help="pixels; the model's own if not given")
    parser.add_argument("--micro-batch", type=int, default=8, help="samples in a part (%(default)s)")
    parser.add_argument("--modules", type=int, nargs="+", metavar="K", help="(1 to 8, 12)")
    names = ["feature", "image", "cross-entropy", "transport"]
    parser.add_argument("--objectives", nargs="+", default=names, choices=names, help="(all)")
    names = ["linear", "mlp", "conv", "transformer"]
    parser.add_argument("--decoders", nargs="+", default=names, choices=names, help="(all)")
    names = list(METHODS)
    parser.add_argument("--methods", nargs="*", default=names, choices=names, help="rivals beyond checkpointing (all)")
    parser.add_argument("--output", type=Path, default=Path("profiling/results"), help="folder (%(default)s)")
    arguments = parser.parse_args(argv)
    for name in ("batch_size", "micro_batch", "image_size"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")

    model = skeleton(arguments.model, arguments.image_size)
    setups = rivals(arguments.batch_size, arguments.micro_batch, arguments.methods)
    modules = possible(model, arguments.modules, default=[*range(1, 9), 12])
    setups += ours(modules, arguments.objectives, arguments.decoders, arguments.micro_batch)
    folder = arguments.output / "memory"
    stem = f"{arguments.model}-{arguments.batch_size}"
    weights = sum(4 * parameter.numel() for parameter in model.parameters())
    results = list(_measure_all(model, setups, arguments, folder / f"{stem}.jsonl"))

    title = f"# Peak memory of a training step: {arguments.model}, batch {arguments.batch_size}"
    note = (
        "Dry run, bf16 autocast, AdamW with fp32 states. The fp32 images of the first rivals take "
        f"{results[0].peak_by_kind['inputs'] / MIB:.1f} MiB of their peaks; tuned ones and those with a name of their own"
        " keep uint8 images and no autocast weight cache, as ours do. `bus / W`: bytes over the bus in a step, both ways"
        f" together, as a multiple of the fp32 weights (W = {weights / MIB:,.0f} MiB). `FLOPs`: relative to E2E. `lines`: of"
        " user code beyond plain training's. LoRA trains another model, BAdam one block (the largest) at a time."
    )
    table = markdown_table(rows(results, weights))
    (folder / f"{stem}.md").write_text(f"{title}\n\n{note}\n\n{table}\n")
    show(f"\n{table}")
    about = f"{arguments.model}, batch {arguments.batch_size}"
    plot_timelines(_telling(results), about, folder / f"{stem}-timeline")
    plot_pareto(results, about, folder / f"{stem}-pareto")
    plot_bus(results, about, folder / f"{stem}-bus")
    print(f"\nWritten to {folder}/{stem}*")
    return 0


def _measure_all(model: nn.Module, setups: Sequence[Setup], arguments: Any, path: Path) -> Iterator[Result]:
    for setup in setups:
        result = measure(model, setup, arguments.batch_size)
        append_row(
            path,
            {
                "model": arguments.model,
                "batch_size": arguments.batch_size,
                **asdict(setup),
                "name": setup.name,
                "exact": setup.exact,
                "lines": setup.lines,
                "peak_bytes": result.peak,
                "peak_by_kind": result.peak_by_kind,
                "host_bytes": result.host,
                "traffic_bytes": result.traffic,
                "flops": result.flops,
                "seconds": round(result.seconds, 1),
            },
        )
        print(f"{result.peak / MIB:8.1f} MiB  {setup.label}  ({result.seconds:.0f} s)", flush=True)
        yield result


def _telling(results: Sequence[Result]) -> list[Result]:
    """Plain, with checkpointing, the best that offloads nothing and the best, the paper's, our best exact and local ones."""
    by_family: dict[Family, list[Result]] = {
        family: [result for result in results if result.setup.family == family]
        for family in ("rival", "local", "exact")
    }
    chosen = by_family["rival"][:2]
    exact = [result for result in by_family["rival"] if result.setup.exact == "yes"]
    chosen += [min((r for r in exact if not r.traffic), key=lambda r: r.peak), min(exact, key=lambda r: r.peak)]
    chosen += [result for result in by_family["local"] if result.setup.micro_batch is None][-1:]
    chosen += [min(group, key=lambda r: r.peak) for group in (by_family["exact"], by_family["local"]) if group]
    return list({result.setup: result for result in chosen}.values())
