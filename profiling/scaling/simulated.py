"""``fastlocal bench scaling --simulate``: what 2 to 64 devices would gain on slow and fast links. Nothing is run.

The model is the planner's (`fastlocal.planner.scaling`), which ``fastlocal plan --devices`` chooses by; the figures of the
card are round ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from fastlocal import memory
from fastlocal.backbones import backbone
from fastlocal.planner import NOMINAL
from fastlocal.planner.devices import Divided, module_counts
from fastlocal.planner.scaling import PARTS, Scaling, scaling
from fastlocal.profiling import results

MODELS = (
    *("swin_tiny_patch4_window7_224", "swin_base_patch4_window7_224"),
    *("vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224"),
)
LINKS = {"1 Gbit/s": 125e6, "10 Gbit/s": 1.25e9, "100 Gbit/s": 12.5e9, "PCIe 4 (24 GB/s)": 24e9}
DEVICES = (2, 4, 8, 16, 32, 64)
QUEUE = 2


def simulate(output: Path, batch_size: int, models: Sequence[str] = MODELS, devices: Sequence[int] = DEVICES) -> int:
    """Write ``simulated.jsonl`` and ``simulated.md`` into ``output`` and print the table; returns 0."""
    rows = [row for model in models for row in simulated(model, batch_size, devices)]
    text = page(rows, batch_size)
    output.mkdir(parents=True, exist_ok=True)
    (output / "simulated.jsonl").write_text("".join(f"{json.dumps({**row, **results.origin()})}\n" for row in rows))
    (output / "simulated.md").write_text(text)
    results.show(text)
    return 0


def simulated(name: str, batch_size: int, devices: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for each link and number of devices: the best of each way of sharing, and what the fullest device holds."""
    with torch.device("meta"):
        model = timm.create_model(name)
    blocks = len(backbone(model).blocks)
    with memory.dry_run():
        counts = {k: None for n in devices for k in module_counts(n, blocks)}
        divided = {k: Divided(model, k, "feature", batch_size) for k in counts}
        for link, bandwidth in LINKS.items():
            for number in devices:
                best: dict[str, tuple[Divided, Scaling]] = {}
                for one in (divided[k] for k in module_counts(number, blocks)):
                    for found in scaling(one.costs, number, bandwidth, alone=one.plain):
                        if found.way == "pipeline" or not one.obstacle(found):
                            best[found.way] = min(best.get(found.way, (one, found)), (one, found), key=_seconds)
                yield {
                    "bench": "simulated scaling",
                    "model": name,
                    "batch_size": batch_size,
                    "link": link,
                    "bytes_per_second": bandwidth,
                    "devices": number,
                    "ways": {way: _figures(*entry) for way, entry in best.items()},
                }


def _seconds(entry: tuple[Divided, Scaling]) -> float:
    return entry[1].seconds


def _figures(divided: Divided, found: Scaling) -> dict[str, Any]:
    figures: dict[str, Any] = {"modules": len(divided.costs), "grid": found.grid}
    figures |= {"speed_up": round(found.speed_up, 3), "balance": round(found.balance, 3)}
    figures["bytes_sent"] = round(found.bytes_sent)
    if found.way != "pipeline":
        figures["peak_bytes"] = divided.share(found, QUEUE).peak
    return figures


def page(rows: Sequence[dict[str, Any]], batch_size: int) -> str:
    """The tables, a model each, and what they stand for."""
    parts = [
        "# Several devices, simulated",
        f"Nothing here was measured. Speed-up over plain training (exact gradients) on one device, batch {batch_size} over all"
        f" devices, objective `feature` (decoder `linear`), bfloat16, a card of {NOMINAL.flops / 1e12:.0f} TFLOP/s."
        " `modules`, `data` and `both` are fastlocal's; `exact pipeline` is GPipe or 1F1B with exact gradients, whose bubble is"
        f" (S − 1)/(M + S − 1) for S stages and M = {PARTS} parts. A cell without a number: more devices than blocks."
        " Memory is what tensors of the fullest device take with the best way, without recomputation and small parts."
        " Written by `fastlocal bench scaling --simulate`, from the function that `fastlocal plan --devices` chooses by.",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        lines = [_line(row) for row in rows if row["model"] == model]
        parts += [f"## {model}", results.markdown_table(lines)]
    return "\n\n".join(parts) + "\n"


def _line(row: dict[str, Any]) -> dict[str, Any]:
    ways = row["ways"]
    best = max((way for way in ways if way != "pipeline"), key=lambda way: ways[way]["speed_up"])
    named = {"modules": "modules", "data": "data", "both": "both", "pipeline": "exact pipeline"}
    rows, columns = ways[best]["grid"]
    return {
        "link": row["link"],
        "devices": row["devices"],
        **{heading: f"{ways[way]['speed_up']:.2f}" if way in ways else "" for way, heading in named.items()},
        "best": f"{best}, K={ways[best]['modules']}, {rows} × {columns}",
        "sent a step": f"{ways[best]['bytes_sent'] / 1e6:,.1f} MB",
        "memory": f"{ways[best]['peak_bytes'] / 2**30:.2f} GiB",
    }
