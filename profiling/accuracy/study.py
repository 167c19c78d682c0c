"""Runs the jobs of a recipe: one row each, written at once; what has a row is not trained again."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastlocal.profiling import results
from fastlocal.profiling.accuracy.recipe import Job, lasting
from fastlocal.profiling.cli import UserError
from fastlocal.train.config import TrainConfig
from fastlocal.train.options.files import read_file


class Stopped(Exception):
    """A signal came: what was under way is saved, and the same command goes on with it."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code


def run(jobs: Sequence[Job], path: Path) -> Iterator[dict[str, Any]]:
    """The row of each job: from ``path``, where it has one, else trained, and written there.

    A row counts whatever the commit: training takes hours, and a row says which commit it is from.

    Raises:
        UserError: a run folder is of another configuration.
        Stopped: after the first signal.
    """
    for job in jobs:
        yield find(job, results.read_rows(path)) or results.append_row(path, row_of(job))


def find(job: Job, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The last of ``rows`` that is this job's, or None. Options that came later than a row have their defaults in it."""
    key = json.loads(json.dumps(job.key))  # as it reads back from the file
    defaults = json.loads(json.dumps(replace(job, config=TrainConfig()).key))["options"]
    for row in reversed(rows):
        if {"task": row["task"], "variant": row["variant"], "options": {**defaults, **lasting(row["options"])}} == key:
            return row
    return None


def row_of(job: Job) -> dict[str, Any]:
    """Train as ``job`` says, or go on with what its run folder holds.

    Raises:
        UserError: its run folder is of another configuration.
        Stopped: after the first signal.
    """
    from fastlocal.profiling.accuracy.cost import flops_ratio
    from fastlocal.train import checkpoint, loop

    config, folder = job.config, Path(job.config.reports.output) / job.config.reports.experiment
    if (folder / "config.yaml").exists():
        kept = TrainConfig.of(**read_file(folder / "config.yaml"))
        if config.memory.budget is not None:  # what the planner chose then is in the file
            planned = {name: kept.get(name) for name in ("modules", "micro_batch", "recompute", "residency")}
            config = config.changed(**planned)
        if kept != config:
            raise UserError(f"--output: {folder} is a run with other options; name another folder or remove it.")
        summary = loop.resume(folder)
    else:
        summary = loop.run(config)
    if summary.interrupted:
        raise Stopped(summary.exit_code)
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    saved = checkpoint.load(folder / "last.pt")
    # A run may have gone on elsewhere than it began, and --device need not be what the machine has best.
    card = epochs[-1].get("device", "unknown")
    there = [epoch for epoch in epochs if epoch.get("device", "unknown") == card]
    return {
        "bench": "accuracy",
        **job.key,
        "data": config.data.name,
        "split": "validation",
        "train_images": summary.images[0],
        "validation_images": summary.images[1],
        **{name: job.key["options"][name] for name in ("epochs", "seed", "model", "objective", "modules")},
        "exits": epochs[-1]["exits"],
        "accuracy": epochs[-1]["validation_accuracy"],
        "best_accuracy": summary.best_accuracy,
        "curve": [[round(share, 4) for share in epoch["validation_accuracy"]] for epoch in epochs],
        "flops_ratio": round(
            flops_ratio(config, len(saved["classes"]), tuple(saved["preprocessing"]["image_size"]), epochs[0]["step"]),
            4,
        ),
        "card": card,
        "images_per_second": statistics.median(epoch["images_per_second"] for epoch in there),
        "peak_bytes": max((epoch["peak_memory_bytes"] for epoch in there if epoch["peak_memory_bytes"]), default=None),
    }
