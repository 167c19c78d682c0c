"""The run folder, and what is said."""

from __future__ import annotations

from dataclasses import dataclass

from fastlocal.train.options import values
from fastlocal.train.options.values import Options, option


@dataclass(frozen=True)
class ReportOptions(Options):
    """The run folder, and what is said."""

    output: str = option("runs", "folder that run folders are made in")
    experiment: str = option("", "name of the run folder; default: time, data and objective", values.folder_name)
    recovery_interval: int = option(
        0, "steps between saves inside an epoch; 0: only at its end", values.whole, at_least=0
    )
    save_retry: float = option(
        10.0,
        "minutes to go on trying to save when the disk is full or away, before the run stops",
        values.number,
        at_least=0,
    )
    log_interval: int = option(
        50, "steps between lines inside an epoch, when not on a terminal", values.whole, at_least=1
    )
    log: str = option("none", "extra log beside metrics.jsonl", choices=("none", "tensorboard", "wandb", "trackio"))
