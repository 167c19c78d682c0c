"""``fastlocal bench accuracy``: what each objective learns with the same recipe, side by side.

Every objective trains in a run folder of its own with the loop of ``fastlocal train`` and its flags; a run that was stopped
goes on where it was when the command is given again, and a run that is done is only read. Images per second are the median
over the epochs, one objective after another: a machine that is busy with other things weighs on some more than on others.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastlocal.profiling import results
from fastlocal.profiling.campaign import Campaign
from fastlocal.profiling.cli import UserError
from fastlocal.train.cli import options_of, training_parser
from fastlocal.train.config import OBJECTIVES, TrainConfig, read_file


def main(argv: list[str]) -> int:
    """Train with every objective; returns the exit code, 130 if stopped by Ctrl-C."""
    parser = training_parser("fastlocal bench accuracy", __doc__ or "")
    parser.add_argument(
        "--objectives", nargs="+", choices=OBJECTIVES, default=OBJECTIVES, metavar="OBJECTIVE", help="(all)"
    )
    parser.add_argument("--results", default=str(results.RESULTS), help="folder that the rows go to (%(default)s)")
    given = options_of(parser, argv)
    objectives, output = given.pop("objectives"), Path(given.pop("results"))
    if "objective" in given or "experiment" in given:
        raise UserError("--objective and --experiment are set by this command; use --objectives.")
    # All are checked before the first one trains.
    configs = [TrainConfig.of(**given, objective=name, experiment=f"accuracy-{name}") for name in objectives]
    campaign = None
    rows = []
    for config in configs:
        row = measure(config)
        if row is None:
            return 130
        campaign = campaign or Campaign(results.card_folder(output) / "accuracy.jsonl")  # a mistake leaves no folder
        rows.append(campaign.find(row) or campaign.add(row))
    print(f"\n{table(rows)}")
    return 0


def measure(config: TrainConfig) -> dict[str, Any] | None:
    """Train as ``config`` says, or go on with what its run folder holds; None if stopped before the end.

    Raises:
        UserError: the run folder is of another configuration.
    """
    from fastlocal.train import loop

    folder = Path(config.output) / config.experiment
    if (folder / "config.yaml").exists():
        kept = TrainConfig.of(**read_file(folder / "config.yaml"))
        if config.memory is not None:  # what the planner chose then is in the file
            planned = {name: getattr(kept, name) for name in ("modules", "micro_batch", "recompute", "residency")}
            config = replace(config, **planned)
        if kept != config:
            raise UserError(f"--output: {folder} is a run with other options; name another folder or remove it.")
        summary = loop.resume(folder)
    else:
        summary = loop.run(config)
    if summary.interrupted:
        return None
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    options = config.to_dict()
    return {
        "bench": "accuracy",
        **{name: options[name] for name in ("data", "model", "model_kwargs", "objective", "modules", "decoder")},
        **{name: options[name] for name in ("epochs", "batch_size", "opt", "lr", "seed")},
        "exits": epochs[-1]["exits"],
        "accuracy": epochs[-1]["validation_accuracy"],
        "best_accuracy": summary.best_accuracy,
        "images_per_second": statistics.median(epoch["images_per_second"] for epoch in epochs),
        "peak_mib": max(epoch["peak_memory_bytes"] for epoch in epochs) / 2**20,
    }


def table(rows: Sequence[results.Row]) -> str:
    """Validation accuracy after each module in per cent, speed and peak memory (of the process, on a CPU)."""
    lines, columns = [], {"objective": "objective"}
    for row in rows:
        line = {"objective": row["objective"], "speed": row["images_per_second"], "memory": row["peak_mib"]}
        for name, accuracy in zip(row["exits"], row["accuracy"], strict=True):
            line[name] = 100 * accuracy
        lines.append(line)
    exits = max((row["exits"] for row in rows), key=len)
    columns |= {name: f"{name} %" for name in exits} | {"speed": "images/s", "memory": "peak MiB"}
    return results.markdown_table(lines, columns)
