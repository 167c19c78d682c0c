"""``fastlocal bench throughput --cap``: what trains on a smaller card, found on the card at hand.

torch's allocator is limited to the size asked for (`torch.cuda.set_per_process_memory_fraction`), in a process of its
own per point, and each set-up is given the largest batch that trains; one with micro-batches, the largest part of a
fixed batch. A real card of that size has less to give: the CUDA context (some 0.3 to 0.5 GiB) and whatever draws the
screen come on top. With no card the meter's dry run says what would fit, and nothing is timed.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlocal.profiling import memory, results
from fastlocal.profiling.card.campaign import Campaign
from fastlocal.profiling.card.throughput import (
    MIB,
    ROUNDS,
    SAMPLE_SECONDS,
    Setup,
    Training,
    asked_for,
    available_kernels,
    default_device,
    release,
    time_step,
)
from fastlocal.profiling.cli import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

REFINEMENTS = 2  # bisections between the last power of two that trains and the first that does not
POINT_SECONDS = 300  # after which a point is given up
MODULES = (4, 16)


def setups(blocks: int, kernels: str, fused_attention: int) -> list[Setup]:
    """Local and exact training by modules, and end-to-end rivals from the fastest to the most frugal.

    Rivals get the attention path ``fused_attention``; ours come at each of `MODULES` that ``blocks`` allow. The first
    ones first: a session cut short has what matters most.
    """
    mine = []
    for count in (count for count in MODULES if count <= blocks):
        local = Setup("local", 1, True, count, "feature", "linear", "module", kernels=kernels)
        mine += [local, replace(local, family="exact", objective="end-to-end", decoder="")]
    theirs = [
        Setup("rival", micro, recompute, fused_attention=fused_attention)
        for micro, recompute in ((None, False), (None, True), (1, True))
    ]
    offloading = Setup("rival", 1, True, fused_attention=fused_attention)
    theirs += [replace(offloading, method=method) for method in ("fsdp", "fsdp bf16 saved")]
    return [*mine[:2], *theirs, *mine[2:]]


def name(setup: Setup) -> str:
    """The set-up's name in the table. The size of its parts is what is searched, so it is not in there."""
    label = setup.label.replace(f", parts of {setup.micro_batch}", "")
    return label if setup.micro_batch is None or setup.family == "rival" else f"{label}, parts"


def largest(trains: Callable[[int], bool], limit: int, refinements: int = REFINEMENTS) -> int:
    """The largest size up to ``limit`` that trains, 0 if 1 does not: doubling, then bisecting ``refinements`` times."""
    good, size = 0, 1
    while size <= limit and trains(size):
        good = size
        if size == limit:
            return limit
        size = min(2 * size, limit)
    bad = size
    for _ in range(refinements if good else 0):
        middle = (good + bad) // 2
        if middle == good:
            break
        if trains(middle):
            good = middle
        else:
            bad = middle
    return good


# --- One point --------------------------------------------------------------------------------------------------------


def measure_point(point: Mapping[str, Any]) -> dict[str, Any]:
    """In a process of its own, on CUDA: limit the allocator, find the largest size, time steps at that size."""
    import torch

    device = default_device()
    setup, batch_size = Setup(**point["setup"]), point["batch_size"]
    whole = torch.cuda.get_device_properties(device).total_memory
    if point["cap"] > whole:
        return {"error": f"the card has only {whole / 2**30:.1f} GiB"}
    torch.cuda.set_per_process_memory_fraction(point["cap"] / whole, device)
    training: Training | None = None

    def at(size: int) -> Training:
        nonlocal training
        if training is None:
            parts = setup.micro_batch is not None
            training = Training(point["model"], setup, batch_size if parts else size, device, point["image_size"])
        if setup.micro_batch is not None:
            training.micro_batch = size
        elif training.batch_size != size:
            training.batch_size = size
        return training

    def trains(size: int) -> bool:
        nonlocal training
        try:
            for _ in range(2):  # the second step has optimizer states
                at(size).step()
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            training = None  # what a broken step leaves behind is not to be counted on
        release()
        return training is not None

    found = largest(trains, batch_size)
    if not found:
        return {"trains": False, "largest": 0, "measured": True}
    current = at(found)
    for _ in range(2):
        current.step()
    torch.cuda.reset_peak_memory_stats()
    steps = max(1, math.ceil(SAMPLE_SECONDS / time_step(current)))
    seconds = statistics.median(time_step(current, steps) for _ in range(ROUNDS))
    return {
        "trains": True,
        "largest": found,
        "images_per_s": current.batch_size / seconds,
        "peak_mib": torch.cuda.max_memory_allocated() / MIB,
        "reserved_mib": torch.cuda.max_memory_reserved() / MIB,
        "measured": True,
    }


