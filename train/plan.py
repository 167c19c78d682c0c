"""``fastlocal plan``: from a memory budget to a way of training, and why not another."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastlocal.planner import Candidate, Search, format_bytes, search
from fastlocal.train.build import build_device, build_model, pretrained_configuration, unplanned_options
from fastlocal.train.config import TrainConfig, UserError


def make_plan(config: TrainConfig) -> Search:
    """Search for plans of ``config``'s model, batch size, objective and memory, without taking memory for the model.

    Raises:
        UserError: no memory is given, or a name is not known.
        ValueError: what the planner refuses.
    """
    if config.memory is None:
        raise UserError("--memory is missing: give the budget, such as --memory 4GiB.")
    with torch.device("meta"):
        designed = tuple(pretrained_configuration(config.model)["input_size"][-2:])
        model = build_model(config, 1000, config.img_size or designed)
    options = unplanned_options(config, build_device(config))
    return search(model, batch_size=config.batch_size, budget=config.memory, objective=config.objective, **options)


def show(found: Search, as_json: bool) -> int:
    """Print what was found; returns 0 if something fits, else 2."""
    chosen = found.chosen
    if as_json:
        print(
            json.dumps(
                {
                    "budget": found.budget,
                    "chosen": chosen and chosen.to_dict(),
                    "smallest": found.smallest,
                    "candidates": [_plain(candidate) for candidate in found.candidates],
                    "rivals": [_plain(candidate) for candidate in found.rivals],
                }
            )
        )
        return 0 if chosen else 2
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 160)
    console.print(_table("Plans, best first", found.candidates))
    console.print(_table("Ordinary end-to-end training in the same memory", found.rivals))
    if chosen is None:
        console.print(
            f"Nothing fits {format_bytes(found.budget)}; the smallest budget that would do is"
            f" {format_bytes(found.smallest, up=True)}."
        )
        return 2
    cuts = ",".join(map(str, chosen.cuts))
    console.print(
        f"Predicted peak {format_bytes(chosen.peak)} of {format_bytes(found.budget)}, tensors only: leave some 0.5 GiB of the"
        " card for the CUDA context and fragmentation.\nTrain with: fastlocal train"
        f" --objective {chosen.objective} --modules {cuts or 1} --micro-batch {chosen.micro_batch}"
        f" --recompute {chosen.recompute} --residency {chosen.residency} --batch-size {chosen.batch_size} …"
    )
    return 0


def _plain(candidate: Candidate) -> dict[str, Any]:
    return {**candidate.plan.to_dict(), "verdict": candidate.verdict, "measured": candidate.measured}


def _table(title: str, candidates: tuple[Candidate, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("objective", "modules", "micro-batch", "recompute", "on device", "peak", "FLOPs", "bus / step", ""):
        right = heading in ("modules", "micro-batch", "peak", "FLOPs")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for candidate in candidates:
        plan = candidate.plan
        table.add_row(
            plan.objective,
            str(plan.modules),
            str(plan.micro_batch),
            plan.recompute,
            {"all": "all state", "optimizer": "all but optimizer", "module": "one module"}[plan.residency],
            ("" if candidate.measured else "≥ ") + format_bytes(plan.peak),
            f"{plan.compute:.2f}×",
            format_bytes(plan.traffic) if plan.traffic else "–",
            candidate.verdict,
        )
    return table