def predict_point(model: nn.Module, point: Mapping[str, Any]) -> dict[str, Any]:
    """The largest size whose dry run stays under the cap; no speed."""
    setup, batch_size = Setup(**point["setup"]), point["batch_size"]
    peaks: dict[int, int] = {}

    def trains(size: int) -> bool:
        sized = replace(setup, micro_batch=size) if setup.micro_batch is not None else setup
        peaks[size] = memory.meter_step(model, sized, batch_size if setup.micro_batch is not None else size).peak
        return peaks[size] <= point["cap"]

    found = largest(trains, batch_size)
    peak = {"peak_mib": peaks[found] / MIB} if found else {}
    return {"trains": found > 0, "largest": found, **peak, "measured": False}


def _in_own_process(point: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "fastlocal.profiling.card.caps", json.dumps(point)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {seconds:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        return {"error": (done.stderr.strip().splitlines() or ["the process died without a word"])[-1][:300]}
    return json.loads(lines[-1])


# --- The command ------------------------------------------------------------------------------------------------------


def run(arguments: Any, folder: Path) -> int:
    """All points of ``--cap``: models × set-ups × caps, from the largest cap down; returns the exit code."""
    device = default_device()
    caps = _sizes(arguments.cap, device)
    campaign = Campaign(folder / "caps.jsonl", arguments.budget)
    best = available_kernels(device)[0][0]
    # The largest cap first: what does not train there need not be tried below.
    points = []
    for model in arguments.model:
        skeleton = memory.skeleton(model, arguments.image_size)
        for setup in setups(memory.number_of_blocks(skeleton), best, 2 if "swin" in model else 1):
            if asked_for(name(setup), arguments.only):
                points += [(model, skeleton, setup, cap) for cap in caps]
    if not points:
        raise UserError(f"--only: no set-up has {' or '.join(map(repr, arguments.only))} in its name.")

    place = {"bench": "caps", "image_size": arguments.image_size, "batch_size": arguments.batch_size}
    jobs = []
    for model, skeleton, setup, cap in points:
        key = {**place, "model": model, "cap": cap, "setup": asdict(setup)}
        jobs.append((key, (key, skeleton, setup)))
    for key, skeleton, setup in campaign.todo(jobs):
        above = [campaign.find({**key, "cap": cap}) for cap in caps if cap > key["cap"]]
        if any(row is not None and row.get("trains") is False for row in above):
            found: dict[str, Any] = {"trains": False, "largest": 0, "measured": False}
        elif device.type == "cuda":
            left = campaign.remaining()
            found = _in_own_process(key, POINT_SECONDS if left is None else min(POINT_SECONDS, left))
            if "error" in found and left is not None and left < POINT_SECONDS:
                print(f"{key['model']}, {name(setup)}, {caps[key['cap']]}: cut short, left for the next session")
                campaign.left += 1
                continue
        else:
            found = predict_point(skeleton, key)
        row = campaign.add({**key, "cap_text": caps[key["cap"]], "name": name(setup), "error": None, **found})
        print(f"{row['model']}, {row['name']}, {row['cap_text']}: {_cell(row)}", flush=True)
    for model in arguments.model:
        done = (campaign.find(key) for key, _ in jobs if key["model"] == model)
        rows = [one for one in done if one is not None]
        results.show(f"\n{model}\n\n{table(rows)}")
    if campaign.left:
        print(f"\nOut of time with {campaign.left} points left; the same command goes on with them.")
    return 0


def _sizes(given: str, device: torch.device) -> dict[int, str]:
    """Bytes -> text of the sizes in ``--cap``, the largest first; "all" is the whole card."""
    import torch

    from fastlocal.planner import parse_bytes

    sizes: dict[int, str] = {}
    for text in (part.strip() for part in given.split(",")):
        if text == "all" and device.type == "cuda":
            sizes[torch.cuda.get_device_properties(device).total_memory] = text
            continue
        try:
            sizes[parse_bytes(text)] = text
        except ValueError:
            accepted = "sizes such as 4GiB, or all on a card"
            raise UserError(f"--cap must be {accepted}, separated by commas; got {text!r}.") from None
    return dict(sorted(sizes.items(), reverse=True))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What trains on your card: a line per set-up, a column per size, images/s and the largest batch or part."""
    if not rows:
        return "Nothing was measured."
    caps = dict(sorted({row["cap"]: row["cap_text"] for row in rows}.items()))
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        lines.setdefault(row["name"], {"set-up": row["name"]})[row["cap_text"]] = _cell(row)
    columns = {"set-up": "set-up", **{text: text for text in caps.values()}}
    legend = (
        f"Images/s at the largest batch up to {rows[0]['batch_size']} that trains (for parts and accumulation: at that "
        "batch, in the largest parts that train); – : does not train."
    )
    if any(row.get("trains") and not row["measured"] for row in rows):
        legend += " No speed: predicted by a dry run, no card was there."
    return f"{results.markdown_table(list(lines.values()), columns)}\n\n{legend}"


def _cell(row: Mapping[str, Any]) -> str:
    if row["error"] is not None:
        return f"failed: {row['error']}"
    if not row["trains"]:
        return "–"
    size = f"({row['largest']})"
    return f"{row['images_per_s']:,.0f} {size}" if row["measured"] else f"trains {size}"


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    try:
        answer = measure_point(asked)
    except Exception as error:
        answer = {"error": results.sentence(error)}
    print(json.dumps(answer))
